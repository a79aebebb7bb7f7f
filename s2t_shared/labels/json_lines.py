"""Columns of a table as JSON lines, by Arrow's kernels: `json.dumps` sees unusual texts only."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.compute as pc

NEEDS_ESCAPE = r'["\\\x00-\x1f]'


def json_lines(table: pa.Table) -> bytes:
    """One object per row and line; numbers read back as the same numbers."""
    if not table.num_rows:
        return b""
    table = table.combine_chunks()
    parts: list[pa.Array | str] = []
    for number, name in enumerate(table.column_names):
        parts.append(f"{', ' if number else '{'}{json.dumps(name)}: ")
        parts.append(_texts(table.column(number).chunk(0)))
    lines = pc.binary_join_element_wise(*parts, "}", "")
    return "\n".join(lines.to_pylist() + [""]).encode()


def _texts(values: pa.Array) -> pa.Array:
    """The JSON of each value."""
    if pa.types.is_list(values.type):
        lists = pa.ListArray.from_arrays(values.offsets, _texts(values.values))
        return pc.binary_join_element_wise("[", pc.binary_join(lists, ", "), "]", "")
    if pa.types.is_string(values.type):
        return _quoted(values)
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())  # the shortest text that gives this very number
    return values.cast(pa.string())


def _quoted(texts: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring_regex(texts, NEEDS_ESCAPE)).as_py():
        return pc.binary_join_element_wise('"', texts, '"', "")
    distinct = texts.dictionary_encode()
    escaped = [json.dumps(text, ensure_ascii=False) for text in distinct.dictionary.to_pylist()]
    return pa.array(escaped, pa.string()).take(distinct.indices)
