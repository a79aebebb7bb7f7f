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

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.files import locked, new_folder, write_atomically
from s2t_shared.labels.deletions import Deletion, read_deletions
from s2t_shared.labels.label import Rollout, check_rollout
from s2t_shared.labels.shards import (
    Shard,
    Snapshot,
    content_digest,
    distinct,
    groups,
    label_counts,
    present,
    read_manifest,
    read_rollouts,
    read_shard,
    write_shard,
)

SHARD_BYTES = 64 << 20  # of joined shards, at most, about
SHARD_ROLLOUTS = 8192  # of written shards, at most
DAY_S = 86_400.0
SNAPSHOT_S = 30 * DAY_S  # a snapshot keeps its shards' space that long after it was last frozen


class Lake:
    """The lake in one folder. Every method raises StoreError where the folder cannot be used."""

    def __init__(self, root: Path) -> None:
        self.root = root

    # -- writing and reading ----------------------------------------------------------------------

    def write(self, rollouts: Sequence[Rollout], name: str = "") -> None:
        """Write rollouts durably, in shards of bounded size.

        name: writing the same rollouts again under the same name changes nothing.

        Raises:
            StoreError: the folder cannot be written. Some shards may be there: write all again.
        """
        with self._locked(shared=True):
            deletions = self.deletions()
            kept = [r for r in rollouts if not any(d.matches(r) for d in deletions)]
            stamp = name or f"{time.strftime('%Y%m%dT%H%M%S')}-{_random_name(8)}"
            replaced: set[str] = set()
            if name:
                replaced.update(*(shard.replaces for shard in present(self.root)))
            for number, rows in enumerate(groups(kept, SHARD_ROLLOUTS)):
                part = f"{stamp}-{number}"
                if f"shard-{part}" in replaced:  # a replaced shard would not exist: another name
                    part = f"{part}-{_random_name(8)}"
                write_shard(self.root, part, rows)

    def shards(self) -> list[Shard]:
        """The shards that exist, in the order of their names.

        Raises:
            StoreError: a manifest is damaged or of another schema.
        """
        if not self.root.is_dir():
            return []
        with self._locked(shared=True):  # a rewrite is seen before or after, not halfway
            return present(self.root)

    def rollouts(self) -> Iterator[Rollout]:
        """Every rollout once, each label in the first one that has it.

        Raises:
            StoreError: a shard is missing, damaged, or was removed meanwhile.
        """
        return read_rollouts(self.root, self.shards())

    def labels_since(self, t: float) -> int:
        """Number of labels, duplicates included, of rollouts made after `t` (Unix seconds).

        Raises:
            StoreError: a manifest, or a shard with rollouts of both before and after, is damaged.
        """
        if not self.root.is_dir():
            return 0
        count = 0
        with self._locked(shared=True):
            for shard in present(self.root):
                if shard.first > t:
                    count += shard.labels
                elif shard.last > t:
                    for created_at, labels in label_counts(self.root, shard, ("created_at",)):
                        count += labels if created_at > t else 0
        return count

    # -- snapshots --------------------------------------------------------------------------------

    def freeze(self) -> Snapshot:
        """A snapshot of the shards that exist now. The same content gives the same snapshot.

        Raises:
            StoreError: the lake holds no labels.
        """
        with self._locked(shared=True):
            shards = present(self.root)
            if not any(shard.labels for shard in shards):
                raise StoreError(
                    f"no labels in the lake folder {self.root.name!r}; harvest first (s2t harvest)"
                )
            snapshot = self._snapshot(content_digest(shards))
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
        return Snapshot(self.root / "snapshots" / snapshot_id)

    def _link(self, shards: Sequence[Shard], snapshot: Snapshot) -> None:
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

    def verify(self) -> dict[str, str]:
        """Check hash, schema and values of every shard. Returns what is wrong by shard name."""
        wrong: dict[str, str] = {}
        if not self.root.is_dir():
            return wrong
        with self._locked(shared=True):
            for manifest in sorted(self.root.glob("shard-*.json")):
                try:
                    self._verify_shard(manifest)
                except S2TError as error:
                    wrong[manifest.stem] = str(error)
        return wrong

    def _verify_shard(self, manifest: Path) -> None:
        shard = read_manifest(manifest)
        if shard.name != manifest.stem:
            raise StoreError(f"its manifest names {shard.name!r}")
        for rollout in read_shard(self.root, shard):
            check_rollout(rollout)

    def quarantine(self, names: Iterable[str]) -> None:
        """Move bad shards to `quarantine/`, so that the others can be used."""
        with self._locked():
            self._sweep()
            quarantine = self.root / "quarantine"
            quarantine.mkdir(exist_ok=True)
            for name in names:
                # The manifest first: then the shard does not exist.
                for path in (self.root / f"{name}.json", self.root / f"{name}.parquet"):
                    if path.exists():
                        path.rename(quarantine / path.name)

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
            lines = [json.dumps(asdict(d)) for d in (*self.deletions(), deletion)]
            write_atomically(self.root / "deleted.jsonl", "\n".join(lines))
            removed = 0
            for shard in present(self.root):
                removed += _delete_from(self.root, shard, deletion)
            for manifest in sorted((self.root / "quarantine").glob("shard-*.json")):
                with suppress(StoreError):
                    removed += _delete_from(manifest.parent, read_manifest(manifest), deletion)
            self._keep_snapshots(lambda snapshot: not _holds_any(snapshot, deletion))
            return removed

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
            shards = present(self.root)
            removed = _prunable(shards, max_age_s, max_bytes)
            _remove(self.root, [shard.name for shard in removed])
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
            for shard in present(self.root):
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
        rows = (rollout for shard in batch for rollout in read_shard(self.root, shard))
        # Copies of a rollout go, copies of a label stay: deleting one rollout must not take
        # another's label.
        write_shard(self.root, f"{_random_name(12)}-0", distinct(rows), batch)
        _remove(self.root, [shard.name for shard in batch])
        return len(batch)

    # -- housekeeping -----------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove leftover files of crashes, and old snapshots.

        Under the exclusive lock no writer is alive. Replaced shards are removed first of all: if
        the shard that replaced them went before them, they would exist again. A damaged manifest
        does not stop the sweep, because `quarantine` sweeps too.
        """
        replaced: set[str] = set()
        for manifest in self.root.glob("shard-*.json"):
            with suppress(StoreError):
                replaced.update(read_manifest(manifest).replaces)
        existing = {path.stem for path in self.root.glob("shard-*")}
        _remove(self.root, replaced & existing)
        for path in [*self.root.glob("shard-*.parquet"), *self.root.glob(".shard-*")]:
            if not path.with_suffix(".json").exists():
                path.unlink()
        for leftover in (self.root / "snapshots").glob(".*/"):
            shutil.rmtree(leftover)
        for snapshot in self._snapshots():
            if time.time() - snapshot.folder.stat().st_mtime > SNAPSHOT_S:
                snapshot.remove()

    def _snapshots(self) -> list[Snapshot]:
        return [Snapshot(folder) for folder in (self.root / "snapshots").glob("[!.]*/")]

    def _newest_snapshot(self) -> Snapshot | None:
        return max(self._snapshots(), key=lambda s: s.folder.stat().st_mtime_ns, default=None)

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
            self.root.mkdir(parents=True, exist_ok=True)
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


def _holds_any(snapshot: Snapshot, deletion: Deletion) -> bool:
    for shard in snapshot.shards():
        if any(deletion.matches(rollout) for rollout in read_shard(snapshot.folder, shard)):
            return True
    return False


def _delete_from(folder: Path, shard: Shard, deletion: Deletion) -> int:
    """Replace a shard that holds deleted rollouts by one without them. Returns how many there
    were."""
    count = sum(deletion.matches(rollout) for rollout in read_shard(folder, shard))
    if count:
        kept = (r for r in read_shard(folder, shard) if not deletion.matches(r))
        write_shard(folder, f"{_random_name(12)}-0", kept, [shard])
        _remove(folder, [shard.name])
    return count


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)  # first: then the shard does not exist
        (folder / f"{name}.parquet").unlink(missing_ok=True)
