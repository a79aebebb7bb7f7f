"""Shard files: rollouts as Parquet, and beside each file the manifest that makes it exist.

A shard is never changed. A rewritten one lists in its manifest the shards it `replaces`, and those
that they had replaced. From then on these do not exist, even if a crash left their files. A
snapshot is a folder of shards that no longer changes. Knows one folder at a time; the lake knows
which shards there are, and does locks, deletion and retention.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2t_shared.errors import StoreError
from s2t_shared.files import new_file, remove_folder, sha256_file, write_atomically
from s2t_shared.labels.label import SCHEMA_VERSION, Label, Rollout
from s2t_shared.labels.schema import Column, columns

READ_ROWS = 256  # a row group; in memory at a time

# -- the schema -----------------------------------------------------------------------------------

ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type of a column."""
    item = ARROW_TYPES[column.kind.arrow]
    return pa.list_(item) if column.many else item


def arrow_fields(columns: Iterable[Column]) -> list[tuple[str, pa.DataType]]:
    """Names and Arrow types of columns, in order."""
    return [(column.name, arrow_type(column)) for column in columns]


def _arrow_schema() -> pa.Schema:
    """A row is a rollout; its labels are a list of structs, at the place that `Rollout` gives
    them."""
    types = dict(arrow_fields(columns(Rollout)))
    types["labels"] = pa.list_(pa.struct(arrow_fields(columns(Label))))
    ordered = [(f.name, types[f.name]) for f in fields(Rollout)]
    return pa.schema(ordered, metadata={"s2t_schema_version": str(SCHEMA_VERSION)})


SCHEMA = _arrow_schema()


def to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Rollouts as rows. A value that does not fit raises an error of pyarrow's or Python's: then
    `check_rollout` has a gap."""
    return pa.Table.from_pylist([asdict(r) for r in rollouts], schema=SCHEMA)


# -- one shard ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The manifest of one shard.

    rollouts, labels: how many, duplicates included. bytes, sha256: of the Parquet file. first,
    last: when the oldest and the newest rollout were made, in Unix seconds.
    """

    name: str
    rollouts: int
    labels: int
    bytes: int
    sha256: str
    first: float
    last: float
    replaces: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION


def write_shard(
    folder: Path, stamp: str, rollouts: Iterable[Rollout], replaced: Sequence[Shard] = ()
) -> None:
    """Write shard-`stamp` durably and atomically. One that exists already stays as it is.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    name = f"shard-{stamp}"
    path = folder / f"{name}.parquet"
    manifest = folder / f"{name}.json"
    if manifest.exists():  # written before, under this name
        return
    try:
        with new_file(path) as temporary:
            created, labels = _write_rows(temporary, rollouts)
            shard = Shard(
                name=name,
                rollouts=len(created),
                labels=labels,
                bytes=temporary.stat().st_size,
                sha256=sha256_file(temporary),
                first=min(created, default=0.0),
                last=max(created, default=0.0),
                replaces=_ancestors(replaced),
            )
        write_atomically(manifest, json.dumps(asdict(shard), indent=2))
    except BaseException:  # a full disk must not be filled by what it refused
        if not manifest.exists():
            path.unlink(missing_ok=True)
        raise


def _write_rows(path: Path, rollouts: Iterable[Rollout]) -> tuple[list[float], int]:
    """Returns when the rollouts were made, and the number of their labels."""
    created: list[float] = []
    labels = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for rows in groups(rollouts, READ_ROWS):
            writer.write_table(to_table(rows))
            created.extend(rollout.created_at for rollout in rows)
            labels += sum(len(rollout.labels) for rollout in rows)
    return created, labels


def _ancestors(replaced: Sequence[Shard]) -> tuple[str, ...]:
    """Names of the replaced shards, and of those that they had replaced."""
    names: dict[str, None] = {}  # in order, each once
    for shard in replaced:
        for name in (shard.name, *shard.replaces):
            names[name] = None
    return tuple(names)


def present(folder: Path) -> list[Shard]:
    """The shards that exist in a folder, in the order of their names.

    Raises:
        StoreError: a manifest is damaged or of another schema.
    """
    shards = [read_manifest(path) for path in sorted(folder.glob("shard-*.json"))]
    replaced = {name for s in shards for name in s.replaces}
    return [s for s in shards if s.name not in replaced]


def read_manifest(path: Path) -> Shard:
    """Read a manifest.

    Raises:
        StoreError: it is damaged or of another schema.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"label shard {path.stem} has schema {version}, this program reads "
                f"{SCHEMA_VERSION}; keep old labels in a lake of their own"
            )
        content["replaces"] = tuple(content["replaces"])
        return Shard(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of label shard {path.stem} is damaged ({type(error).__name__}); "
            "s2t labels verify --quarantine moves such shards aside"
        ) from error


def read_shard(folder: Path, shard: Shard) -> Iterator[Rollout]:
    """Every row, duplicates included.

    Raises:
        StoreError: the file is missing, changed, or of another schema.
    """
    path = folder / f"{shard.name}.parquet"
    with _read_errors(shard):
        if sha256_file(path) != shard.sha256:
            raise StoreError(
                f"label shard {shard.name} does not match its manifest: it was changed or is "
                "damaged (s2t labels verify --quarantine moves such shards aside)"
            )
        with pq.ParquetFile(path) as file:
            if not _is_readable(file.schema_arrow):
                raise StoreError(
                    f"label shard {shard.name} has another schema: {file.schema_arrow.names}"
                )
            for batch in file.iter_batches(batch_size=READ_ROWS):
                for row in batch.to_pylist():
                    yield Rollout.from_row(row)


def _is_readable(schema: pa.Schema) -> bool:
    """Whether a file has our columns. Optional ones may be missing."""
    optional = {column.name for column in columns(Rollout) if column.optional}
    needed = [f for f in SCHEMA if f.name in schema.names or f.name not in optional]
    return bool(schema.equals(pa.schema(needed)))


@contextmanager
def _read_errors(shard: Shard) -> Iterator[None]:
    """The border: what files and pyarrow raise becomes a StoreError that names the shard."""
    try:
        yield
    # TypeError: a null where a list belongs. KeyError: a column is missing.
    except (OSError, TypeError, KeyError, pa.ArrowException) as error:
        raise StoreError(
            f"label shard {shard.name} is missing or cannot be read ({type(error).__name__})"
        ) from error


# -- several shards -------------------------------------------------------------------------------


def read_rollouts(folder: Path, shards: Iterable[Shard]) -> Iterator[Rollout]:
    """The rollouts of `shards`, each once; each label in the first rollout that has it.

    Holds about 60 bytes for each rollout and each label seen: 1 GB at some 16 million labels.

    Raises:
        StoreError: a shard is missing, changed, or of another schema.
    """
    seen: set[int] = set()  # hashes of 64 bits, rather than the texts
    rows = (rollout for shard in shards for rollout in read_shard(folder, shard))
    for rollout in distinct(rows):
        new: list[Label] = []
        for label in rollout.labels:
            key = hash(label.label_id)
            if key not in seen:
                seen.add(key)
                new.append(label)
        if len(new) < len(rollout.labels):
            rollout = replace(rollout, labels=tuple(new))
        yield rollout


def distinct(rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
    """Each rollout once, with all its labels."""
    seen: set[int] = set()
    for rollout in rollouts:
        key = hash(rollout.rollout_id)
        if key not in seen:
            seen.add(key)
            yield rollout


def label_counts(folder: Path, shard: Shard, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Of every row the values of the columns `names`, then the number of its labels, duplicates
    included.

    Reads these columns only, so it does not notice a changed file as `read_shard` does.

    Raises:
        StoreError: the file is missing or cannot be read.
    """
    wanted = [*names, "labels.list.element.position"]  # of a label one leaf is enough
    with _read_errors(shard):
        with pq.ParquetFile(folder / f"{shard.name}.parquet") as file:
            for batch in file.iter_batches(columns=wanted):
                counts = pc.list_value_length(batch.column("labels"))
                values = [batch.column(name).to_pylist() for name in names]
                yield from zip(*values, counts.to_pylist(), strict=True)


def groups(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    """Lists of at most `size` rollouts."""
    remaining = iter(rollouts)
    while group := list(islice(remaining, size)):
        yield group


# -- snapshots ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """Frozen shards: what a training run reads, whatever becomes of the lake.

    The folder's name is the digest of its content, so a missing part is noticed. Every method
    raises StoreError then.
    """

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def labels(self) -> int:
        """Number of labels, duplicates included."""
        return sum(shard.labels for shard in self.shards())

    @property
    def is_complete(self) -> bool:
        """Whether the snapshot exists and holds every shard."""
        try:
            return bool(self.shards())
        except StoreError:
            return False

    def shards(self) -> list[Shard]:
        """The shards in the order of their names."""
        try:
            shards = present(self.folder)
            if content_digest(shards) == self.id and self._has_all_bytes(shards):
                return shards
            reason = "shards are missing"
        except (OSError, StoreError) as error:
            reason = str(error)
        raise StoreError(
            f"snapshot {self.id!r} is gone or incomplete (labels were deleted from it, or it grew "
            f"old); train on a new one ({reason})"
        )

    def _has_all_bytes(self, shards: Sequence[Shard]) -> bool:
        for shard in shards:
            if (self.folder / f"{shard.name}.parquet").stat().st_size != shard.bytes:
                return False
        return True

    def pairs(self) -> Counter[tuple[str, str]]:
        """Labels, duplicates included, by the digests of the (SLM, LLM) they come from."""
        found = Counter[tuple[str, str]]()
        for shard in self.shards():
            for slm, llm, labels in label_counts(self.folder, shard, ("slm_digest", "llm_digest")):
                found[slm, llm] += labels
        return +found  # a rollout without labels makes no pair

    def rollouts(
        self, order: Callable[[list[Shard]], list[Shard]] = lambda shards: shards
    ) -> Iterator[Rollout]:
        """As `read_rollouts`. order: may rearrange the shards."""
        return read_rollouts(self.folder, order(self.shards()))

    def remove(self) -> None:
        """Remove the snapshot. After a crash it is complete or gone."""
        remove_folder(self.folder)


def content_digest(shards: Iterable[Shard]) -> str:
    """The name of a snapshot of these shards."""
    text = json.dumps([(shard.name, shard.sha256) for shard in shards])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
