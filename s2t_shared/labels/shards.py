"""Shard files: rollouts as Parquet, and beside each file the manifest that makes it exist.

A shard is never changed. One that is rewritten lists in its manifest those it `replaces`, and those
that they had replaced: from then on these do not exist, whatever a crash has left of them. A
snapshot is a folder of shards that no longer changes. Knows one folder at a time; which there are,
locks, deletion and retention are the lake's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2t_shared.errors import StoreError
from s2t_shared.files import new_file, sha256_file, write_atomically
from s2t_shared.labels.label import SCHEMA_VERSION, Label, Rollout
from s2t_shared.labels.schema import Column, columns

ARROW = {
    "string": pa.string(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type of a column."""
    one = ARROW[column.kind.arrow]
    return pa.list_(one) if column.many else one


def _arrow_schema() -> pa.Schema:
    """A row is a rollout; its labels are a list of structs, where `Rollout` has them."""
    known = {column.name: arrow_type(column) for column in columns(Rollout)}
    label = pa.struct([(column.name, arrow_type(column)) for column in columns(Label)])
    known["labels"] = pa.list_(label)
    order = [f.name for f in fields(Rollout)]
    metadata = {"s2t_schema_version": str(SCHEMA_VERSION)}
    return pa.schema([(name, known[name]) for name in order], metadata=metadata)


SCHEMA = _arrow_schema()
READ_ROWS = 256  # a row group; in memory at a time


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard's manifest. `first`, `last`: when its oldest and newest rollouts were made, Unix
    seconds."""

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
    """Write shard-`stamp` durably, visible whole or not at all; one that is there already stays as
    it is.

    Raises:
        OSError: the folder cannot be written; nothing is left behind.
    """
    name = f"shard-{stamp}"
    path, manifest = folder / f"{name}.parquet", folder / f"{name}.json"
    if manifest.exists():  # written before, under this name
        return
    times, labels = [], 0
    try:
        with new_file(path) as aside:
            with pq.ParquetWriter(aside, SCHEMA, compression="zstd") as writer:
                for rows in groups(rollouts, READ_ROWS):
                    writer.write_table(to_table(rows))
                    times += [r.created_at for r in rows]
                    labels += sum(len(r.labels) for r in rows)
            replaces = dict.fromkeys(
                name for shard in replaced for name in (shard.name, *shard.replaces)
            )
            shard = Shard(
                name=name,
                rollouts=len(times),
                labels=labels,
                bytes=aside.stat().st_size,
                sha256=sha256_file(aside),
                first=min(times, default=0.0),
                last=max(times, default=0.0),
                replaces=tuple(replaces),
            )
        write_atomically(manifest, json.dumps(asdict(shard), indent=2))
    except BaseException:  # a full disk must not be filled by what it refused
        if not manifest.exists():
            path.unlink(missing_ok=True)
        raise


def to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Raises one of pyarrow's or Python's errors where a value does not fit SCHEMA: `check_rollout`
    had a gap."""
    return pa.Table.from_pylist([asdict(r) for r in rollouts], schema=SCHEMA)


def present(folder: Path) -> list[Shard]:
    """The shards there are, in the order of their names.

    Raises:
        StoreError: a manifest is damaged or of another schema.
    """
    shards = [read_manifest(path) for path in sorted(folder.glob("shard-*.json"))]
    replaced = {name for s in shards for name in s.replaces}
    return [s for s in shards if s.name not in replaced]


def read_manifest(path: Path) -> Shard:
    """Raises StoreError: it is damaged or of another schema."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise StoreError(
                f"label shard {path.stem} has schema {content['schema_version']}, this program reads "
                f"{SCHEMA_VERSION}; keep old labels in a lake of their own"
            )
        return Shard(**content | {"replaces": tuple(content["replaces"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the manifest of label shard {path.stem} is damaged ({type(error).__name__}); s2t labels "
            "verify --quarantine moves such shards aside"
        ) from error


def read_shard(folder: Path, shard: Shard) -> Iterator[Rollout]:
    """Every row, copies too.

    Raises:
        StoreError: the file is missing, changed, or of another schema.
    """
    path = folder / f"{shard.name}.parquet"
    try:
        if sha256_file(path) != shard.sha256:
            raise StoreError(
                f"label shard {shard.name} does not match its manifest: it was changed or is damaged (s2t "
                "labels verify --quarantine moves such shards aside)"
            )
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(SCHEMA):
                raise StoreError(
                    f"label shard {shard.name} has another schema: {file.schema_arrow.names}"
                )
            for batch in file.iter_batches(batch_size=READ_ROWS):
                yield from map(Rollout.from_row, batch.to_pylist())
    except (
        OSError,
        TypeError,
        pa.ArrowException,
    ) as error:  # TypeError: a null where a list belongs
        raise StoreError(
            f"label shard {shard.name} is missing or cannot be read ({type(error).__name__})"
        ) from error


def read_rollouts(folder: Path, shards: Iterable[Shard]) -> Iterator[Rollout]:
    """The rollouts of `shards`, each once, each label in the first rollout that has it. To know
    what it has given already it holds about 60 bytes for each rollout and each label seen: 1 GB at
    some 16 million labels.

    Raises:
        StoreError: a shard is missing, changed, or of another schema.
    """
    labels: set[int] = set()
    for rollout in distinct(r for shard in shards for r in read_shard(folder, shard)):
        new: list[Label] = []
        for label in rollout.labels:
            if (key := hash(label.label_id)) not in labels:
                labels.add(key)
                new.append(label)
        yield rollout if len(new) == len(rollout.labels) else replace(rollout, labels=tuple(new))


def distinct(rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
    """Each rollout once, with all its labels."""
    seen: set[int] = set()  # hashes of 64 bits, rather than the texts
    for rollout in rollouts:
        if (key := hash(rollout.rollout_id)) not in seen:
            seen.add(key)
            yield rollout


def label_counts(folder: Path, shard: Shard, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Of every row the values of `columns`, then how many labels it has, copies too. Reads these
    columns only, so it does not notice a changed file as `read_shard` does.

    Raises:
        StoreError: the file is missing or cannot be read.
    """
    try:
        with pq.ParquetFile(folder / f"{shard.name}.parquet") as file:
            for batch in file.iter_batches(
                columns=[*columns, "labels.list.element.position"]
            ):  # one leaf of a label
                counts = pc.list_value_length(batch.column("labels"))
                yield from zip(
                    *(batch.column(name).to_pylist() for name in columns),
                    counts.to_pylist(),
                    strict=True,
                )
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StoreError(
            f"label shard {shard.name} is missing or cannot be read ({type(error).__name__})"
        ) from error


@dataclass(frozen=True)
class Snapshot:
    """Frozen shards: what a training run reads, however the lake goes on. The folder's name is the
    digest of what is in it: one that lost a part is no snapshot. Every method raises StoreError
    then."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def labels(self) -> int:
        """Before deduplication."""
        return sum(s.labels for s in self.shards())

    @property
    def whole(self) -> bool:
        try:
            return bool(self.shards())
        except StoreError:
            return False

    def shards(self) -> list[Shard]:
        """In the order of their names."""
        try:
            shards = present(self.folder)
            if content_digest(shards) == self.id and all(
                (self.folder / f"{s.name}.parquet").stat().st_size == s.bytes for s in shards
            ):
                return shards
            reason = "shards are missing"
        except (OSError, StoreError) as error:
            reason = str(error)
        raise StoreError(
            f"snapshot {self.id!r} is gone or incomplete (labels were deleted from it, or it grew old); "
            f"train on a new one ({reason})"
        )

    def pairs(self) -> Counter[tuple[str, str]]:
        """Labels, before deduplication, by the digests of the (SLM, LLM) they come from."""
        found = Counter[tuple[str, str]]()
        for shard in self.shards():
            for slm, llm, labels in label_counts(self.folder, shard, ("slm_digest", "llm_digest")):
                found[slm, llm] += labels
        return +found  # a rollout without labels makes no pair

    def rollouts(
        self, order: Callable[[list[Shard]], list[Shard]] = lambda shards: shards
    ) -> Iterator[Rollout]:
        """As `read_rollouts`; `order` may rearrange the shards."""
        return read_rollouts(self.folder, order(self.shards()))

    def remove(self) -> None:
        """Under its name it is there whole or not at all."""
        aside = self.folder.with_name(f".{uuid.uuid4().hex}")
        self.folder.rename(aside)
        shutil.rmtree(aside)


def content_digest(shards: Iterable[Shard]) -> str:
    """The name of a snapshot of these shards."""
    return hashlib.sha256(json.dumps([(s.name, s.sha256) for s in shards]).encode()).hexdigest()[
        :16
    ]


def groups(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    remaining = iter(rollouts)
    while group := list(islice(remaining, size)):
        yield group
