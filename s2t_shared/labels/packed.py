"""Rollouts as they travel through Redis and the spool: a line of JSON, and the numbers behind it.

    MAGIC  {"rollout_id": ..., ..., "label_ids": [...], "sizes": [...]} newline  numbers

The line has what is a text or one value of a rollout. The numbers lie column by column, packed and
little-endian, as the lake holds them: a reader joins the columns of many entries and makes Arrow
arrays of them, without an object for any. `sizes` are the lengths of the columns of lists.

Writers of the last release wrote an entry as JSON alone: that is read too. A drain of the last
release cannot read ours, and makes dead letters of them: `s2t labels dead --requeue` sends them on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import json as arrow_json

from s2t_shared.errors import StoreError
from s2t_shared.labels.label import Label, Rollout, check_rollout, check_version
from s2t_shared.labels.rows import LABELS, ROLLOUT_SCHEMA, Rows, arrow_type
from s2t_shared.labels.schema import Column, Kind, columns

MAGIC = b"S2T1"
DTYPES = {"int16": "<i2", "int32": "<i4", "float32": "<f4"}
LABEL_IDS, SIZES = "label_ids", "sizes"

_HEAD = [column for column in columns(Rollout) if not column.many]
_OF_ROLLOUT = [column for column in columns(Rollout) if column.many]
_OF_LABEL = [
    column for column in columns(Label) if not column.many and column.kind is not Kind.TEXT
]
_LISTS_OF_LABEL = [column for column in columns(Label) if column.many]
_HEAD_SCHEMA = pa.schema(
    [
        *((column.name, arrow_type(column)) for column in _HEAD),
        (LABEL_IDS, pa.list_(pa.string())),
        (SIZES, pa.list_(pa.int64())),
    ]
)
# Of `sizes`: each column of lists of a rollout, its labels, each column of lists of its labels.
_SIZES = len(_OF_ROLLOUT) + 1 + len(_LISTS_OF_LABEL)


# -- writing --------------------------------------------------------------------------------------


def pack(rollout: Rollout) -> bytes:
    """A rollout as one entry. Real numbers become float32, as in the lake.

    Raises:
        TypeError, ValueError, OverflowError: a value is not of its column's type.
    """
    labels = rollout.labels
    head: dict[str, Any] = {column.name: getattr(rollout, column.name) for column in _HEAD}
    head[LABEL_IDS] = [label.label_id for label in labels]
    parts: list[bytes] = []
    sizes: list[int] = []
    for column in _OF_ROLLOUT:
        values = getattr(rollout, column.name)
        sizes.append(len(values))
        parts.append(_packed(values, column))
    sizes.append(len(labels))
    parts += [_packed([getattr(one, c.name) for one in labels], c) for c in _OF_LABEL]
    for column in _LISTS_OF_LABEL:
        lists = [getattr(label, column.name) for label in labels]
        values = list(chain.from_iterable(lists))
        sizes.append(len(values))
        parts.append(np.array([len(one) for one in lists], "<i4").tobytes())
        parts.append(_packed(values, column))
    head[SIZES] = sizes
    line = json.dumps(head, separators=(",", ":")).encode()
    return b"".join([MAGIC, line, b"\n", *parts])


def _packed(values: Sequence[Any], column: Column) -> bytes:
    return np.array(values, DTYPES[column.kind.arrow]).tobytes()


# -- reading --------------------------------------------------------------------------------------


def read_rollout(entry: bytes) -> Rollout:
    """The rollout of an entry.

    Raises:
        StoreError: it holds none of this schema version, or a value is impossible.
        EvaluationSplitError: it comes from an evaluation split.
    """
    if not entry.startswith(MAGIC):
        return Rollout.from_json(entry)
    try:
        [rollout] = read_rows([entry]).rollouts()
        check_version(rollout.schema_version)
        check_rollout(rollout)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise StoreError(f"not labels: {type(error).__name__}: {error}") from error
    return rollout


def read_rows(entries: Sequence[bytes]) -> Rows:
    """The rollouts of entries, those that are JSON first. Not checked.

    Raises:
        ValueError: one of them cannot be read so; `read_rollout` says which, and why.
    """
    as_json = [entry for entry in entries if not entry.startswith(MAGIC)]
    packed = [entry for entry in entries if entry.startswith(MAGIC)]
    parts = [Rows.from_json(as_json)] if as_json else []
    parts += [_read_packed(packed)] if packed else []
    return Rows.joined(parts)


def _read_packed(entries: Sequence[bytes]) -> Rows:
    lines = []
    numbers = []
    for entry in entries:
        line, newline, packed = entry[len(MAGIC) :].partition(b"\n")
        if not newline or not line.startswith(b"{"):
            raise ValueError("an entry has no line with one object")
        lines.append(line)
        numbers.append(packed)
    head = _read_lines(lines)
    sizes = _sizes(head)
    blocks = _Blocks(numbers, sizes)
    arrays = {column.name: head.column(column.name).combine_chunks() for column in _HEAD}
    for place, column in enumerate(_OF_ROLLOUT):
        arrays[column.name] = _lists(sizes[:, place], blocks.next(column), arrow_type(column))
    counts = sizes[:, len(_OF_ROLLOUT)]
    arrays[LABELS] = _lists(counts, _labels(head, blocks), ROLLOUT_SCHEMA.field(LABELS).type)
    ordered = [arrays[name] for name in ROLLOUT_SCHEMA.names]
    return Rows(pa.Table.from_arrays(ordered, schema=ROLLOUT_SCHEMA))


def _read_lines(lines: Sequence[bytes]) -> pa.Table:
    joined = b"\n".join(lines)
    joined.decode()  # Arrow does not look whether texts are UTF-8
    options = arrow_json.ParseOptions(_HEAD_SCHEMA, unexpected_field_behavior="ignore")
    one_block = arrow_json.ReadOptions(block_size=len(joined) + 1)
    head = arrow_json.read_json(io.BytesIO(joined), one_block, options).combine_chunks()
    if len(head) != len(lines):
        raise ValueError("a line holds several objects")
    return head


def _sizes(head: pa.Table) -> np.ndarray:
    """[entries, _SIZES]"""
    column = head.column(SIZES).combine_chunks()
    found = column.flatten().to_numpy()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if not (lengths == _SIZES).all() or (found < 0).any():
        raise ValueError(f"{SIZES}: {_SIZES} lengths are needed")
    sizes: np.ndarray = found.reshape(-1, _SIZES)
    label_ids = head.column(LABEL_IDS).combine_chunks().value_lengths()
    if not (label_ids.to_numpy(zero_copy_only=False) == sizes[:, len(_OF_ROLLOUT)]).all():
        raise ValueError(f"{LABEL_IDS}: one for each label is needed")
    return sizes


def _labels(head: pa.Table, blocks: _Blocks) -> pa.StructArray:
    arrays = {"label_id": head.column(LABEL_IDS).combine_chunks().flatten()}
    for column in _OF_LABEL:
        arrays[column.name] = blocks.next(column)
    for column in _LISTS_OF_LABEL:
        counts = blocks.next_counts()
        arrays[column.name] = _lists(counts, blocks.next(column), arrow_type(column))
    kinds = list(ROLLOUT_SCHEMA.field(LABELS).type.value_type)
    return pa.StructArray.from_arrays([arrays[kind.name] for kind in kinds], fields=kinds)


def _lists(counts: np.ndarray, values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    """Lists of `counts` values each, one after the other."""
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    if (counts < 0).any() or ends[-1] != len(values):
        raise ValueError("lengths of lists and their values do not go together")
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values, type=kind)


class _Blocks:
    """The numbers of many entries, column after column."""

    def __init__(self, numbers: Sequence[bytes], sizes: np.ndarray) -> None:
        """Raises ValueError: an entry has more or fewer bytes than its sizes say."""
        self._numbers = [memoryview(packed) for packed in numbers]
        self._lengths = iter(_block_bytes(sizes))
        self._starts = np.zeros(len(numbers), np.int64)
        ends = sum(_block_bytes(sizes))
        if not np.array_equal(ends, [len(packed) for packed in numbers]):
            raise ValueError("an entry has more or fewer numbers than it says")

    def next(self, column: Column) -> pa.Array:
        """The next column of all entries, joined."""
        return pa.array(self._next(DTYPES[column.kind.arrow]), pa.type_for_alias(column.kind.arrow))

    def next_counts(self) -> np.ndarray:
        """The lengths of the lists of the next column, of all entries, joined."""
        return self._next("<i4")

    def _next(self, dtype: str) -> np.ndarray:
        ends = self._starts + next(self._lengths)
        places = zip(self._numbers, self._starts.tolist(), ends.tolist(), strict=True)
        joined = b"".join([packed[start:end] for packed, start, end in places])
        self._starts = ends
        return np.frombuffer(joined, dtype)


def _block_bytes(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """[entries] the bytes of each column, in the order in which `pack` writes them."""
    for place, column in enumerate(_OF_ROLLOUT):
        yield sizes[:, place] * _width(column)
    labels = sizes[:, len(_OF_ROLLOUT)]
    for column in _OF_LABEL:
        yield labels * _width(column)
    for place, column in enumerate(_LISTS_OF_LABEL, len(_OF_ROLLOUT) + 1):
        yield labels * 4
        yield sizes[:, place] * _width(column)


def _width(column: Column) -> int:
    return np.dtype(DTYPES[column.kind.arrow]).itemsize
