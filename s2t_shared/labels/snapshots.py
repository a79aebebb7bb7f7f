"""Snapshots: frozen shards, which a training run reads whatever becomes of the lake."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from s2t_shared.errors import StoreError
from s2t_shared.files import remove_folder
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.places import Folder, Place
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.rows import LABEL_KEY, LABELS
from s2t_shared.labels.shards import Shard, content_digest, open_shard, present

DIGESTS = ("slm_digest", "llm_digest")


class Snapshot(ABC):
    """Some shards that no longer change.

    `id` is the digest of its content, so a missing part is noticed. Every method raises StoreError
    then.
    """

    @property
    @abstractmethod
    def id(self) -> str: ...

    @property
    @abstractmethod
    def place(self) -> Place:
        """Where its shards lie."""

    @property
    @abstractmethod
    def used_at(self) -> float:
        """When it was last frozen, Unix seconds."""

    @abstractmethod
    def _listed(self) -> list[Shard]: ...

    @abstractmethod
    def remove(self) -> None:
        """Remove the snapshot. After a crash it is complete or gone."""

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
            shards = self._listed()
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
        return all(self.place.size(shard.file) == shard.bytes for shard in shards)

    def pairs(self) -> Counter[tuple[str, ...]]:
        """Labels, duplicates included, by the digests of the (SLM, LLM) they come from."""
        found = Counter[tuple[str, ...]]()
        for shard in self.shards():
            with open_shard(self.place, shard) as file:
                found += file.read([*DIGESTS, f"{LABELS}.{LABEL_KEY}"]).labels_by(*DIGESTS)
        return found

    def reader(self) -> Reader:
        """Reads the snapshot by columns."""
        return Reader(self.place, self.shards())

    def rollouts(self) -> Iterator[Rollout]:
        """Every rollout once, each label in the first one that has it."""
        yield from self.reader().rollouts()


@dataclass(frozen=True)
class FolderSnapshot(Snapshot):
    """A folder of its own."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def place(self) -> Place:
        return Folder(self.folder)

    @property
    def used_at(self) -> float:
        return self.folder.stat().st_mtime_ns / 1e9

    def _listed(self) -> list[Shard]:
        return present(self.place)

    def remove(self) -> None:
        remove_folder(self.folder)
