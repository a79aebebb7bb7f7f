"""One data file of every format: the same rows, every broken one named, little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from s2t_shared.data.formats import count_rows, read_rows
from s2t_shared.errors import ConfigError, InvalidRequestError
from tests.helpers import prompt_files
from tests.helpers.prompt_files import ROWS, write_jsonl

FORMATS = [
    prompt_files.jsonl,
    prompt_files.gz,
    prompt_files.zst,
    prompt_files.json_list,
    prompt_files.comma_separated,
    prompt_files.tab_separated,
    prompt_files.parquet,
    prompt_files.arrow_file,
    prompt_files.arrow_stream,
]
UNCOUNTED = (prompt_files.json_list, prompt_files.comma_separated, prompt_files.tab_separated)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_same_rows_from_every_format(make: Callable[[Path], Path], tmp_path: Path) -> None:
    file = make(tmp_path)
    assert list(read_rows(file)) == list(enumerate(ROWS, 1))
    assert count_rows(file) == (None if make in UNCOUNTED else len(ROWS))


def test_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n007,42\n,\n", encoding="utf-8")
    rows = [row for _, row in read_rows(tmp_path / "a.csv")]
    assert rows == [{"id": "007", "prompt": "42"}, {"id": "", "prompt": ""}]


def test_csv_rows_with_too_many_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,prompt\n1,"two\nlines"\n2,b,c\n3,d\n', encoding="utf-8")
    (_, first), (number, error), (_, third) = read_rows(tmp_path / "a.csv")
    assert first == {"id": "1", "prompt": "two\nlines"}
    assert number == 2
    assert isinstance(error, InvalidRequestError)
    assert "more values" in str(error)
    assert third == {"id": "3", "prompt": "d"}


def test_bytes_that_are_no_text_break_one_line_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}\n{"prompt": "x\xe2\x80\xa8y"}'
    )
    first, broken, last = [row for _, row in read_rows(tmp_path / "a.jsonl")]
    assert first == {"prompt": "a"}
    assert last == {"prompt": "x\u2028y"}  # U+2028 ends no line of JSONL
    assert isinstance(broken, InvalidRequestError)
    assert "not JSON" in str(broken)


def test_lines_whatever_the_name(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "requests.csv", [{"prompt": "a"}])
    assert list(read_rows(file, as_lines=True)) == [(1, {"prompt": "a"})]
    file = write_jsonl(tmp_path / "requests.txt", [{"prompt": "a"}, "", {"prompt": "b"}])
    assert list(read_rows(file)) == [(1, {"prompt": "a"}), (3, {"prompt": "b"})]
    assert count_rows(file) == 2


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[junk")
    with pytest.raises(ConfigError, match=f"{name}.*cannot be read"):
        list(read_rows(tmp_path / name))


def test_a_table_cut_off_in_the_middle(tmp_path: Path) -> None:
    """Found at once or while reading, but always one typed error."""
    whole = prompt_files.gz(tmp_path).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    rows = read_rows(tmp_path / "cut.jsonl.gz")
    assert next(rows) == (1, ROWS[0])
    with pytest.raises(ConfigError, match=r"cut.jsonl.gz.*cannot be read"):
        list(rows)
