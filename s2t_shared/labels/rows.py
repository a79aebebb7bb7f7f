"""Rollouts as rows of an Arrow table: how they lie in the lake, and are computed with.

A row is a rollout; its labels are a list of structs. Beside the columns of `Rollout` and `Label`
the lake holds columns that follow from them, so that nobody has to read long columns to know
short things:

    prompt_key    of the prompt's token ids, 64 bits (`keys`)
    part          what the rollout is for: 0 training, 1 validation, 2 test (`splits.Part`)
    labels.key    of the label's id, 64 bits

`Rows` makes no Python object per row unless it is asked for rollouts.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json

from s2t_shared.labels.keys import Keys, list_keys, text_keys
from s2t_shared.labels.label import SCHEMA_VERSION, Label, Rollout, problem_of
from s2t_shared.labels.schema import Column, columns
from s2t_shared.splits import PARTS, part_of_group

# -- the schema -----------------------------------------------------------------------------------

ARROW_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
LABELS, LABEL_KEY, PROMPT_KEY, PART = "labels", "key", "prompt_key", "part"


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type of a column."""
    item = ARROW_TYPES[column.kind.arrow]
    return pa.list_(item) if column.many else item


def arrow_fields(columns: Iterable[Column]) -> list[tuple[str, pa.DataType]]:
    """Names and Arrow types of columns, in order."""
    return [(column.name, arrow_type(column)) for column in columns]


def _schema(with_keys: bool) -> pa.Schema:
    of_label = arrow_fields(columns(Label))
    if with_keys:
        of_label.append((LABEL_KEY, pa.uint64()))
    types = dict(arrow_fields(columns(Rollout)))
    types[LABELS] = pa.list_(pa.struct(of_label))
    ordered = [(f.name, types[f.name]) for f in fields(Rollout)]
    if with_keys:
        ordered += [(PROMPT_KEY, pa.uint64()), (PART, pa.int8())]
    return pa.schema(ordered, metadata={"s2t_schema_version": str(SCHEMA_VERSION)})


ROLLOUT_SCHEMA = _schema(with_keys=False)  # the columns of `Rollout`
SCHEMA = _schema(with_keys=True)  # what the lake's files hold
OPTIONAL = {f.name: f.default for f in fields(Rollout) if f.metadata and f.default is not MISSING}
# What a column that is not there follows from.
SOURCES = {
    LABEL_KEY: ("label_id",),
    PROMPT_KEY: ("token_ids", "prompt_length"),
    PART: ("task", "group", "problem_id", "token_ids", "prompt_length"),
}


class Rows:
    """A table of rollouts, of all columns or of some."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Rows:
        """Of the columns of `Rollout`. A value that does not fit raises an error of pyarrow's or
        Python's: then `check_rollout` has a gap."""
        labels = [label for rollout in rollouts for label in rollout.labels]
        structs = pa.StructArray.from_arrays(
            [_array(labels, column) for column in columns(Label)],
            fields=list(ROLLOUT_SCHEMA.field(LABELS).type.value_type),
        )
        ends = np.cumsum([0, *(len(rollout.labels) for rollout in rollouts)], dtype=np.int32)
        arrays = {column.name: _array(rollouts, column) for column in columns(Rollout)}
        arrays[LABELS] = _lists(ends, structs, ROLLOUT_SCHEMA.field(LABELS).type)
        ordered = [arrays[name] for name in ROLLOUT_SCHEMA.names]
        return cls(pa.Table.from_arrays(ordered, schema=ROLLOUT_SCHEMA))

    @classmethod
    def from_json(cls, texts: Sequence[bytes]) -> Rows:
        """Rollouts as `Rollout.to_json` writes them, without an object for any. Not checked.

        Raises:
            ValueError: one of them cannot be read so; `Rollout.from_json` says which, and why.
        """
        if not all(text.startswith(b"{") and b"\n" not in text for text in texts):
            raise ValueError("a text is not one line with one object")
        joined = b"\n".join(texts)
        joined.decode()  # Arrow does not look whether texts are UTF-8
        options = json.ParseOptions(ROLLOUT_SCHEMA, unexpected_field_behavior="ignore")
        blocks = json.ReadOptions(block_size=len(joined) + 1)
        table = json.read_json(io.BytesIO(joined), blocks, options)
        if len(table) != len(texts):
            raise ValueError("a text holds several objects")
        return cls(table.select(ROLLOUT_SCHEMA.names))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of parts with the same columns."""
        if not parts:
            return cls(SCHEMA.empty_table())
        return parts[0] if len(parts) == 1 else cls(pa.concat_tables(part.table for part in parts))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    # -- columns ----------------------------------------------------------------------------------

    def column(self, name: str) -> pa.Array:
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def numbers(self, name: str) -> np.ndarray:
        """[rows] of a column of numbers."""
        return _numpy(self.column(name))

    def equal(self, name: str, value: str) -> np.ndarray:
        """[rows] bool: where a column of texts has a value."""
        return _numpy(pc.equal(self.column(name), value))

    def texts(self, name: str) -> list[str]:
        """A column of texts, as objects."""
        found: list[str] = self.column(name).to_pylist()
        return found

    def distinct(self, name: str) -> list[str]:
        """The values of a column of texts, each once."""
        found: list[str] = pc.unique(self.column(name)).to_pylist()
        return found

    def distinct_of(self, *names: str) -> list[tuple[str, ...]]:
        """The combinations of values of columns of texts, each once."""
        table = self.table.select(names).group_by(list(names), use_threads=False).aggregate([])
        return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))

    def lengths(self, name: str) -> np.ndarray:
        """[rows] of a column of lists."""
        return _numpy(pc.list_value_length(self.column(name))).astype(np.int64)

    def values(self, name: str) -> np.ndarray:
        """The values of a column of lists, one list after the other."""
        return _numpy(self.column(name).flatten())

    @cached_property
    def label_counts(self) -> np.ndarray:
        """[rows]"""
        return self.lengths(LABELS)

    @cached_property
    def labels(self) -> pa.StructArray:
        """All labels, one rollout's after the other's."""
        return self.column(LABELS).flatten()

    def of_labels(self, name: str) -> np.ndarray:
        """[labels] of a column of numbers."""
        return _numpy(self.labels.field(name))

    def label_lengths(self, name: str) -> np.ndarray:
        """[labels] of a column of lists."""
        return _numpy(pc.list_value_length(self.labels.field(name)))

    def label_values(self, name: str) -> np.ndarray:
        """The values of a column of lists of labels, one list after the other."""
        return _numpy(self.labels.field(name).flatten())

    def label_ends(self, name: str) -> np.ndarray:
        """[rows] the greatest value among a rollout's labels; each rollout has some."""
        starts = np.cumsum(self.label_counts) - self.label_counts
        found: np.ndarray = np.maximum.reduceat(self.of_labels(name), starts)
        return found

    def keys(self, name: str) -> Keys:
        """[rows] of a column of texts."""
        return text_keys(self.column(name))

    def labels_by(self, *names: str) -> Counter[tuple[str, ...]]:
        """Number of labels by the values of columns of texts. None is counted without a label."""
        table = pa.table([*map(self.column, names), self.label_counts], names=[*names, "labels"])
        sums = table.group_by(list(names), use_threads=False).aggregate([("labels", "sum")])
        counts = sums.column("labels_sum").to_pylist()
        keys = zip(*(sums.column(name).to_pylist() for name in names), strict=True)
        return +Counter(dict(zip(keys, counts, strict=True)))

    # -- choosing ---------------------------------------------------------------------------------

    def where(self, mask: np.ndarray) -> Rows:
        """The rows where `mask` is true."""
        return self if mask.all() else Rows(self.table.filter(pa.array(mask)))

    def take(self, numbers: np.ndarray) -> Rows:
        """The rows with these numbers, in their order."""
        return Rows(self.table.take(pa.array(numbers)))

    def slice(self, start: int, length: int) -> Rows:
        return Rows(self.table.slice(start, length))

    def with_labels_where(self, mask: np.ndarray) -> Rows:
        """All rows, with those labels where `mask` [labels] is true."""
        if mask.all():
            return self
        kept = np.concatenate([[0], np.cumsum(mask)])
        ends = np.concatenate([[0], np.cumsum(self.label_counts)])
        column = self.column(LABELS)
        labels = _lists(
            kept[ends].astype(np.int32), self.labels.filter(pa.array(mask)), column.type
        )
        place = self.table.schema.get_field_index(LABELS)
        return Rows(self.table.set_column(place, self.table.schema.field(place), labels))

    # -- completing -------------------------------------------------------------------------------

    def completed(self, names: Sequence[str] = SCHEMA.names) -> Rows:
        """The columns `names`, with defaults and what follows from others filled in.

        `labels` stands for all columns of labels, `labels.mass` for one of them.
        """
        rows = self
        if LABELS in names or f"{LABELS}.{LABEL_KEY}" in names:
            rows = rows._with_label_keys()
        top = list(dict.fromkeys(name.partition(".")[0] for name in names))
        for name in top:
            if name not in rows.table.column_names:
                rows = Rows(rows.table.append_column(SCHEMA.field(name), rows._missing(name)))
        return Rows(rows.table.select(top))

    def _missing(self, name: str) -> pa.Array:
        if name == PROMPT_KEY:
            return pa.array(self._prompt_keys())
        if name == PART:
            return pa.array(self._parts(), pa.int8())
        return pa.repeat(pa.scalar(OPTIONAL[name], SCHEMA.field(name).type), len(self))

    def _prompt_keys(self) -> Keys:
        lengths = self.lengths("token_ids")
        prompts = np.minimum(self.numbers("prompt_length"), lengths)
        return list_keys(self.values("token_ids"), np.cumsum(lengths) - lengths, prompts)

    def _parts(self) -> list[int]:
        """By a cryptographic hash of each problem's group, so one text after the other."""
        groups = self.column("group" if "group" in self.table.column_names else "problem_id")
        found = []
        problems = self.column("problem_id").to_pylist()
        texts = zip(self.column("task").to_pylist(), groups.to_pylist(), problems, strict=True)
        for row, (task, group, problem) in enumerate(texts):
            name = group or problem or self._problem(row)
            found.append(PARTS.index(part_of_group(task, name)))
        return found

    def _problem(self, row: int) -> str:
        length = self.column("prompt_length")[row].as_py()
        return problem_of(self.column("token_ids")[row].as_py()[:length])

    def _with_label_keys(self) -> Rows:
        labels = self.labels
        if LABEL_KEY in (field.name for field in labels.type):
            return self
        keys = pa.array(text_keys(labels.field("label_id")))
        known = list(labels.type)
        with_keys = pa.StructArray.from_arrays(
            [*(labels.field(field.name) for field in known), keys],
            fields=[*known, pa.field(LABEL_KEY, pa.uint64())],
        )
        ends = np.concatenate([[0], np.cumsum(self.label_counts)]).astype(np.int32)
        lists = _lists(ends, with_keys, pa.list_(with_keys.type))
        place = self.table.schema.get_field_index(LABELS)
        return Rows(self.table.set_column(place, pa.field(LABELS, lists.type), lists))

    # -- objects ----------------------------------------------------------------------------------

    def rollouts(self) -> list[Rollout]:
        """The rows as objects. Needs all columns of a rollout that are not optional."""
        labels = _objects(Label, {f.name: self.labels.field(f.name) for f in self.labels.type})
        ends = [0, *np.cumsum(self.label_counts).tolist()]
        of_rollout = {name: self.column(name) for name in self.table.column_names}
        of_rollout.pop(LABELS)
        made = [tuple(labels[a:b]) for a, b in pairwise(ends)]
        return _objects(Rollout, of_rollout, {LABELS: made})


def _array(objects: Sequence[Any], column: Column) -> pa.Array:
    return pa.array([getattr(one, column.name) for one in objects], arrow_type(column))


def _lists(ends: np.ndarray, values: pa.Array, kind: pa.DataType) -> pa.ListArray:
    """ends: [n + 1], the first one 0."""
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values, type=kind)


def _numpy(array: pa.Array) -> np.ndarray:
    found: np.ndarray = array.to_numpy(zero_copy_only=False)
    return found


def _objects(
    kind: Any, arrays: dict[str, pa.Array], more: dict[str, list[Any]] | None = None
) -> list[Any]:
    """Instances of a dataclass from its columns. Columns that it does not have are left out."""
    names, values = list(more or ()), list((more or {}).values())
    for column in columns(kind):
        if column.name in arrays:
            names.append(column.name)
            listed = arrays[column.name].to_pylist()
            values.append([tuple(value) for value in listed] if column.many else listed)
    return [kind(**dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]
