"""Keys and values of many sequences in one pool, one row per sequence, handed to a transformers model as its cache.

Knows tensors and rows; not what is in them. Two ways to run a forward against it:

    write:   the new tokens' keys and values are stored at their positions; attention sees the pool
    branch:  attention sees the pool's first `length` columns followed by the new tokens; nothing is kept

Storage per layer: keys and values [rows, heads, columns, head_dim]; column = position. Both grow by doubling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

FIRST_ROWS = 8
FIRST_COLUMNS = 128


class KVPool:
    """Row allocator and storage. Rows are plain ints; the lowest free row is given first, so that live rows stay
    contiguous and attention can read them without a copy."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._used: set[int] = set()
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._rows, self._columns = FIRST_ROWS, FIRST_COLUMNS

    def allocate(self) -> int | None:
        """A free row, or None when `max_rows` are taken."""
        row = next(r for r in range(len(self._used) + 1) if r not in self._used)
        if row >= self.max_rows:
            return None
        self._used.add(row)
        return row

    def free(self, row: int) -> None:
        self._used.remove(row)

    @property
    def used_rows(self) -> int:
        return len(self._used)

    @property
    def bytes(self) -> int:
        """Bytes held on the device now."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in layer)

    def reserve(self, rows: int, columns: int) -> None:
        """Grow so that `rows` rows of `columns` positions fit."""
        new_rows, new_columns = self._rows, self._columns
        while new_rows < rows:
            new_rows *= 2
        while new_columns < columns:
            new_columns *= 2
        if (new_rows, new_columns) == (self._rows, self._columns):
            return
        self._layers = [(_grown(k, new_rows, new_columns), _grown(v, new_rows, new_columns)) for k, v in self._layers]
        self._rows, self._columns = new_rows, new_columns

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Storage of one layer, made at first use with the shapes the model really produces."""
        while len(self._layers) <= index:
            self._layers.append((
                keys.new_zeros(self._rows, keys.shape[1], self._columns, keys.shape[3]),
                values.new_zeros(self._rows, values.shape[1], self._columns, values.shape[3])))
        return self._layers[index]

    @property
    def is_empty(self) -> bool:
        return not self._layers


def _grown(storage: Tensor, rows: int, columns: int) -> Tensor:
    new = storage.new_zeros(rows, storage.shape[1], columns, storage.shape[3])
    new[: storage.shape[0], :, : storage.shape[2]] = storage
    return new


class PoolCache(Cache):
    """One forward's view of a `KVPool`, in the shape transformers calls: `update(keys, values, layer)`.

    rows: n row numbers. positions: [n, t] columns to store the new tokens at, or None for a branch.
    length: how many pool columns attention sees.
    """

    def __init__(self, pool: KVPool, rows: Sequence[int], positions: Tensor | None, length: int) -> None:
        super().__init__(layers=[])
        self._pool, self._positions, self._length = pool, positions, length
        first = rows[0] if rows else 0
        contiguous = list(rows) == list(range(first, first + len(rows)))
        self._read: slice | Tensor = slice(first, first + len(rows)) if contiguous else torch.tensor(list(rows))
        self._write = torch.tensor(list(rows))[:, None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int,
               *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._pool.layer(layer_idx, key_states, value_states)
        if self._positions is not None:
            keys[self._write, :, self._positions] = key_states.transpose(1, 2)
            values[self._write, :, self._positions] = value_states.transpose(1, 2)
            return keys[self._read, :, : self._length], values[self._read, :, : self._length]
        if self._length == 0:
            return key_states, value_states
        return (torch.cat([keys[self._read, :, : self._length], key_states], dim=2),
                torch.cat([values[self._read, :, : self._length], value_states], dim=2))

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return self._length
