"""Shard files: rollouts as Parquet, and beside each file the manifest that makes it exist.

A shard is never changed. A rewritten one lists in its manifest the shards it `replaces`, and those
that they had replaced. From then on these do not exist, even if a crash left their files. Knows one
place at a time; the lake knows which shards there are, and does locks, deletion and retention.

Format 3, written now, has the keys of `rows` and a checksum in every page. Format 2 is read: its
keys are computed. `Lake.migrate` rewrites it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2t_shared.errors import StoreError
from s2t_shared.files import sha256_file
from s2t_shared.labels.check import check_rows
from s2t_shared.labels.places import Place
from s2t_shared.labels.rows import (
    LABEL_KEY,
    LABELS,
    OPTIONAL,
    ROLLOUT_SCHEMA,
    SCHEMA,
    SOURCES,
    Rows,
)

FORMAT = 3
READABLE = (2, 3)
READ_ROWS = 256  # a row group; what a reader of few rows holds in memory
# Values that repeat. Of the others a dictionary would be built and thrown away.
DICTIONARIES = [
    "group",
    "problem_id",
    "task",
    "split",
    "source",
    "prompt_length",
    "llm_top_rank.list.element",
    f"{LABELS}.list.element.llm_top_rank",
    "slm_digest",
    "llm_digest",
    "tokenizer_digest",
    "template_digest",
    "schema_version",
    "part",
]

# -- manifests ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The manifest of one shard.

    rollouts, labels: how many, duplicates included. bytes, sha256: of the Parquet file. first,
    last: when the oldest and the newest rollout were made, in Unix seconds. schema_version: the
    file's format.
    """

    name: str
    rollouts: int
    labels: int
    bytes: int
    sha256: str
    first: float
    last: float
    replaces: tuple[str, ...] = ()
    schema_version: int = FORMAT

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"


def present(place: Place) -> list[Shard]:
    """The shards that exist in a place, in the order of their names.

    Raises:
        StoreError: a manifest is damaged or of an unknown format.
    """
    shards = [read_manifest(place, name) for name in place.names(".json")]
    replaced = {name for s in shards for name in s.replaces}
    return [s for s in shards if s.name not in replaced]


def read_manifest(place: Place, name: str) -> Shard:
    """Read a manifest.

    Raises:
        StoreError: it is damaged or of an unknown format.
    """
    try:
        content: dict[str, Any] = json.loads(place.read(f"{name}.json"))
        version = content["schema_version"]
        if version not in READABLE:
            raise StoreError(
                f"label shard {name} has schema {version}, this program reads "
                f"{', '.join(map(str, READABLE))}; use the program that wrote it, or keep such "
                "labels in a lake of their own"
            )
        content["replaces"] = tuple(content["replaces"])
        return Shard(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of label shard {name} is damaged ({type(error).__name__}); "
            "s2t labels verify --quarantine moves such shards aside"
        ) from error


def content_digest(shards: Iterable[Shard]) -> str:
    """The name of a snapshot of these shards."""
    text = json.dumps([(shard.name, shard.sha256) for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- writing --------------------------------------------------------------------------------------


def write_shard(
    place: Place, stamp: str, parts: Iterable[Rows], replaced: Sequence[Shard] = ()
) -> None:
    """Write shard-`stamp` durably and atomically. One that exists already stays as it is.

    Raises:
        OSError: the place cannot be written; nothing is left behind.
        S2TError: a value is impossible.
    """
    name = f"shard-{stamp}"
    if name in place.names(".json"):  # written before, under this name
        return
    try:
        with place.writing(f"{name}.parquet") as path:
            count = _Count()
            options: dict[str, Any] = {
                "compression": "zstd",
                "use_dictionary": DICTIONARIES,
                "write_page_checksum": True,
            }
            with pq.ParquetWriter(path, SCHEMA, **options) as writer:
                for rows in _grouped(parts):
                    check_rows(rows)
                    writer.write_table(rows.table, row_group_size=READ_ROWS)
                    count.add(rows)
            shard = Shard(
                name=name,
                rollouts=count.rollouts,
                labels=count.labels,
                bytes=path.stat().st_size,
                sha256=sha256_file(path),
                first=count.first,
                last=count.last,
                replaces=_ancestors(replaced),
            )
        content = json.dumps(asdict(shard), indent=2).encode()
        if replaced:
            place.replace(f"{name}.json", content)
        else:
            _create(place, f"{name}.json", content)
    except BaseException:  # a full disk must not be filled by what it refused
        if name not in place.names(".json"):
            place.remove(f"{name}.parquet")
        raise


def _create(place: Place, name: str, content: bytes) -> None:
    with suppress(FileExistsError):  # the same, written meanwhile under this name
        place.create(name, content)


@dataclass
class _Count:
    """Of the rows that were written."""

    rollouts: int = 0
    labels: int = 0
    first: float = 0.0
    last: float = 0.0

    def add(self, rows: Rows) -> None:
        created = rows.numbers("created_at")
        oldest = float(created.min())
        self.first = min(self.first, oldest) if self.rollouts else oldest
        self.last = max(self.last, float(created.max())) if self.rollouts else float(created.max())
        self.rollouts += len(rows)
        self.labels += int(rows.label_counts.sum())


def _grouped(parts: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows with all columns, joined to some row groups each."""
    waiting: list[Rows] = []
    for part in parts:
        if len(part):
            waiting.append(part.completed())
        if sum(map(len, waiting)) >= 8 * READ_ROWS:
            yield from _whole_groups(waiting)
    if waiting:
        yield Rows.joined(waiting)


def _whole_groups(waiting: list[Rows]) -> Iterator[Rows]:
    """Takes full row groups off `waiting`; the rest stays there."""
    rows = Rows.joined(waiting)
    full = len(rows) // READ_ROWS * READ_ROWS
    waiting[:] = [rows.slice(full, len(rows) - full)] if full < len(rows) else []
    yield rows.slice(0, full)


def _ancestors(replaced: Sequence[Shard]) -> tuple[str, ...]:
    """Names of the replaced shards, and of those that they had replaced."""
    names: dict[str, None] = {}  # in order, each once
    for shard in replaced:
        for name in (shard.name, *shard.replaces):
            names[name] = None
    return tuple(names)


# -- reading --------------------------------------------------------------------------------------


def verify_content(place: Place, shard: Shard) -> None:
    """Check the hash of a shard's file.

    Raises:
        StoreError: it is missing or changed.
    """
    with read_errors(shard):
        if place.sha256(shard.file) != shard.sha256:
            raise _changed(shard)


class ShardFile:
    """An open shard. Columns are named as in `Rows.completed`.

    group_rows: rows of each row group.
    """

    def __init__(self, shard: Shard, file: pq.ParquetFile) -> None:
        self._shard = shard
        self._file = file
        self._names = _readable_names(shard, file.schema_arrow)
        metadata = file.metadata
        self.group_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if metadata.num_rows != shard.rollouts:
            raise _changed(shard)

    def read(self, names: Sequence[str], groups: Sequence[int] | None = None) -> Rows:
        """All rows, or those of some row groups, with duplicates.

        Raises:
            StoreError: the file is damaged.
        """
        wanted: dict[str, None] = {}
        for name in names:
            wanted.update(dict.fromkeys(self._sources(name)))
        chosen = range(len(self.group_rows)) if groups is None else groups
        with read_errors(self._shard):
            table = self._file.read_row_groups(list(chosen), columns=list(wanted))
            return Rows(table).completed(names)

    def _sources(self, name: str) -> tuple[str, ...]:
        """The columns of the file that give a column."""
        top, _, inner = name.partition(".")
        if inner:
            known = inner in self._names[LABELS]
            leaves = (inner,) if known else SOURCES[inner]
            return tuple(f"{LABELS}.list.element.{leaf}" for leaf in leaves)
        if name in self._names:
            return (name,)
        return tuple(n for n in SOURCES.get(name, ()) if n in self._names)


@contextmanager
def open_shard(place: Place, shard: Shard, whole: bool = False) -> Iterator[ShardFile]:
    """whole: check the hash first, as everything will be read. Otherwise the checksums of the pages
    that are read must do, which format 2 does not have.

    Raises:
        StoreError: the file is missing, changed, or of an unknown format.
    """
    if whole:
        verify_content(place, shard)
    with read_errors(shard):
        if place.size(shard.file) != shard.bytes:
            raise _changed(shard)
        options: dict[str, Any] = {"memory_map": True, "pre_buffer": False}
        if shard.schema_version >= FORMAT:
            options["page_checksum_verification"] = True
        with pq.ParquetFile(place.source(shard.file, whole), **options) as file:
            yield ShardFile(shard, file)


def _readable_names(shard: Shard, schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """The columns of a file, and those inside them.

    Raises:
        StoreError: they are not ours. Optional ones and keys may be missing.
    """
    if not _has_our_columns(schema):
        raise StoreError(f"label shard {shard.name} has another schema: {schema.names}")
    names: dict[str, tuple[str, ...]] = {field.name: () for field in schema}
    return names | {LABELS: tuple(field.name for field in schema.field(LABELS).type.value_type)}


def _has_our_columns(schema: pa.Schema) -> bool:
    needed = {field.name for field in ROLLOUT_SCHEMA} - set(OPTIONAL) | {LABELS}
    if not needed <= set(schema.names):
        return False
    if not all(_is_ours(field) for field in schema if field.name != LABELS):
        return False
    labels = schema.field(LABELS).type
    if not pa.types.is_list(labels) or not pa.types.is_struct(labels.value_type):
        return False
    known = {field.name: field.type for field in SCHEMA.field(LABELS).type.value_type}
    found = {field.name: field.type for field in labels.value_type}
    if LABEL_KEY not in found:
        del known[LABEL_KEY]
    return found == known


def _is_ours(field: pa.Field) -> bool:
    return field.name in SCHEMA.names and SCHEMA.field(field.name).type.equals(field.type)


@contextmanager
def read_errors(shard: Shard) -> Iterator[None]:
    """The border: what files and pyarrow raise becomes a StoreError that names the shard."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # pyarrow's, of the content
            raise _changed(shard) from error
        raise StoreError(
            f"label shard {shard.name} is missing or cannot be read ({type(error).__name__})"
        ) from error
    # TypeError: a null where a list belongs. KeyError: a column is missing.
    except (TypeError, KeyError, pa.ArrowException) as error:
        raise _changed(shard) from error


def _changed(shard: Shard) -> StoreError:
    return StoreError(
        f"label shard {shard.name} does not match its manifest: it was changed or is damaged "
        "(s2t labels verify --quarantine moves such shards aside)"
    )
