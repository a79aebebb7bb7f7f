"""The lake in object storage. The layout of `lake`, but for what folders and locks do there:

    <url>/
      shard-<name>.parquet, .json   as in a folder; the manifest is created last, by nobody else
      rewrites/<number>.json        the manifest of a shard that replaces others
      removed/<name>                says that such a shard was removed
      snapshots/<id>.json           the manifests of frozen shards
      deletions/<number>.json       one deletion
      quarantine/

Writers never wait for one another. Of two rewriters the slower one is refused by the store and
begins again. A shard that a snapshot holds keeps its file. A harvest keeps its journal in a folder
elsewhere.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.deletions import Deletion
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import SNAPSHOT_S, Doomed, Lake
from s2t_shared.labels.objects import Objects
from s2t_shared.labels.places import Place, is_url
from s2t_shared.labels.rows import Rows
from s2t_shared.labels.shards import Shard, content_digest, present
from s2t_shared.labels.snapshots import Snapshot

ATTEMPTS = 8
ORPHAN_S = 3600.0  # no writer takes so long between a shard's file and its manifest


def open_lake(where: Path | str) -> Lake:
    """The lake in a folder or at a URL."""
    return ObjectLake(str(where)) if is_url(where) else Lake(Path(where))


class _RefusedError(StoreError):
    """Somebody else rewrote shards meanwhile."""


class ObjectSnapshot(Snapshot):
    """A list of shards, which stay where they are."""

    def __init__(self, place: Objects, snapshot_id: str) -> None:
        self._place = place
        self._id = snapshot_id
        self._file = f"snapshots/{snapshot_id}.json"

    @property
    def id(self) -> str:
        return self._id

    @property
    def place(self) -> Place:
        return self._place

    @property
    def used_at(self) -> float:
        return self._place.modified(self._file)

    def _listed(self) -> list[Shard]:
        try:
            content = json.loads(self._place.fetch(self._file))
            return [Shard(**shard | {"replaces": tuple(shard["replaces"])}) for shard in content]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"its list is damaged ({type(error).__name__})") from error

    def keep(self, shards: Sequence[Shard]) -> None:
        """Write the list; its time begins anew."""
        self._place.put(self._file, json.dumps([asdict(shard) for shard in shards]).encode())

    def remove(self) -> None:
        self._place.remove(self._file)


class ObjectLake(Lake):
    """The lake at a URL."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._objects = Objects(self._url)
        self.place = self._objects
        self._rewriting = threading.RLock()

    @property
    def root(self) -> Path:
        raise ConfigError(f"the lake {self._url!r} is no folder; name one for the journal of a run")

    @property
    def where(self) -> str:
        return self._url

    def _exists(self) -> bool:
        return True

    @contextmanager
    def _locked(self, shared: bool = False) -> Iterator[None]:
        try:
            if shared:
                yield
                return
            with self._rewriting:
                self._objects.begin()
                yield
        except FileExistsError as error:
            raise _RefusedError(f"the lake {self._url!r} is being rewritten; try again") from error
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(
            f"the lake {self._url!r} cannot be used: {type(error).__name__}; see that the store "
            "answers, and that its credentials allow reading and writing"
        )

    def _again(self, rewrite: Callable[[], int]) -> int:
        """Rewrite until nobody else did meanwhile."""
        for attempt in range(ATTEMPTS):
            try:
                return rewrite()
            except _RefusedError:
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError

    def check(self) -> None:
        """Write, read and remove a small file, as a writer of shards would.

        Raises:
            StoreError: the store cannot be reached, or written to, or it lets two writers create
                one file.
        """
        name = f"probe-{uuid.uuid4().hex}"
        try:
            self._objects.create(name, b"probe")
            with suppress(FileExistsError):
                self._objects.create(name, b"again")
                raise StoreError(
                    f"{self._url!r}: the store lets two writers create one file, and a lake relies "
                    "on conditional writes (If-None-Match); use another store"
                )
            self._objects.fetch(name)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            with suppress(OSError):
                self._objects.remove(name)

    # -- writing ----------------------------------------------------------------------------------

    def write(self, rollouts: Rows | Sequence[Rollout], name: str = "") -> None:
        before = self.deletions()
        super().write(rollouts, name)
        # What was deleted meanwhile may have been searched for before the shard was there.
        for deletion in self.deletions()[len(before) :]:
            self._again(lambda deletion=deletion: self._remove_doomed(Doomed(deletion)))  # type: ignore[misc]

    def _remove_doomed(self, doomed: Doomed) -> int:
        with self._locked():
            return sum(doomed.remove_from(self.place, shard) for shard in present(self.place))

    # -- rewriting --------------------------------------------------------------------------------

    def delete(self, field: str, value: str) -> int:
        removed = self._again(lambda: super(ObjectLake, self).delete(field, value))
        with self._locked():
            self._sweep()  # the files that only snapshots had kept, which are gone now
        return removed

    def compact(self, least: int = 16) -> int:
        return self._again(lambda: super(ObjectLake, self).compact(least))

    def prune(self, max_age_s: float = 0.0, max_bytes: int = 0) -> int:
        return self._again(lambda: super(ObjectLake, self).prune(max_age_s, max_bytes))

    def migrate(self) -> int:
        return self._again(super().migrate)

    def _retire(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self.place.remove(f"{shard.name}.json")
        self._sweep()

    def _sweep(self) -> None:
        """Remove the files of replaced shards, of removed ones, and what killed writers left; and
        old snapshots. What a snapshot holds stays."""
        for snapshot in self._snapshots():
            if time.time() - snapshot.used_at > SNAPSHOT_S:
                snapshot.remove()
        shards = present(self.place)
        kept = {shard.name for shard in shards}
        for snapshot in self._snapshots():
            with suppress(StoreError):
                kept |= {shard.name for shard in snapshot.shards()}
        known = set(self.place.names(".json")) | {n for s in shards for n in s.replaces}
        for name in self.place.names(".parquet"):
            file = f"{name}.parquet"
            is_old = name in known or time.time() - self._objects.modified(file) > ORPHAN_S
            if name not in kept and is_old:
                self.place.remove(file)

    # -- deletions --------------------------------------------------------------------------------

    def deletions(self) -> list[Deletion]:
        with self._locked(shared=True):
            paths = self._objects.listed("deletions")
            return [Deletion(**json.loads(self._objects.cached(path))) for path in paths]

    def _record(self, deletion: Deletion) -> None:
        number = len(self._objects.listed("deletions"))
        while True:
            try:
                content = json.dumps(asdict(deletion)).encode()
                self.place.create(f"deletions/{number:08}.json", content)
                return
            except FileExistsError:
                number += 1

    # -- snapshots and quarantine -----------------------------------------------------------------

    def _freeze(self, shards: Sequence[Shard]) -> Snapshot:
        snapshot = ObjectSnapshot(self._objects, content_digest(shards))
        snapshot.keep(shards)
        snapshot.shards()
        return snapshot

    def _snapshot(self, snapshot_id: str) -> Snapshot:
        return ObjectSnapshot(self._objects, snapshot_id)

    def _snapshots(self) -> Sequence[Snapshot]:
        names = [path.rpartition("/")[2] for path in self._objects.listed("snapshots")]
        return [self._snapshot(name.removesuffix(".json")) for name in names]

    @property
    def quarantined(self) -> Place:
        return Objects(f"{self._url}/quarantine")

    def _put_aside(self, file: str) -> None:
        with suppress(FileNotFoundError):
            self._objects.move(file, f"quarantine/{file}")
