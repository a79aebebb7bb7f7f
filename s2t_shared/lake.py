"""The Parquet lake: where rollouts and their labels rest.

    lake/
      shard-<name>.parquet   rollouts (SCHEMA), zstd
      shard-<name>.json      its manifest, written last: a shard without one does not exist
      snapshots/<id>/        frozen shards (hard links); a training run names the snapshot it reads
      deleted.jsonl          what was deleted, as hashes: also keeps out what is still on its way here
      runs/<id>/             plans and progress of harvests (services.harvest)

A shard is never changed. What is rewritten (compaction, deletion) is a new shard whose manifest lists those it
`replaces`; from then on they do not exist, and are removed. A crash at any moment leaves the old or the new content.
Writers hold a shared lock for as long as one shard takes, rewriting an exclusive one.

Several copies of a rollout may rest here (delivery is at least once): readers see each rollout and each label once.
Knows rollouts and files; not Redis, not models.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2t_shared.errors import StoreError
from s2t_shared.files import sha256_file, sync_folder, write_atomically
from s2t_shared.labels import SCHEMA_VERSION, Label, Rollout

LABEL_TYPE = pa.struct([
    ("label_id", pa.string()), ("position", pa.int32()), ("candidate_ids", pa.list_(pa.int32())),
    ("slm_log_probs", pa.list_(pa.float32())), ("llm_log_probs", pa.list_(pa.float32())), ("llm_top_id", pa.int32()),
    ("llm_top_rank", pa.int32()), ("mass", pa.float32()), ("kl", pa.float32()), ("entropy", pa.float32())])
SCHEMA = pa.schema(
    [("rollout_id", pa.string()), ("request_id", pa.string()), ("problem_id", pa.string()), ("task", pa.string()),
     ("split", pa.string()), ("source", pa.string()), ("token_ids", pa.list_(pa.int32())),
     ("prompt_length", pa.int32()), ("entropy", pa.list_(pa.float32())), ("kl", pa.list_(pa.float32())),
     ("llm_top_rank", pa.list_(pa.int16())), ("labels", pa.list_(LABEL_TYPE)), ("slm_digest", pa.string()),
     ("llm_digest", pa.string()), ("tokenizer_digest", pa.string()), ("template_digest", pa.string()),
     ("created_at", pa.float64()), ("schema_version", pa.int32())],
    metadata={"s2t_schema_version": str(SCHEMA_VERSION)})
SHARD_BYTES, SHARD_ROLLOUTS = 64 << 20, 8192  # at most, about: when joined, when written
ORPHAN_S = 3600.0  # a file without a manifest is a crash's after so long, not a writer's
SNAPSHOT_S = 30 * 86_400.0  # a snapshot holds its shards' space that long
READ_ROWS = 256  # a row group; in memory at a time


@dataclass(frozen=True)
class Shard:
    """One shard's manifest. `first`, `last`: when its oldest and newest rollouts were made, Unix seconds."""

    name: str
    rollouts: int
    labels: int
    bytes: int
    sha256: str
    first: float
    last: float
    replaces: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Deletion:
    """What to delete: the rollouts made until `at` whose `field` ("problem_id", "request_id" or "task") has a value
    with this SHA-256."""

    field: str
    sha256: str
    at: float

    @classmethod
    def of(cls, field: str, value: str) -> Deletion:
        assert field in ("problem_id", "request_id", "task")
        return cls(field, hashlib.sha256(value.encode()).hexdigest(), time.time())

    def matches(self, rollout: Rollout) -> bool:
        value: str = getattr(rollout, self.field)
        return rollout.created_at <= self.at and hashlib.sha256(value.encode()).hexdigest() == self.sha256


class Lake:
    """The lake in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, rollouts: Sequence[Rollout], name: str = "") -> None:
        """Write rollouts durably, in shards of bounded size. With a `name`, writing the same again changes nothing.

        Raises:
            StoreError: the folder cannot be written. A shard is visible whole or not at all: write all again.
        """
        with self._locked(fcntl.LOCK_SH):
            deletions = self.deletions()
            kept = [r for r in rollouts if not any(d.matches(r) for d in deletions)]
            stamp = name or f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
            replaced = {r for s in _present(self.root) for r in s.replaces} if name else set()
            for part, rows in enumerate(_groups(kept, SHARD_ROLLOUTS)):
                # What was replaced does not exist, whoever writes it again.
                again = f"-{uuid.uuid4().hex[:8]}" if f"shard-{stamp}-{part}" in replaced else ""
                self._write_shard(f"{stamp}-{part}{again}", rows)

    def _write_shard(self, stamp: str, rollouts: Iterable[Rollout], replaces: tuple[str, ...] = ()) -> None:
        name = f"shard-{stamp}"
        path, manifest = self.root / f"{name}.parquet", self.root / f"{name}.json"
        if manifest.exists():  # written before, under this name
            return
        aside = self.root / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
        times, labels = [], 0
        try:
            with pq.ParquetWriter(aside, SCHEMA, compression="zstd") as writer:
                for rows in _groups(rollouts, READ_ROWS):
                    writer.write_table(pa.Table.from_pylist([asdict(r) for r in rows], schema=SCHEMA))
                    times += [r.created_at for r in rows]
                    labels += sum(len(r.labels) for r in rows)
            with aside.open("rb+") as stream:
                os.fsync(stream.fileno())
            shard = Shard(name, len(times), labels, aside.stat().st_size, sha256_file(aside), min(times, default=0.0),
                          max(times, default=0.0), replaces)
            aside.replace(path)
            write_atomically(manifest, json.dumps(asdict(shard), indent=2))
        except BaseException:  # a full disk must not be filled by what it refused
            aside.unlink(missing_ok=True)
            if not manifest.exists():
                path.unlink(missing_ok=True)
            raise

    def shards(self) -> list[Shard]:
        """The shards there are, in the order of their names.

        Raises:
            StoreError: a manifest is damaged or of another schema.
        """
        if not self.root.is_dir():
            return []
        with self._locked(fcntl.LOCK_SH):  # a rewrite is seen before or after, not halfway
            return _present(self.root)

    def rollouts(self) -> Iterator[Rollout]:
        """Every rollout once, each label in the first one that has it.

        Raises:
            StoreError: a shard is missing, damaged, or was removed meanwhile.
        """
        return read_rollouts(self.root, self.shards())

    def freeze(self) -> Snapshot:
        """A snapshot of the shards there are now. The same content gives the same snapshot.

        Raises:
            StoreError: the lake holds no labels.
        """
        with self._locked(fcntl.LOCK_SH):
            shards = _present(self.root)
            if not sum(s.labels for s in shards):
                raise StoreError(f"no labels in the lake folder {self.root.name!r}; harvest first (s2t harvest)")
            digest = hashlib.sha256(json.dumps([(s.name, s.sha256) for s in shards]).encode()).hexdigest()[:16]
            folder, aside = self.root / "snapshots" / digest, self.root / "snapshots" / f".{uuid.uuid4().hex}"
            if not folder.is_dir():
                aside.mkdir(parents=True)
                for shard in shards:
                    for suffix in (".parquet", ".json"):
                        _link(self.root / f"{shard.name}{suffix}", aside / f"{shard.name}{suffix}")
                try:
                    aside.rename(folder)
                except OSError:  # another froze the same meanwhile
                    shutil.rmtree(aside)
                sync_folder(folder.parent)
            return Snapshot(folder)

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """Raises StoreError: there is no such snapshot any more."""
        folder = self.root / "snapshots" / snapshot_id
        if not folder.is_dir():
            raise StoreError(f"snapshot {snapshot_id!r} is gone (labels were deleted from it, or it grew old); train "
                             "on a new one")
        return Snapshot(folder)

    def verify(self) -> dict[str, str]:
        """What is wrong with which shard: hash, schema or values. Empty when all is well."""
        wrong: dict[str, str] = {}
        for manifest in sorted(self.root.glob("shard-*.json")):
            try:
                shard = _read_manifest(manifest)
                for _ in _read_shard(self.root, shard):
                    pass
                if shard.name != manifest.stem:
                    wrong[manifest.stem] = f"its manifest names {shard.name!r}"
            except StoreError as error:
                wrong[manifest.stem] = str(error)
        return wrong

    def quarantine(self, names: Iterable[str]) -> None:
        """Move bad shards aside, to `quarantine/`, so that the others can be used."""
        (self.root / "quarantine").mkdir(exist_ok=True)
        with self._locked(fcntl.LOCK_EX):
            for name in names:
                for suffix in (".json", ".parquet"):  # the manifest first: then the shard does not exist
                    if (path := self.root / f"{name}{suffix}").exists():
                        path.rename(self.root / "quarantine" / path.name)

    def deletions(self) -> list[Deletion]:
        try:
            lines = (self.root / "deleted.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [Deletion(**json.loads(line)) for line in lines if line.endswith("}")]  # a torn last line was no promise

    def delete(self, field: str, value: str) -> int:
        """Delete every rollout whose `field` ("problem_id", "request_id", "task") is `value`, here, in snapshots, and
        on its way here. Returns how many rollouts were removed from shards; doing it again finishes what a crash
        interrupted."""
        with self._locked(fcntl.LOCK_EX):
            deletion = Deletion.of(field, value)
            with (self.root / "deleted.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(("\n" if stream.tell() else "") + json.dumps(asdict(deletion)))
                stream.flush()
                os.fsync(stream.fileno())
            sync_folder(self.root)
            removed, affected = 0, []
            for shard in _present(self.root):
                if gone := sum(map(deletion.matches, _read_shard(self.root, shard))):
                    removed += gone
                    affected.append(shard.name)
                    kept = (r for r in _read_shard(self.root, shard) if not deletion.matches(r))
                    self._write_shard(f"{uuid.uuid4().hex[:12]}-0", kept, (shard.name,))
            for folder in (self.root / "snapshots").glob("*"):
                if any(deletion.matches(r) for s in _present(folder) for r in _read_shard(folder, s)):
                    shutil.rmtree(folder)
            self._remove(affected)
            self._sweep()
            return removed

    def prune(self, max_age_s: float = 0.0, max_bytes: int = 0) -> int:
        """Retention: remove whole shards whose newest rollout is older than `max_age_s`, then the oldest ones beyond
        `max_bytes` (0: no limit), and snapshots that hold any of them. Returns the rollouts removed."""
        with self._locked(fcntl.LOCK_EX):
            oldest = time.time() - max_age_s if max_age_s else 0.0
            shards = sorted(_present(self.root), key=lambda s: (s.last, s.name))
            over = sum(s.bytes for s in shards) - max_bytes if max_bytes else 0
            gone = []
            for shard in shards:
                if over > 0 or shard.last < oldest:
                    gone.append(shard)
                    over -= shard.bytes
            names = {s.name for s in gone}
            self._remove(sorted(names))
            for folder in (self.root / "snapshots").glob("*"):
                if any(s.name in names or s.last < oldest for s in _present(folder)):
                    shutil.rmtree(folder)
            self._sweep()
            return sum(s.rollouts for s in gone)

    def compact(self, least: int = 16) -> int:
        """Join small shards once there are `least` of them; returns how many were joined."""
        with self._locked(fcntl.LOCK_EX):
            small = [s for s in _present(self.root) if s.bytes < SHARD_BYTES // 8]
            if len(small) < least:
                return 0
            sizes = accumulate(s.bytes for s in small)
            batch = [s for s, size in zip(small, sizes, strict=True) if size < SHARD_BYTES]
            # Copies of a rollout go; copies of a label stay: deleting one rollout must not take another's labels.
            rows = _distinct(r for shard in batch for r in _read_shard(self.root, shard))
            self._write_shard(f"{uuid.uuid4().hex[:12]}-0", rows, tuple(s.name for s in batch))
            self._remove([s.name for s in batch])
            self._sweep()
            return len(batch)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            (self.root / f"{name}.json").unlink(missing_ok=True)  # first: then the shard does not exist
            (self.root / f"{name}.parquet").unlink(missing_ok=True)

    def _sweep(self) -> None:
        """What a crash has left: replaced shards, and files that never got their manifest."""
        present = {s.name for s in _present(self.root)}
        self._remove([p.stem for p in self.root.glob("shard-*.json") if p.stem not in present])
        for path in [*self.root.glob("shard-*.parquet"), *self.root.glob(".shard-*")]:
            if path.stem not in present and time.time() - path.stat().st_mtime > ORPHAN_S:
                path.unlink(missing_ok=True)
        for folder in (self.root / "snapshots").glob("*"):
            if folder.name.startswith(".") or time.time() - folder.stat().st_mtime > SNAPSHOT_S:
                shutil.rmtree(folder)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Released when the process dies, however it dies."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / ".lock").open("w") as stream:
                fcntl.flock(stream, kind)
                yield
        except OSError as error:
            raise StoreError(f"the lake folder {self.root.name!r} cannot be used: {error.strerror or error}; free or "
                             "grant space there") from error


@dataclass(frozen=True)
class Snapshot:
    """Frozen shards: what a training run reads, however the lake goes on."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def labels(self) -> int:
        """Before deduplication."""
        return sum(s.labels for s in _present(self.folder))

    def rollouts(self, order: Callable[[list[Shard]], list[Shard]] = lambda shards: shards) -> Iterator[Rollout]:
        """As `Lake.rollouts`; `order` may rearrange the shards."""
        return read_rollouts(self.folder, order(_present(self.folder)))


def read_rollouts(folder: Path, shards: Iterable[Shard]) -> Iterator[Rollout]:
    """The rollouts of `shards`, each once, each label in the first rollout that has it.

    Raises:
        StoreError: a shard is missing, changed, or of another schema.
    """
    labels: set[int] = set()
    for rollout in _distinct(r for shard in shards for r in _read_shard(folder, shard)):
        new: list[Label] = []
        for label in rollout.labels:
            if (key := hash(label.label_id)) not in labels:
                labels.add(key)
                new.append(label)
        yield rollout if len(new) == len(rollout.labels) else replace(rollout, labels=tuple(new))


def _distinct(rollouts: Iterable[Rollout]) -> Iterator[Rollout]:
    seen: set[int] = set()  # hashes of 64 bits, rather than the texts
    for rollout in rollouts:
        if (key := hash(rollout.rollout_id)) not in seen:
            seen.add(key)
            yield rollout


def _read_shard(folder: Path, shard: Shard) -> Iterator[Rollout]:
    path = folder / f"{shard.name}.parquet"
    try:
        if sha256_file(path) != shard.sha256:
            raise StoreError(f"label shard {shard.name} does not match its manifest: it was changed or is damaged (s2t "
                             "labels verify --quarantine moves such shards aside)")
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.names != SCHEMA.names:
                raise StoreError(f"label shard {shard.name} has another schema: {file.schema_arrow.names}")
            for batch in file.iter_batches(batch_size=READ_ROWS):
                yield from map(Rollout.from_row, batch.to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"label shard {shard.name} is missing or cannot be read ({type(error).__name__})") from error


def _present(folder: Path) -> list[Shard]:
    shards = [_read_manifest(path) for path in sorted(folder.glob("shard-*.json"))]
    replaced = {name for s in shards for name in s.replaces}
    return [s for s in shards if s.name not in replaced]


def _read_manifest(path: Path) -> Shard:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise StoreError(f"label shard {path.stem} has schema {content['schema_version']}, this program reads "
                             f"{SCHEMA_VERSION}; keep old labels in a lake of their own")
        return Shard(**content | {"replaces": tuple(content["replaces"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"the manifest of label shard {path.stem} is damaged ({type(error).__name__}); s2t labels "
                         "verify --quarantine moves such shards aside") from error


def _groups(rollouts: Iterable[Rollout], size: int) -> Iterator[list[Rollout]]:
    remaining = iter(rollouts)
    while group := list(islice(remaining, size)):
        yield group


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
