"""The columns of stored dataclasses: type, meaning and range, in the metadata of each field.

A dataclass whose fields are declared with `column` is its own schema. Whatever depends on the
field list asks for `columns`. Type names are Arrow's; pyarrow itself is needed in `shards` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any

from s2t_shared.errors import StoreError
from s2t_shared.types import SUPPORT_SIZE

LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Column:
    """Type, meaning and range of one field.

    type: name of an Arrow type, of a nested dataclass, or a list of them: "list<int32>".
    low, high: range of whole numbers, both included.
    """

    type: str
    doc: str
    low: int = 0
    high: int = LARGEST_INT32

    @cached_property
    def is_list(self) -> bool:
        return self.type.startswith("list<")

    @cached_property
    def item_type(self) -> str:
        """The type of one item of a list; of other columns the type."""
        return self.type.removeprefix("list<").removesuffix(">")

    def is_in_range(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high


def column(type: str, doc: str, low: int = 0, high: int = LARGEST_INT32) -> dict[str, Column]:
    """Metadata of a dataclass field."""
    return {"column": Column(type, doc, low, high)}


def rank_column(type: str, doc: str) -> dict[str, Column]:
    """Metadata of a field that holds places in the SLM's support, -1 for outside."""
    return column(type, doc, low=-1, high=SUPPORT_SIZE - 1)


@cache
def columns(schema: Any) -> dict[str, Column]:
    """The columns of a dataclass by name, in order."""
    return {f.name: f.metadata["column"] for f in fields(schema)}


def read_row(schema: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The dataclass's arguments from a row of the lake or of JSON: tuples for lists.

    Raises:
        KeyError: a value is missing.
        TypeError: a value is not a list where a list belongs.
    """
    values = {}
    for name, kind in columns(schema).items():
        values[name] = tuple(row[name]) if kind.is_list else row[name]
    return values


# -- checks ---------------------------------------------------------------------------------------


def check_values(stored: Any) -> None:
    """Check types and ranges of a dataclass's values. Nested dataclasses are not looked into.

    Raises:
        StoreError: a value has the wrong type or range.
    """
    schema: Any = type(stored)
    for name, kind in columns(schema).items():
        value = getattr(stored, name)
        accepts = ACCEPTS.get(kind.item_type, kind.is_in_range)
        accepted = all(map(accepts, value)) if kind.is_list else accepts(value)
        if not accepted:
            raise StoreError(f"{name}: not a {kind.type}, or out of range")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _is_float32(value: Any) -> bool:
    if type(value) is float:
        return abs(value) < 1e30
    return type(value) is int and abs(value) <= 1 << 24


def _is_float64(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_nested(value: Any) -> bool:
    return hasattr(value, "__dataclass_fields__")


ACCEPTS: dict[str, Callable[[Any], bool]] = {
    "string": _is_text,
    "float32": _is_float32,
    "float64": _is_float64,
    "label": _is_nested,
}
