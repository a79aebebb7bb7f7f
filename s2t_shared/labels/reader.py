"""Reads shards column by column, each rollout once, each label in the first rollout that has it.

First the keys of all rollouts and labels are read, to find what is there twice. After that any part
of any shard can be read by itself, in any order. In memory are 8 bytes for each duplicate and
IN_MEMORY keys (`keys`), beside the part that is being read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from s2t_shared.labels.keys import Repeats
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.places import Place
from s2t_shared.labels.rows import LABEL_KEY, LABELS, SCHEMA, Rows
from s2t_shared.labels.shards import Shard, open_shard, verify_content

RUN = 8  # row groups that are read at once
READERS = 2  # threads that read short columns, and how far they are ahead
NONE = np.zeros(0, np.int64)
Read = TypeVar("Read")


@dataclass(frozen=True)
class _Extent:
    """Where the row groups of a shard begin: row and label numbers, [groups + 1] each."""

    rows: np.ndarray
    labels: np.ndarray


class Reader:
    """Reads some shards of a place. Every method, and making one, raises StoreError where a shard
    is missing or damaged.

    labels: how many there are, each once.
    """

    def __init__(self, place: Place, shards: Sequence[Shard], copies: bool = False) -> None:
        """copies: of a label are kept, if they lie in different rollouts."""
        self.place = place
        self.shards = shards
        self._extents: list[_Extent] = []
        self._repeated_rows = [NONE] * len(shards)
        self._repeated_labels = [NONE] * len(shards)
        self._find_repeats()
        if copies:
            self._repeated_labels = [NONE] * len(shards)

    def _find_repeats(self) -> None:
        rows, labels = Repeats(), Repeats()
        row_starts, label_starts = [0], [0]
        for groups, found in self._key_columns("rollout_id", f"{LABELS}.{LABEL_KEY}"):
            ends = np.concatenate([[0], np.cumsum(found.label_counts)])
            self._extents.append(_Extent(groups, ends[groups]))
            _add(rows, found.keys("rollout_id"), row_starts)
            _add(labels, found.of_labels(LABEL_KEY), label_starts)
        self._repeated_rows = _by_shard(rows.repeats(), row_starts)
        if any(map(len, self._repeated_rows)):
            labels = self._labels_of_distinct_rows(label_starts)
        self._repeated_labels = _by_shard(labels.repeats(), label_starts)
        self.labels = labels.distinct

    def _labels_of_distinct_rows(self, starts: Sequence[int]) -> Repeats:
        """What is twice among the labels of rollouts that are no repeats themselves."""
        labels = Repeats()
        shards = zip(starts, self._repeated_rows, strict=False)
        read = self._key_columns(f"{LABELS}.{LABEL_KEY}")
        for (start, doubles), (_, rows) in zip(shards, read, strict=True):
            keys = rows.of_labels(LABEL_KEY)
            kept = np.repeat(_mask(len(rows), doubles), rows.label_counts)
            labels.add(keys[kept], start + np.flatnonzero(kept))
        return labels

    def _key_columns(self, *names: str) -> Iterator[tuple[np.ndarray, Rows]]:
        """Of each shard: where its row groups begin, and these columns, with duplicates."""

        def read(shard: int) -> tuple[np.ndarray, Rows]:
            with open_shard(self.place, self.shards[shard]) as file:
                return np.cumsum([0, *file.group_rows]), file.read(names)

        return _ahead(read, len(self.shards))

    def rollouts(self) -> Iterator[Rollout]:
        """All of them as objects."""
        for shard in range(len(self.shards)):
            for rows in self.tables(shard):
                yield from rows.rollouts()

    def part(self, shard: int) -> Reader:
        """A reader of this shard alone, its number 0, that leaves out the same repeats. It may be
        sent to another process that sees the place."""
        part = copy(self)
        part.shards = [self.shards[shard]]
        part._extents = [self._extents[shard]]
        part._repeated_rows = [self._repeated_rows[shard]]
        part._repeated_labels = [self._repeated_labels[shard]]
        return part

    def groups(self, shard: int) -> int:
        """Number of row groups of a shard."""
        return len(self._extents[shard].rows) - 1

    def read(self, shard: int, names: Sequence[str], groups: Sequence[int] | None = None) -> Rows:
        """Columns of a shard, or of some of its row groups; those of labels as `labels.mass`."""
        with open_shard(self.place, self.shards[shard]) as file:
            rows = file.read(names, groups)
        return self._distinct(shard, rows, range(self.groups(shard)) if groups is None else groups)

    def each(self, names: Sequence[str]) -> Iterator[Rows]:
        """The same of one shard after the other; the next ones are read meanwhile."""
        return _ahead(lambda shard: self.read(shard, names), len(self.shards))

    def verify(self, shard: int) -> None:
        """Check the hash of a shard's file."""
        verify_content(self.place, self.shards[shard])

    def pick(self, shard: int, numbers: np.ndarray) -> Iterator[Rows]:
        """All columns of the rows with these ascending numbers among the distinct ones."""
        starts = self._extents[shard].rows
        kept = np.flatnonzero(_mask(int(starts[-1]), self._repeated_rows[shard]))
        before = np.searchsorted(kept, starts)  # distinct rows before each row group
        for group in np.unique(np.searchsorted(before, numbers, "right") - 1).tolist():
            inside = numbers[(numbers >= before[group]) & (numbers < before[group + 1])]
            yield self.read(shard, SCHEMA.names, [group]).take(inside - before[group])

    def tables(self, shard: int, names: Sequence[str] = SCHEMA.names) -> Iterator[Rows]:
        """All columns of a shard whose hash was checked, or some, RUN row groups at a time."""
        with open_shard(self.place, self.shards[shard], whole=True) as file:
            for start in range(0, self.groups(shard), RUN):
                groups = range(start, min(start + RUN, self.groups(shard)))
                yield self._distinct(shard, file.read(names, groups), groups)

    def _distinct(self, shard: int, rows: Rows, groups: Sequence[int]) -> Rows:
        extent = self._extents[shard]
        labels = self._repeated_labels[shard]
        if len(labels) and LABELS in rows.table.column_names:
            rows = rows.with_labels_where(_part(extent.labels, labels, groups))
        doubles = self._repeated_rows[shard]
        return rows.where(_part(extent.rows, doubles, groups)) if len(doubles) else rows


def _ahead(read: Callable[[int], Read], count: int) -> Iterator[Read]:
    """`read` of 0, 1, ..., in order; READERS threads are as many ahead."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="shards") as pool:
        waiting: deque[Future[Read]] = deque()
        for number in range(count):
            waiting.append(pool.submit(read, number))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _add(repeats: Repeats, keys: np.ndarray, starts: list[int]) -> None:
    """Add the keys of a shard. starts: where shards begin; the next one's is appended."""
    repeats.add(keys, starts[-1] + np.arange(len(keys)))
    starts.append(starts[-1] + len(keys))


def _mask(count: int, dropped: np.ndarray) -> np.ndarray:
    mask = np.ones(count, bool)
    mask[dropped] = False
    return mask


def _part(starts: np.ndarray, dropped: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """The mask of the rows or labels of some row groups."""
    mask = _mask(int(starts[-1]), dropped)
    return np.concatenate([mask[starts[g] : starts[g + 1]] for g in groups])


def _by_shard(places: np.ndarray, starts: Sequence[int]) -> list[np.ndarray]:
    """Splits places in all shards into numbers in each of them."""
    cuts = np.searchsorted(places, starts)
    found = []
    for start, a, b in zip(starts, cuts, cuts[1:], strict=False):
        found.append(places[a:b] - start)
    return found
