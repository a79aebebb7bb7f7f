"""The columns of labels and rollouts: a type, a check and a meaning for every field, said once.

`Label` and `Rollout` declare their fields with `column`. The Arrow schema of the lake, the check of
what comes out of Redis, and the columns and documentation of an export follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any

from s2t_shared.errors import StoreError
from s2t_shared.types import SUPPORT_SIZE

LARGEST_FLOAT32 = 1e30  # about; far above every value that can be meant


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_rank(value: Any) -> bool:
    return type(value) is int and -1 <= value < SUPPORT_SIZE


def _is_float32(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= 1 << 24
    return type(value) is float and abs(value) < LARGEST_FLOAT32


def _is_time(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


class Kind(Enum):
    """What a value is: its Arrow type, its check, and what a value must be, in words."""

    TEXT = ("string", _is_text, "must be a text")
    WHOLE = ("int32", _is_whole, "must be a whole number from 0 to 2^31 - 1")
    RANK = ("int32", _is_rank, f"must be a whole number from -1 to {SUPPORT_SIZE - 1}")
    RANK16 = ("int16", _is_rank, f"must be a whole number from -1 to {SUPPORT_SIZE - 1}")
    REAL = ("float32", _is_float32, "must be a finite number that float32 can hold")
    TIME = ("float64", _is_time, "must be a finite number of seconds")

    def __init__(self, arrow: str, check: Callable[[Any], bool], rule: str) -> None:
        self.arrow = arrow
        self.check = check
        self.rule = rule


@dataclass(frozen=True)
class Column:
    """One field. many: a list of values. optional: older rows lack it, and have its default."""

    name: str
    kind: Kind
    doc: str
    many: bool
    optional: bool = False

    def read(self, value: Any) -> Any:
        """The field's value from JSON or Arrow, where tuples are lists."""
        return tuple(value) if self.many else value

    def check(self, value: Any) -> None:
        """Check a value.

        Raises:
            StoreError: it has the wrong type or range.
        """
        values: Iterable[Any] = value if self.many else (value,)
        if not all(map(self.kind.check, values)):
            raise StoreError(f"{self.name}: {self.kind.rule}")


def column(kind: Kind, doc: str, *, many: bool = False, default: Any = MISSING) -> Any:
    """A dataclass field that is a column."""
    return field(default=default, metadata={"kind": kind, "doc": doc, "many": many})


@cache
def columns(schema: Any) -> tuple[Column, ...]:
    """The columns of a dataclass, in order. Fields that are no columns are left out."""
    found = []
    for f in fields(schema):
        if "kind" in f.metadata:
            facts = f.metadata
            found.append(
                Column(f.name, facts["kind"], facts["doc"], facts["many"], f.default is not MISSING)
            )
    return tuple(found)


def read_columns(schema: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a dataclass from a row of the lake or of JSON.

    Raises:
        KeyError: a column that is not optional is missing.
    """
    values = {}
    for found in columns(schema):
        if found.name in row or not found.optional:
            values[found.name] = found.read(row[found.name])
    return values


def check_columns(row: Any) -> None:
    """Check every column of a dataclass instance.

    Raises:
        StoreError: a value has the wrong type or range; the text names its column.
    """
    schema: Any = type(row)
    for found in columns(schema):
        found.check(getattr(row, found.name))
