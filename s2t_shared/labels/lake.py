"""The Parquet lake: the folder where rollouts and their labels are kept.

    lake/
      shard-<name>.parquet   rollouts (columns of `label.Rollout`), zstd
      shard-<name>.json      its manifest, written last: a shard without one does not exist
      snapshots/<id>/        frozen shards (hard links); a training run names the snapshot it reads
      quarantine/            shards that `verify` found bad
      deleted.jsonl          what was deleted, as hashes; also keeps out what is still on its way
      runs/<id>/             plans and progress of harvests (services.harvest)

A shard is never changed. Compaction and deletion write a new shard whose manifest lists those it
`replaces`; from then on these do not exist, and are removed. After a crash at any moment the lake
has the old content or the new one. Leftover files of a crash are removed before the next rewrite.
Writers hold a shared lock for as long as one shard takes, rewriters an exclusive one.

The lake may hold several copies of a rollout (delivery is at least once). Readers see each rollout
and each label once. Knows rollouts and files; not Redis, not models.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.files import locked, new_folder, private_folder, write_atomically
from s2t_shared.labels.check import check_rows
from s2t_shared.labels.deletions import Deletion, read_deletions
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.places import Folder, Place
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.rows import LABEL_KEY, LABELS, SCHEMA, Rows
from s2t_shared.labels.shards import (
    FORMAT,
    Shard,
    content_digest,
    open_shard,
    present,
    read_manifest,
    write_shard,
)
from s2t_shared.labels.snapshots import FolderSnapshot, Snapshot

SHARD_BYTES = 64 << 20  # of joined shards, at most, about
SHARD_ROLLOUTS = 8192  # of written shards, at most
DAY_S = 86_400.0
SNAPSHOT_S = 30 * DAY_S  # a snapshot keeps its shards' space that long after it was last frozen


class Lake:
    """The lake in one folder. Every method raises StoreError where the folder cannot be used."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.place: Place = Folder(root)

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    @property
    def where(self) -> str:
        """The folder's path, or the URL."""
        return str(self._root)

    def _exists(self) -> bool:
        return self.root.is_dir()

    # -- writing and reading ----------------------------------------------------------------------

    def write(self, rollouts: Rows | Sequence[Rollout], name: str = "") -> None:
        """Write rollouts durably, in shards of bounded size.

        name: writing the same rollouts again under the same name changes nothing.

        Raises:
            StoreError: the folder cannot be written. Some shards may be there: write all again.
        """
        rows = rollouts if isinstance(rollouts, Rows) else Rows.of(rollouts)
        with self._locked(shared=True):
            for deletion in self.deletions():
                rows = rows.where(~deletion.matches(rows))
            stamp = name or f"{time.strftime('%Y%m%dT%H%M%S')}-{_random_name(8)}"
            replaced: set[str] = set()
            if name:
                replaced.update(*(shard.replaces for shard in present(self.place)))
            for number, start in enumerate(range(0, len(rows), SHARD_ROLLOUTS)):
                part = f"{stamp}-{number}"
                if f"shard-{part}" in replaced:  # a replaced shard would not exist: another name
                    part = f"{part}-{_random_name(8)}"
                length = min(SHARD_ROLLOUTS, len(rows) - start)
                write_shard(self.place, part, [rows.slice(start, length)])

    def shards(self) -> list[Shard]:
        """The shards that exist, in the order of their names.

        Raises:
            StoreError: a manifest is damaged or of another schema.
        """
        if not self._exists():
            return []
        with self._locked(shared=True):  # a rewrite is seen before or after, not halfway
            return present(self.place)

    def rollouts(self) -> Iterator[Rollout]:
        """Every rollout once, each label in the first one that has it.

        Raises:
            StoreError: a shard is missing, damaged, or was removed meanwhile.
        """
        yield from self.reader().rollouts()

    def reader(self) -> Reader:
        """Reads the lake by columns.

        Raises:
            StoreError: as `rollouts`.
        """
        return Reader(self.place, self.shards())

    def rollouts_with(self, field: str, value: str) -> tuple[int, int]:
        """Number of rollouts whose `field` is `value`, and of their labels; of copies one counts.

        Raises:
            StoreError: as `rollouts`.
        """
        found: dict[int, int] = {}
        for shard in self.shards():
            with open_shard(self.place, shard) as file:
                rows = file.read([field, "rollout_id", f"{LABELS}.{LABEL_KEY}"])
            rows = rows.where(rows.equal(field, value))
            found |= zip(rows.keys("rollout_id").tolist(), rows.label_counts.tolist(), strict=True)
        return len(found), sum(found.values())

    def labels_since(self, t: float) -> int:
        """Number of labels, duplicates included, of rollouts made after `t` (Unix seconds).

        Raises:
            StoreError: a manifest, or a shard with rollouts of both before and after, is damaged.
        """
        if not self._exists():
            return 0
        count = 0
        with self._locked(shared=True):
            for shard in present(self.place):
                if shard.first > t:
                    count += shard.labels
                elif shard.last > t:
                    with open_shard(self.place, shard) as file:
                        rows = file.read(["created_at", f"{LABELS}.{LABEL_KEY}"])
                    count += int(rows.label_counts[rows.numbers("created_at") > t].sum())
        return count

    # -- snapshots --------------------------------------------------------------------------------

    def freeze(self) -> Snapshot:
        """A snapshot of the shards that exist now. The same content gives the same snapshot.

        Raises:
            StoreError: the lake holds no labels.
        """
        with self._locked(shared=True):
            shards = present(self.place)
            if not any(shard.labels for shard in shards):
                raise StoreError(
                    f"no labels in the lake {self.where!r}; harvest first (s2t harvest)"
                )
            return self._freeze(shards)

    def _freeze(self, shards: Sequence[Shard]) -> Snapshot:
        snapshot = FolderSnapshot(self.root / "snapshots" / content_digest(shards))
        if not snapshot.is_complete:
            self._link(shards, snapshot)
        os.utime(snapshot.folder)  # its time begins anew
        return snapshot

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """An existing snapshot.

        Raises:
            StoreError: it is gone or incomplete.
        """
        snapshot = self._snapshot(snapshot_id)
        snapshot.shards()
        return snapshot

    def _snapshot(self, snapshot_id: str) -> Snapshot:
        return FolderSnapshot(self.root / "snapshots" / snapshot_id)

    def _link(self, shards: Sequence[Shard], snapshot: FolderSnapshot) -> None:
        if snapshot.folder.is_dir() and not snapshot.is_complete:
            snapshot.remove()
        # FileExistsError: another process froze the same content meanwhile.
        with suppress(FileExistsError), new_folder(snapshot.folder) as temporary:
            for shard in shards:
                for name in (f"{shard.name}.parquet", f"{shard.name}.json"):
                    try:
                        os.link(self.root / name, temporary / name)
                    except OSError:  # a file system without links
                        shutil.copy2(self.root / name, temporary / name)

    # -- damage -----------------------------------------------------------------------------------

    def verify(self, values: bool = False) -> dict[str, str]:
        """Check hash and schema of every shard. Returns what is wrong by shard name.

        values: decode and check every value too. They were checked before the shard was written,
        and the hash says that it still is what was written.
        """
        wrong: dict[str, str] = {}
        if not self._exists():
            return wrong
        with self._locked(shared=True):
            for name in self.place.names(".json"):
                try:
                    self._verify_shard(name, values)
                except S2TError as error:
                    wrong[name] = str(error)
        return wrong

    def _verify_shard(self, name: str, values: bool) -> None:
        shard = read_manifest(self.place, name)
        if shard.name != name:
            raise StoreError(f"its manifest names {shard.name!r}")
        with open_shard(self.place, shard, whole=True) as file:
            if values:
                for group in range(len(file.group_rows)):
                    check_rows(file.read(SCHEMA.names, [group]))

    def quarantine(self, names: Iterable[str]) -> None:
        """Move bad shards to `quarantine/`, so that the others can be used."""
        with self._locked():
            self._sweep()
            for name in names:
                # The manifest first: then the shard does not exist.
                for file in (f"{name}.json", f"{name}.parquet"):
                    self._put_aside(file)

    def _put_aside(self, file: str) -> None:
        quarantine = self.root / "quarantine"
        quarantine.mkdir(exist_ok=True)
        if (self.root / file).exists():
            (self.root / file).rename(quarantine / file)

    @property
    def quarantined(self) -> Place:
        """Where bad shards lie."""
        return Folder(self.root / "quarantine")

    # -- deletion ---------------------------------------------------------------------------------

    def deletions(self) -> list[Deletion]:
        """What was deleted, and must not come back.

        Raises:
            StoreError: a line of the file is damaged.
        """
        return read_deletions(self.root / "deleted.jsonl")

    def delete(self, field: str, value: str) -> int:
        """Delete every rollout whose `field` ("problem_id", "request_id", "task") is `value`.

        Deletes in shards, in snapshots, in quarantine, and what is still on its way here. Snapshots
        that hold any of it are removed, and so are unreadable ones. What cannot be read in
        quarantine stays: remove that folder by hand. Deleting again finishes what a crash
        interrupted. Returns the number of rollouts removed from shards.

        Raises:
            StoreError: a shard is damaged: quarantine it (s2t labels verify --quarantine) and
                delete again.
        """
        with self._locked():
            self._sweep()
            deletion = Deletion.of(field, value)
            self._record(deletion)
            doomed = Doomed(deletion, value)
            removed = sum(doomed.remove_from(self.place, s) for s in present(self.place))
            quarantine = self.quarantined
            for name in quarantine.names(".json"):
                with suppress(StoreError):
                    removed += doomed.remove_from(quarantine, read_manifest(quarantine, name))
            self._keep_snapshots(lambda snapshot: not doomed.is_in(snapshot))
            return removed

    def _record(self, deletion: Deletion) -> None:
        lines = [json.dumps(asdict(d)) for d in (*self.deletions(), deletion)]
        write_atomically(self.root / "deleted.jsonl", "\n".join(lines))

    # -- retention --------------------------------------------------------------------------------

    def prunable(self, max_age_s: float = 0.0, max_bytes: int = 0) -> list[Shard]:
        """The shards that `prune` would remove, oldest first."""
        return _prunable(self.shards(), max_age_s, max_bytes)

    def prune(self, max_age_s: float = 0.0, max_bytes: int = 0) -> int:
        """Remove whole shards whose newest rollout is older than `max_age_s`, then the oldest ones
        beyond `max_bytes` (0: no limit). Returns the number of rollouts removed.

        Snapshots that hold something too old are removed. Where there was too much, so are those
        that keep removed shards on disk, but for the newest, which a training run may be reading.
        """
        with self._locked():
            self._sweep()
            shards = present(self.place)
            removed = _prunable(shards, max_age_s, max_bytes)
            self._retire(removed)
            remaining = {s.name for s in shards} - {s.name for s in removed}
            oldest = _oldest(max_age_s)
            was_too_much = any(shard.last >= oldest for shard in removed)
            newest = self._newest_snapshot()

            def keeps(snapshot: Snapshot) -> bool:
                held = snapshot.shards()
                if any(shard.last < oldest for shard in held):
                    return False
                holds_removed = any(shard.name not in remaining for shard in held)
                return not (was_too_much and holds_removed and snapshot != newest)

            self._keep_snapshots(keeps)
            return sum(shard.rollouts for shard in removed)

    def compact(self, least: int = 16) -> int:
        """Join the small shards of a day once there are `least` of them. Returns how many were
        joined.

        Only of one day (UTC, of the newest rollout): rollouts that grow old on different days must
        be removable on different days.
        """
        with self._locked():
            self._sweep()
            days: dict[float, list[Shard]] = defaultdict(list)
            for shard in present(self.place):
                if shard.bytes < SHARD_BYTES // 8:
                    days[shard.last // DAY_S].append(shard)
            joined = 0
            for small in days.values():
                if len(small) >= least:
                    joined += self._join(small)
            return joined

    def _join(self, shards: Sequence[Shard]) -> int:
        """Join as many of the first shards as one shard may hold; returns how many."""
        batch: list[Shard] = []
        size = 0
        for shard in shards:
            size += shard.bytes
            if size >= SHARD_BYTES:
                break
            batch.append(shard)
        # Copies of a rollout go, copies of a label stay: deleting one rollout must not take
        # another's label.
        self._rewrite(batch)
        return len(batch)

    def _rewrite(self, shards: Sequence[Shard]) -> None:
        """Replace shards by one that holds the same, each rollout once."""
        reader = Reader(self.place, shards, copies=True)
        tables = (rows for number in range(len(shards)) for rows in reader.tables(number))
        write_shard(self.place, f"{_random_name(12)}-0", tables, shards)
        self._retire(shards)

    def _retire(self, shards: Iterable[Shard]) -> None:
        """Remove shards from the lake; snapshots keep theirs."""
        _remove(self.place, [shard.name for shard in shards])

    def migrate(self) -> int:
        """Rewrite the shards of an older format. Returns how many.

        Nothing needs it: older shards are read as they are, but more slowly.

        Raises:
            StoreError: a shard is damaged: quarantine it, and migrate again.
        """
        with self._locked():
            self._sweep()
            older = [shard for shard in present(self.place) if shard.schema_version < FORMAT]
            for shard in older:
                self._rewrite([shard])
            return len(older)

    # -- housekeeping -----------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove leftover files of crashes, and old snapshots.

        Under the exclusive lock no writer is alive. Replaced shards are removed first of all: if
        the shard that replaced them went before them, they would exist again. A damaged manifest
        does not stop the sweep, because `quarantine` sweeps too.
        """
        replaced: set[str] = set()
        for name in self.place.names(".json"):
            with suppress(StoreError):
                replaced.update(read_manifest(self.place, name).replaces)
        existing = {path.stem for path in self.root.glob("shard-*")}
        _remove(self.place, replaced & existing)
        for path in [*self.root.glob("shard-*.parquet"), *self.root.glob(".shard-*")]:
            if not path.with_suffix(".json").exists():
                path.unlink()
        for leftover in (self.root / "snapshots").glob(".*/"):
            shutil.rmtree(leftover)
        for snapshot in self._snapshots():
            if time.time() - snapshot.used_at > SNAPSHOT_S:
                snapshot.remove()

    def _snapshots(self) -> Sequence[Snapshot]:
        return [FolderSnapshot(folder) for folder in (self.root / "snapshots").glob("[!.]*/")]

    def _newest_snapshot(self) -> Snapshot | None:
        return max(self._snapshots(), key=lambda s: s.used_at, default=None)

    def _keep_snapshots(self, keeps: Callable[[Snapshot], bool]) -> None:
        """Remove the snapshots that `keeps` denies, and unreadable ones: nobody can train on them,
        and they must not hold up retention."""
        for snapshot in self._snapshots():
            try:
                kept = keeps(snapshot)
            except StoreError:
                kept = False
            if not kept:
                snapshot.remove()

    @contextmanager
    def _locked(self, shared: bool = False) -> Iterator[None]:
        try:
            private_folder(self.root)
            with locked(self.root / ".lock", shared):
                yield
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(
                f"the lake folder {self.root.name!r} cannot be used: {reason}; free or grant "
                "space there"
            ) from error


def _random_name(digits: int) -> str:
    return uuid.uuid4().hex[:digits]


def _oldest(max_age_s: float) -> float:
    """Unix seconds: what is older is too old; 0 for no limit."""
    return time.time() - max_age_s if max_age_s else 0.0


def _prunable(shards: Iterable[Shard], max_age_s: float, max_bytes: int) -> list[Shard]:
    oldest = _oldest(max_age_s)
    by_age = sorted(shards, key=lambda shard: (shard.last, shard.name))
    excess = sum(shard.bytes for shard in by_age) - max_bytes if max_bytes else 0
    found = []
    for shard in by_age:
        if excess > 0 or shard.last < oldest:
            found.append(shard)
            excess -= shard.bytes
    return found


class Doomed:
    """The rollouts that a deletion is about. Searches two columns of a shard, and rewrites only
    those that hold one.

    value: of the field, where it is known; it need not be hashed then.
    """

    def __init__(self, deletion: Deletion, value: str | None = None) -> None:
        self._deletion = deletion
        self._value = value
        self._counts: dict[str, int] = {}  # by hash of a shard's file: snapshots hold the same ones

    def _matches(self, rows: Rows) -> np.ndarray:
        if self._value is None:
            return self._deletion.matches(rows)
        found: np.ndarray = rows.equal(self._deletion.field, self._value)
        return found & (rows.numbers("created_at") <= self._deletion.at)

    def _count(self, place: Place, shard: Shard) -> int:
        if shard.sha256 not in self._counts:
            with open_shard(place, shard) as file:
                found = self._matches(file.read([self._deletion.field, "created_at"]))
            self._counts[shard.sha256] = int(found.sum())
        return self._counts[shard.sha256]

    def remove_from(self, place: Place, shard: Shard) -> int:
        """Replace a shard that holds any by one without them. Returns how many there were."""
        count = self._count(place, shard)
        if count:
            write_shard(place, f"{_random_name(12)}-0", self._others(place, shard), [shard])
            _remove(place, [shard.name])
        return count

    def _others(self, place: Place, shard: Shard) -> Iterator[Rows]:
        with open_shard(place, shard, whole=True) as file:
            for group in range(len(file.group_rows)):
                rows = file.read(SCHEMA.names, [group])
                yield rows.where(~self._matches(rows))

    def is_in(self, snapshot: Snapshot) -> bool:
        return any(self._count(snapshot.place, shard) for shard in snapshot.shards())


def _remove(place: Place, names: Iterable[str]) -> None:
    for name in names:
        place.remove(f"{name}.json")  # first: then the shard does not exist
        place.remove(f"{name}.parquet")
