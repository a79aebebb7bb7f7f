"""The Parquet lake: where rollouts and their labels rest.

    lake/ shard-<name>.parquet   rollouts (shards.SCHEMA), zstd shard-<name>.json      its manifest,
      written last: a shard without one does not exist snapshots/<id>/        frozen shards (hard
      links); a training run names the snapshot it reads quarantine/            shards that `verify`
      found bad deleted.jsonl          what was deleted, as hashes: also keeps out what is still on
      its way here runs/<id>/             plans and progress of harvests (services.harvest)

A shard is never changed. What is rewritten (compaction, deletion) is a new shard whose manifest
lists those it `replaces`; from then on they do not exist, and are removed. A crash at any moment
leaves the old or the new content: what it has left over goes before anything else is rewritten or
removed. Writers hold a shared lock for as long as one shard takes, rewriting an exclusive one.

Several copies of a rollout may rest here (delivery is at least once): readers see each rollout and
each label once. Knows rollouts and files; not Redis, not models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.files import locked, new_folder, write_atomically
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

__all__ = ["Deletion", "Lake", "Shard", "Snapshot"]

SHARD_BYTES, SHARD_ROLLOUTS = 64 << 20, 8192  # at most, about: when joined, when written
DAY_S = 86_400.0
SNAPSHOT_S = 30 * DAY_S  # a snapshot holds its shards' space that long after it was last frozen
DELETABLE = ("problem_id", "request_id", "task")


@dataclass(frozen=True)
class Deletion:
    """What to delete: the rollouts made until `at` (Unix seconds) whose `field` (one of DELETABLE)
    has a value with this SHA-256."""

    field: str
    sha256: str
    at: float

    @classmethod
    def of(cls, field: str, value: str) -> Deletion:
        assert field in DELETABLE
        return cls(field, hashlib.sha256(value.encode()).hexdigest(), time.time())

    def matches(self, rollout: Rollout) -> bool:
        value: str = getattr(rollout, self.field)
        return (
            rollout.created_at <= self.at
            and hashlib.sha256(value.encode()).hexdigest() == self.sha256
        )


class Lake:
    """The lake in one folder. Every method raises StoreError where the folder cannot be used."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, rollouts: Sequence[Rollout], name: str = "") -> None:
        """Write rollouts durably, in shards of bounded size. With a `name`, writing the same again
        changes nothing.

        Raises: StoreError: the folder cannot be written. A shard is visible whole or not at all:
            write all again.
        """
        with self._locked(shared=True):
            deletions = self.deletions()
            kept = [r for r in rollouts if not any(d.matches(r) for d in deletions)]
            stamp = name or f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
            replaced = {r for s in present(self.root) for r in s.replaces} if name else set()
            for part, rows in enumerate(groups(kept, SHARD_ROLLOUTS)):
                # What was replaced does not exist, whoever writes it again.
                again = f"-{uuid.uuid4().hex[:8]}" if f"shard-{stamp}-{part}" in replaced else ""
                write_shard(self.root, f"{stamp}-{part}{again}", rows)

    def shards(self) -> list[Shard]:
        """The shards there are, in the order of their names.

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
        """How many labels, before deduplication, belong to rollouts made after `t` (Unix seconds).

        Raises:
            StoreError: a manifest, or a shard with rollouts of both before and after, is damaged.
        """
        if not self.root.is_dir():
            return 0
        with self._locked(shared=True):
            shards = present(self.root)
            return sum(s.labels for s in shards if s.first > t) + sum(
                labels
                for s in shards
                if s.first <= t < s.last
                for created_at, labels in label_counts(self.root, s, ("created_at",))
                if created_at > t
            )

    def freeze(self) -> Snapshot:
        """A snapshot of the shards there are now. The same content gives the same snapshot.

        Raises:
            StoreError: the lake holds no labels.
        """
        with self._locked(shared=True):
            shards = present(self.root)
            if not sum(s.labels for s in shards):
                raise StoreError(
                    f"no labels in the lake folder {self.root.name!r}; harvest first (s2t harvest)"
                )
            snapshot = Snapshot(self.root / "snapshots" / content_digest(shards))
            if not snapshot.whole:
                self._link(shards, snapshot)
            os.utime(snapshot.folder)  # it is wanted from now on
            return snapshot

    def _link(self, shards: Sequence[Shard], snapshot: Snapshot) -> None:
        if snapshot.folder.is_dir() and not snapshot.whole:
            snapshot.remove()
        with (
            suppress(FileExistsError),
            new_folder(snapshot.folder) as aside,
        ):  # another froze the same meanwhile
            for shard in shards:
                for name in (f"{shard.name}.parquet", f"{shard.name}.json"):
                    try:
                        os.link(self.root / name, aside / name)
                    except OSError:  # a file system without links
                        shutil.copy2(self.root / name, aside / name)

    def snapshot(self, snapshot_id: str) -> Snapshot:
        """Raises StoreError: there is no such snapshot any more, or not the whole of it."""
        snapshot = Snapshot(self.root / "snapshots" / snapshot_id)
        snapshot.shards()
        return snapshot

    def verify(self) -> dict[str, str]:
        """What is wrong with which shard: hash, schema or values. Empty when all is well."""
        wrong: dict[str, str] = {}
        if not self.root.is_dir():
            return wrong
        with self._locked(shared=True):
            for manifest in sorted(self.root.glob("shard-*.json")):
                try:
                    shard = read_manifest(manifest)
                    if shard.name != manifest.stem:
                        raise StoreError(f"its manifest names {shard.name!r}")
                    for rollout in read_shard(self.root, shard):
                        check_rollout(rollout)
                except S2TError as error:
                    wrong[manifest.stem] = str(error)
        return wrong

    def quarantine(self, names: Iterable[str]) -> None:
        """Move bad shards aside, to `quarantine/`, so that the others can be used."""
        with self._locked():
            self._sweep()
            (self.root / "quarantine").mkdir(exist_ok=True)
            for name in names:
                for suffix in (
                    ".json",
                    ".parquet",
                ):  # the manifest first: then the shard does not exist
                    if (path := self.root / f"{name}{suffix}").exists():
                        path.rename(self.root / "quarantine" / path.name)

    def deletions(self) -> list[Deletion]:
        """Raises StoreError: a line is damaged. (A torn last line was never promised to
        anybody.)"""
        try:
            lines = (self.root / "deleted.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        if lines and not lines[-1].endswith(b"}"):
            lines.pop()
        return [_read_deletion(line, number) for number, line in enumerate(lines, 1) if line]

    def delete(self, field: str, value: str) -> int:
        """Delete every rollout whose `field` ("problem_id", "request_id", "task") is `value`, here,
        in snapshots, in quarantine, and on its way here. Returns how many rollouts were removed
        from shards; doing it again finishes what a crash interrupted. Snapshots that hold any of
        them go, and so do unreadable ones; what cannot be read in quarantine stays: nobody can say
        what is in it, so remove that folder by hand.

        Raises: StoreError: a shard is damaged: put it aside (s2t labels verify --quarantine) and
            delete again.
        """
        with self._locked():
            self._sweep()
            deletion = Deletion.of(field, value)
            lines = [json.dumps(asdict(d)) for d in (*self.deletions(), deletion)]
            write_atomically(self.root / "deleted.jsonl", "\n".join(lines))
            removed = sum(_delete_from(self.root, shard, deletion) for shard in present(self.root))
            for manifest in sorted((self.root / "quarantine").glob("shard-*.json")):
                with suppress(StoreError):
                    removed += _delete_from(manifest.parent, read_manifest(manifest), deletion)
            self._keep_snapshots(
                lambda snapshot: (
                    not any(
                        deletion.matches(r)
                        for s in snapshot.shards()
                        for r in read_shard(snapshot.folder, s)
                    )
                )
            )
            return removed

    def prunable(self, max_age_s: float = 0.0, max_bytes: int = 0) -> list[Shard]:
        """The shards that `prune` would remove, oldest first."""
        return _prunable(self.shards(), max_age_s, max_bytes)

    def prune(self, max_age_s: float = 0.0, max_bytes: int = 0) -> int:
        """Retention: remove whole shards whose newest rollout is older than `max_age_s`, then the
        oldest ones beyond `max_bytes` (0: no limit); snapshots that hold what is too old; and where
        there was too much, those that keep shards of their own from being freed, but for the
        newest, which a training run may be reading. Returns the rollouts removed."""
        with self._locked():
            self._sweep()
            shards, oldest = present(self.root), time.time() - max_age_s if max_age_s else 0.0
            gone = _prunable(shards, max_age_s, max_bytes)
            _remove(self.root, [s.name for s in gone])
            left = {s.name for s in shards} - {s.name for s in gone}
            too_much = any(s.last >= oldest for s in gone)
            newest = max(
                (s.folder for s in self._snapshots()),
                key=lambda f: f.stat().st_mtime_ns,
                default=None,
            )

            def keeps(snapshot: Snapshot) -> bool:
                held = snapshot.shards()
                free = (
                    too_much and snapshot.folder != newest and any(s.name not in left for s in held)
                )
                return not free and all(s.last >= oldest for s in held)

            self._keep_snapshots(keeps)
            return sum(s.rollouts for s in gone)

    def compact(self, least: int = 16) -> int:
        """Join the small shards of a day once there are `least` of them; returns how many were
        joined. Of one day (UTC, of the newest rollout): rollouts that grow old on different days
        must be able to go on different days."""
        with self._locked():
            self._sweep()
            days: dict[float, list[Shard]] = defaultdict(list)
            for shard in present(self.root):
                if shard.bytes < SHARD_BYTES // 8:
                    days[shard.last // DAY_S].append(shard)
            joined = 0
            for small in days.values():
                if len(small) >= least:
                    sizes = accumulate(s.bytes for s in small)
                    batch = [s for s, size in zip(small, sizes, strict=True) if size < SHARD_BYTES]
                    # Copies of a rollout go; copies of a label stay: deleting one rollout must not
                    # take another's.
                    rows = distinct(r for shard in batch for r in read_shard(self.root, shard))
                    write_shard(self.root, f"{uuid.uuid4().hex[:12]}-0", rows, batch)
                    _remove(self.root, [s.name for s in batch])
                    joined += len(batch)
            return joined

    def _sweep(self) -> None:
        """What a crash has left: replaced shards, and files that never got their manifest; and old
        snapshots. Under the exclusive lock no writer is alive. First of all: if what replaced them
        went before them, replaced shards would be back. A damaged manifest does not stop it: the
        way to put such a shard aside leads through here."""
        replaced: set[str] = set()
        for manifest in self.root.glob("shard-*.json"):
            with suppress(StoreError):
                replaced.update(read_manifest(manifest).replaces)
        _remove(self.root, replaced & {path.stem for path in self.root.glob("shard-*")})
        for path in [*self.root.glob("shard-*.parquet"), *self.root.glob(".shard-*")]:
            if not path.with_suffix(".json").exists():
                path.unlink()
        for aside in (self.root / "snapshots").glob(".*/"):
            shutil.rmtree(aside)
        for snapshot in self._snapshots():
            if time.time() - snapshot.folder.stat().st_mtime > SNAPSHOT_S:
                snapshot.remove()

    def _snapshots(self) -> list[Snapshot]:
        return [Snapshot(folder) for folder in (self.root / "snapshots").glob("[!.]*/")]

    def _keep_snapshots(self, keeps: Callable[[Snapshot], bool]) -> None:
        """Remove the others, and what is unreadable: nobody can train on it, and it must not hold
        up retention."""
        for snapshot in self._snapshots():
            try:
                kept = keeps(snapshot)
            except StoreError:
                kept = False
            if not kept:
                snapshot.remove()

    @contextmanager
    def _locked(self, shared: bool = False) -> Iterator[None]:
        """Released when the process dies, however it dies."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.root / ".lock", shared):
                yield
        except OSError as error:
            raise StoreError(
                f"the lake folder {self.root.name!r} cannot be used: {error.strerror or error}; free or "
                "grant space there"
            ) from error


def _prunable(shards: Iterable[Shard], max_age_s: float, max_bytes: int) -> list[Shard]:
    oldest = time.time() - max_age_s if max_age_s else 0.0
    by_age = sorted(shards, key=lambda s: (s.last, s.name))
    over = sum(s.bytes for s in by_age) - max_bytes if max_bytes else 0
    gone = []
    for shard in by_age:
        if over > 0 or shard.last < oldest:
            gone.append(shard)
            over -= shard.bytes
    return gone


def _delete_from(folder: Path, shard: Shard, deletion: Deletion) -> int:
    """Replace a shard by one without what is to be deleted, where it holds any; how many rollouts
    went."""
    gone = sum(map(deletion.matches, read_shard(folder, shard)))
    if gone:
        kept = (r for r in read_shard(folder, shard) if not deletion.matches(r))
        write_shard(folder, f"{uuid.uuid4().hex[:12]}-0", kept, [shard])
        _remove(folder, [shard.name])
    return gone


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)  # first: then the shard does not exist
        (folder / f"{name}.parquet").unlink(missing_ok=True)


def _read_deletion(line: bytes, number: int) -> Deletion:
    try:
        deletion = Deletion(**json.loads(line))
        if (
            deletion.field in DELETABLE
            and isinstance(deletion.sha256, str)
            and isinstance(deletion.at, (int, float))
        ):
            return deletion
    except (ValueError, TypeError):
        pass
    raise StoreError(
        f"line {number} of deleted.jsonl in the lake is damaged, so what it kept out cannot be told; "
        "remove the line, and delete again what it stood for"
    )
