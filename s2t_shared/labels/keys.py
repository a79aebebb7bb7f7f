"""Keys of 64 bits that stand for texts and token lists, and which of many keys came before.

Computed from whole columns. Two different values share a key by chance only: among a billion
labels, about one pair in forty lakes. Knows arrays; not what they mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

Keys = np.ndarray  # uint64
FIRST = np.uint64(0x9E3779B97F4A7C15)
SECOND = np.uint64(0xBF58476D1CE4E5B9)
THIRD = np.uint64(0x94D049BB133111EB)
WORD = 8  # bytes

# -- from values to keys --------------------------------------------------------------------------


def text_keys(texts: pa.Array) -> Keys:
    """[n] of a string column."""
    count = len(texts)
    if not count:
        return np.zeros(0, np.uint64)
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + count + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)
    lengths = np.diff(offsets)
    keys = np.empty(count, np.uint64)
    for length in np.unique(lengths):  # few: ids are hashes, or numbers of some digits
        rows = np.flatnonzero(lengths == length)
        padded = np.zeros((len(rows), -(-int(length) // WORD) * WORD), np.uint8)
        if len(rows) == count:
            padded[:, :length] = data[offsets[0] : offsets[-1]].reshape(count, length)
        else:
            padded[:, :length] = data[offsets[rows][:, None] + np.arange(length)]
        found = mixed(np.full(len(rows), length, np.uint64) + FIRST)
        for word in padded.view(np.uint64).T:
            found = mixed(found ^ word)
        keys[rows] = found
    return keys


def list_keys(values: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> Keys:
    """[n] of the lists `values[offset : offset + length]` of non-negative numbers."""
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = values[np.repeat(offsets, lengths) + within].astype(np.uint64)
    terms = mixed(tokens * SECOND + within.astype(np.uint64) * FIRST)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    ends = np.cumsum(lengths)
    return mixed(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64))


def mixed(keys: Keys) -> Keys:
    """The finaliser of SplitMix64: every bit of a key depends on every bit that went in."""
    keys = (keys ^ (keys >> np.uint64(30))) * SECOND
    keys = (keys ^ (keys >> np.uint64(27))) * THIRD
    mixed_keys: Keys = keys ^ (keys >> np.uint64(31))
    return mixed_keys


def is_among(keys: Keys, ascending: Keys) -> np.ndarray:
    """[n] bool: which keys are in a sorted array."""
    if not len(ascending):
        return np.zeros(len(keys), bool)
    places = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    found: np.ndarray = ascending[places] == keys
    return found


def ascending(keys: Keys) -> Keys:
    """The different keys of an array, sorted. Sorting is several times as fast as `np.unique`,
    which hashes."""
    ordered: Keys = np.sort(keys)
    return ordered[~_equals_last(ordered)]


def _equals_last(ordered: np.ndarray) -> np.ndarray:
    """[n] bool: which values of a sorted array are the same as the one before."""
    equal = np.zeros(len(ordered), bool)
    equal[1:] = ordered[1:] == ordered[:-1]
    return equal


# -- repeated keys --------------------------------------------------------------------------------

IN_MEMORY = 1 << 20  # keys; what is more goes to disk
PARTITIONS = 64
# Where each partition but the first begins, among all keys.
BOUNDS = np.arange(1, PARTITIONS, dtype=np.uint64) << np.uint64(58)  # PARTITIONS = 2**6


class Repeats:
    """Finds the keys that came before, in bounded memory.

    Beyond IN_MEMORY keys they lie on disk twice: as they came, with their places, and sorted, in
    PARTITIONS files by their first bits. Each partition is looked at alone for keys that it has
    twice. Only where there are any, all keys are read again for their places. What is found takes
    16 bytes for each key that there is more than once. `distinct` counts the different keys.
    """

    def __init__(self) -> None:
        self._keys: list[Keys] = []
        self._places: list[np.ndarray] = []
        self._held = 0
        self.distinct = 0
        self._stack = ExitStack()
        self._came: list[IO[bytes]] = []  # keys, places
        self._partitions: list[IO[bytes]] = []

    def add(self, keys: Keys, places: np.ndarray) -> None:
        """places: [n] ascending numbers, also over all calls; returned for those that repeat."""
        self._keys.append(keys)
        self._places.append(places)
        self._held += len(keys)
        if self._held > IN_MEMORY:
            self._spill()

    def repeats(self) -> np.ndarray:
        """Places of all keys but the first of each, ascending. Ends the search."""
        with self._stack:
            if self._came:
                self._spill()
                twice = [self._twice(_content(file, np.uint64)) for file in self._partitions]
                return _later_places(self._parts(), _joined(twice, np.uint64))
            keys = _joined(self._keys, np.uint64)
            places = _joined(self._places, np.int64)
            return _later_places([(keys, places)], self._twice(keys))

    def _spill(self) -> None:
        if not self._came:
            self._open_files()
        keys = _joined(self._keys, np.uint64)
        keys.tofile(self._came[0])
        _joined(self._places, np.int64).tofile(self._came[1])
        ordered = np.sort(keys)
        parts = np.split(ordered, np.searchsorted(ordered, BOUNDS))
        for file, part in zip(self._partitions, parts, strict=True):
            part.tofile(file)
        self._keys, self._places, self._held = [], [], 0

    def _open_files(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="s2t-")))

        def opened(name: str) -> IO[bytes]:
            return self._stack.enter_context((folder / name).open("w+b"))

        self._came = [opened("keys"), opened("places")]
        self._partitions = [opened(str(number)) for number in range(PARTITIONS)]

    def _twice(self, keys: Keys) -> Keys:
        """The keys that an array has more than once, ascending."""
        ordered = np.sort(keys)
        again = _equals_last(ordered)
        self.distinct += len(keys) - int(again.sum())
        return ascending(ordered[again])

    def _parts(self) -> Iterator[tuple[Keys, np.ndarray]]:
        """All keys with their places, as they came."""
        for file in self._came:
            file.seek(0)
        keys, places = self._came
        while len(part := np.fromfile(keys, np.uint64, IN_MEMORY)):
            yield part, np.fromfile(places, np.int64, IN_MEMORY)


def _later_places(parts: Iterable[tuple[Keys, np.ndarray]], twice: Keys) -> np.ndarray:
    """Places of all but the first of each key that is among `twice`, ascending."""
    if not len(twice):
        return np.zeros(0, np.int64)
    found_keys, found_places = [], []
    for keys, places in parts:
        repeated = is_among(keys, twice)
        found_keys.append(keys[repeated])
        found_places.append(places[repeated])
    keys, places = _joined(found_keys, np.uint64), _joined(found_places, np.int64)
    order = np.argsort(keys, kind="stable")
    later = places[order[_equals_last(keys[order])]]
    ascending_places: np.ndarray = np.sort(later)
    return ascending_places


def _content(file: IO[bytes], dtype: type) -> np.ndarray:
    file.seek(0)
    return np.fromfile(file, dtype)


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])
