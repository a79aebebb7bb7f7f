"""Keys of 64 bits that stand for texts and token lists, and which of many keys came before.

Computed from whole columns. Two different values share a key by chance only: among a billion
labels, about one pair in forty lakes. Knows arrays; not what they mean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
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


# -- repeated keys --------------------------------------------------------------------------------

IN_MEMORY = 1 << 20  # keys; what is more goes to disk
PARTITIONS = 64


class Repeats:
    """Finds the keys that came before, in bounded memory.

    Beyond IN_MEMORY keys they lie on disk in PARTITIONS files, by their first bits, and each file
    is looked at alone. What is found takes 8 bytes for each repeat. `distinct` counts the others.
    """

    def __init__(self) -> None:
        self._keys: list[Keys] = []
        self._places: list[np.ndarray] = []
        self._held = 0
        self.distinct = 0
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []

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
            if not self._files:
                return self._found(_joined(self._keys, np.uint64), _joined(self._places, np.int64))
            self._spill()
            return np.sort(_joined([self._in_file(file) for file in self._files], np.int64))

    def _spill(self) -> None:
        if not self._files:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="s2t-")))
            for number in range(PARTITIONS):
                stream = (folder / str(number)).open("w+b")
                self._files.append(self._stack.enter_context(stream))
        keys = _joined(self._keys, np.uint64)
        pairs = np.stack([keys, _joined(self._places, np.int64).view(np.uint64)], axis=1)
        partition = (keys >> np.uint64(58)).astype(np.uint8)  # PARTITIONS = 2**6
        pairs = pairs[np.argsort(partition, kind="stable")]
        ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
        for file, part in zip(self._files, np.split(pairs, ends[:-1]), strict=True):
            part.tofile(file)
        self._keys, self._places, self._held = [], [], 0

    def _in_file(self, file: IO[bytes]) -> np.ndarray:
        file.seek(0)
        pairs = np.fromfile(file, np.uint64).reshape(-1, 2)
        return self._found(pairs[:, 0], pairs[:, 1].view(np.int64))

    def _found(self, keys: Keys, places: np.ndarray) -> np.ndarray:
        ordered = np.sort(keys)
        again = ordered[1:] == ordered[:-1]
        self.distinct += len(keys) - int(again.sum())
        repeated = is_among(keys, np.unique(ordered[1:][again]))
        keys, places = keys[repeated], places[repeated]
        order = np.argsort(keys, kind="stable")
        is_first = np.ones(len(order), bool)
        is_first[1:] = keys[order][1:] != keys[order][:-1]
        found: np.ndarray = np.sort(places[order[~is_first]])
        return found


def _joined(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])
