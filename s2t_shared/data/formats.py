"""Rows of one data file: JSON lines, a JSON list, CSV, TSV, Parquet or Arrow.

JSON and CSV may be compressed with gzip or Zstandard. One line, or one batch of a table, is in
memory at a time; only a JSON list is read whole. Text stays text: a CSV cell "007" is a string.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from s2t_shared.errors import ConfigError, InvalidRequestError

# A number from 1, and the row; or an InvalidRequestError in place of a row that cannot be read.
Record = tuple[int, Any]

LINE_KINDS = (".jsonl", ".ndjson", ".json")
KINDS = (*LINE_KINDS, ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
BATCH_ROWS = 256
MAX_JSON_LIST_BYTES = 1 << 30
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    csv.Error,
    pa.ArrowException,
    ValueError,
    ArithmeticError,
    RecursionError,
)


def kind_of(file: Path) -> str:
    """The suffix that names the format, in lower case, without that of the compression."""
    name = file.stem if file.suffix.lower() in COMPRESSED else file.name
    return Path(name).suffix.lower()


def is_lines(file: Path) -> bool:
    """Whether a file holds one JSON object a line. A file of an unknown kind does.

    Raises:
        ConfigError: the file cannot be read.
    """
    kind = kind_of(file)
    if kind not in KINDS:
        return True
    if kind != ".json":
        return kind in LINE_KINDS
    with readable(file), _open(file) as stream:
        start = stream.read(64).removeprefix(BYTE_ORDER_MARK)
        return not start.lstrip().startswith(b"[")


def read_rows(file: Path, as_lines: bool = False) -> Iterator[Record]:
    """The rows of a file, numbered from 1. as_lines: JSON lines, whatever the file's name.

    A row that cannot be read comes as an InvalidRequestError; the next rows follow.

    Raises:
        ConfigError: the file cannot be read, or is damaged further on.
    """
    with readable(file):
        if as_lines or is_lines(file):
            yield from _read_lines(file)
        elif kind_of(file) == ".json":
            yield from _read_list(file)
        elif kind_of(file) == ".parquet":
            yield from _read_parquet(file)
        elif kind_of(file) == ".arrow":
            yield from _read_arrow(file)
        else:
            yield from _read_csv(file)


def count_rows(file: Path) -> int | None:
    """How many rows a file has; None where only parsing all of it would tell.

    Raises:
        ConfigError: the file cannot be read.
    """
    with readable(file):
        if is_lines(file):
            with _open(file) as stream:
                return sum(1 for line in stream if line.strip())
        if kind_of(file) == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        if kind_of(file) == ".arrow":
            with pa.memory_map(str(file)) as stream:
                return sum(batch.num_rows for batch in _arrow_batches(stream))
        return None


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Translate what reading a file raises.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        yield
    except READ_ERRORS as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ConfigError(f"input {str(path)!r} cannot be read: {reason}") from error


def _open(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return file.open("rb")


def _read_lines(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield number, InvalidRequestError(f"not JSON ({error})")


def _read_list(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        content = stream.read(MAX_JSON_LIST_BYTES + 1)
    if len(content) > MAX_JSON_LIST_BYTES:
        raise ValueError(
            "a JSON list can only be read whole, and this one is too large; make it JSON lines"
        )
    yield from enumerate(json.loads(content), 1)


def _read_csv(file: Path) -> Iterator[Record]:
    delimiter = "\t" if kind_of(file) == ".tsv" else ","
    with _open(file) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        for number, row in enumerate(csv.DictReader(text, delimiter=delimiter), 1):
            if None in row:
                yield number, InvalidRequestError("more values than the header has names")
            else:
                yield number, row


def _read_parquet(file: Path) -> Iterator[Record]:
    # With other settings the whole file waits in memory.
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
        yield from _rows_of(table.iter_batches(BATCH_ROWS))


def _read_arrow(file: Path) -> Iterator[Record]:
    with pa.memory_map(str(file)) as stream:
        yield from _rows_of(_arrow_batches(stream))


def _arrow_batches(stream: Any) -> Iterator[Any]:
    """Record batches of either of Arrow's two layouts: the stream or the file."""
    try:
        yield from pa.ipc.open_stream(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        reader = pa.ipc.open_file(stream)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _rows_of(batches: Iterable[Any]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield number, row
