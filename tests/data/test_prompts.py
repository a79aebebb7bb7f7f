"""Rows become prompts: columns, templates, chats and ids; what is wrong with a row is named."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from s2t_shared.data.prompts import fingerprint, read, read_prompts
from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.types import Message, Prompt
from tests.helpers import prompt_files
from tests.helpers.prompt_files import (
    ROWS,
    read_errors_of,
    read_prompts_of,
    source_of,
    write_jsonl,
    write_parquet,
)

WHY = {"role": "user", "content": "Why?"}
SO = {"role": "assistant", "content": "So."}
SHORT = {"role": "system", "content": "Short."}
HOW = {"role": "user", "content": "How?"}


# -- columns, templates, chat ---------------------------------------------------------------------


def test_messages_in_tables(tmp_path: Path) -> None:
    file = write_parquet(
        tmp_path / "a.parquet", [{"messages": [WHY, SO]}, {"messages": [SHORT, HOW]}]
    )
    said: list[str] = []
    found = list(read(source_of(file), said.append))
    assert [prompt for _, prompt in found] == [
        Prompt(messages=(Message("user", "Why?"),)),
        Prompt(messages=(Message("system", "Short."), Message("user", "How?"))),
    ]
    assert [row["id"] for row, _ in found] == ["row-1", "row-2"]
    assert len(said) == 1
    assert "assistant" in said[0]


def test_token_ids_in_tables(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [{"token_ids": [1, 2]}, {"token_ids": [3]}])
    assert read_prompts_of(file) == [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]


def test_a_prompt_column_of_messages(tmp_path: Path) -> None:
    """Preference sets have it."""
    file = write_parquet(tmp_path / "a.parquet", [{"prompt": [WHY, SO]}])
    assert read_prompts_of(file) == [Prompt(messages=(Message("user", "Why?"),))]


def test_a_common_column_is_taken_and_said(tmp_path: Path) -> None:
    rows = [{"text": "t", "question": "q1"}, {"question": "q2"}, {"text": "t"}]
    said: list[str] = []
    source = source_of(write_jsonl(tmp_path / "a.jsonl", rows))
    found = [prompt for _, prompt in read(source, said.append)]
    assert found[:2] == [Prompt(text="q1"), Prompt(text="q2")]
    # Never a mixture of columns.
    assert "line 3: there is no column 'question', but 'text'" in str(found[2])
    assert len(said) == 1
    assert "'question'" in said[0]
    assert "--prompt-column" in said[0]


def test_a_column_can_be_chosen(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "question": "q"}])
    assert read_prompts_of(file, prompt_column="text") == [Prompt(text="t")]
    (error,) = read_errors_of(write_jsonl(tmp_path / "b.jsonl", [{"body": "x"}]))
    assert "none of prompt, messages, token_ids" in error


def test_first_of_prompt_messages_token_ids(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "messages": [WHY]}, {"prompt": None, "token_ids": [4]}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_prompts_of(file) == [Prompt(text="a"), Prompt(token_ids=(4,))]


def test_template(tmp_path: Path) -> None:
    row = {"question": "What is {x}?", "options": 3, "id": "a"}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    template = r"Q: {question}\nPick of {options}, in \boxed{}, as {{options}} {0}: "
    filled = "Q: What is {x}?\nPick of 3, in \\boxed{}, as {options} {0}: "
    assert read_prompts_of(file, template=template) == [Prompt(text=filled)]


def test_template_without_its_column(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "id": "a"}, {"question": None}])
    missing = read_errors_of(file, template="{Question}")
    empty = read_errors_of(file, template="{question}")
    assert missing[0] == "line 1: --template: there is no column 'Question', but 'question', 'id'"
    assert "holds no text" in empty[0]
    with pytest.raises(ConfigError, match="one of them"):
        read(source_of(file, template="{question}", prompt_column="question"))


def test_chat_and_system(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    hi = Message("user", "Hi")
    kind = Message("system", "Be kind.")
    assert read_prompts_of(file, chat=True) == [Prompt(messages=(hi,))]
    assert read_prompts_of(file, system="Be kind.") == [Prompt(messages=(kind, hi))]
    in_brackets = Prompt(messages=(Message("user", "<Hi>"),))
    assert read_prompts_of(file, template="<{prompt}>", chat=True) == [in_brackets]
    file = write_jsonl(tmp_path / "b.jsonl", [{"messages": [SHORT, HOW]}])
    (prompt,) = read_prompts_of(file, system="Other.")
    assert prompt.messages[0] == Message("system", "Short.")
    file = write_jsonl(tmp_path / "c.jsonl", [{"token_ids": [1]}])
    assert "token ids are taken as they are" in read_errors_of(file, chat=True)[0]


# -- ids ------------------------------------------------------------------------------------------


def test_ids_of_a_column(tmp_path: Path) -> None:
    lines = [{"key": 7, "prompt": "a"}, {"key": "7", "prompt": "b"}, {"prompt": "c"}]
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    (row, _), (_, twice), (_, without) = read(source_of(file, id_column="key"))
    assert row["id"] == "7"
    assert str(twice) == "line 2: \"key\" '7' was used before, in line 1"
    assert str(without) == "line 3: there is no column 'key', but 'prompt'"


def test_ids_are_the_rows_numbers_else(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a"}, "", {"prompt": "b"}])
    assert [row["id"] for row, _ in read(source_of(file))] == ["row-1", "row-3"]
    folder = tmp_path / "set"
    write_jsonl(folder / "1.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    write_jsonl(folder / "2.jsonl", [{"prompt": "c"}, {"prompt": "d", "id": "row-1"}])
    found = list(read(source_of(folder)))
    assert [row.get("id") for row, _ in found] == ["row-1", "row-2", "row-3", "row-1"]
    assert str(found[3][1]) == "row 4: \"id\" 'row-1' was used before, in row 1"


# -- what is wrong is named -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"id": [1], "prompt": "a"}', 'line 2: "id" must be a string or a whole number'),
        ('{"prompt": ""}', 'line 2: "prompt" must be a non-empty string'),
        ('{"prompt": 5}', 'line 2: "prompt" must be a non-empty string'),
        ('{"prompt": [1.5]}', 'line 2: "prompt" must be a non-empty string, or a list'),
        ('{"prompt": []}', 'line 2: "prompt" must be a non-empty list'),
        ('{"prompt": "\\ud800"}', 'line 2: "prompt" is not Unicode text'),
        ('{"id": "\\ud800", "prompt": "a"}', 'line 2: "id" is not Unicode text'),
        ('{"token_ids": [1, true]}', 'line 2: "token_ids" must hold whole numbers'),
        ('{"token_ids": "1 2"}', 'line 2: "token_ids" must be a non-empty list'),
        ('{"messages": []}', 'line 2: "messages" must be a non-empty list'),
        (
            '{"messages": [{"role": "user"}]}',
            'line 2: "messages" must hold objects with "role" and "content"',
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "line 2: the messages hold an assistant's turns only",
        ),
        ('{"prompt": "a", "split": "test"}', "line 2: split 'test': labels"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_line_is_named_and_the_others_go_on(
    tmp_path: Path, line: str, message: str
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, line, {"prompt": "b"}])
    first, broken, last = [prompt for _, prompt in read(source_of(file))]
    assert first == Prompt(text="a")
    assert isinstance(broken, InvalidRequestError)
    assert str(broken).startswith(message)
    assert last == Prompt(text="b")


def test_a_broken_row_of_a_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n1,a\n2,b,c\n", encoding="utf-8")
    found = [prompt for _, prompt in read(source_of(tmp_path / "a.csv"))]
    assert found[0] == Prompt(text="a")
    assert str(found[1]) == "row 2: more values than the header has names"


# -- requests, fingerprints, memory ---------------------------------------------------------------


def test_request_files_are_taken_literally(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"id": "a", "prompt": "x"},
        {"prompt": "x"},
        {"id": "b", "prompt": "x", "token_ids": [1]},
        {"id": "c"},
        {"id": "d", "messages": [WHY, SO]},
        {"id": "a", "prompt": "x"},
        {"id": 5, "prompt": "x", "split": "test"},
    ]
    found = list(read_prompts(write_jsonl(tmp_path / "requests.txt", lines)))
    errors = [str(prompt) for _, prompt in found if isinstance(prompt, InvalidRequestError)]
    exactly_one = 'give exactly one of "prompt", "messages", "token_ids"'
    assert errors == [
        'line 2: "id" is missing; give a string',
        f"line 3: {exactly_one} (found ['prompt', 'token_ids'])",
        f"line 4: {exactly_one} (found none)",
        "line 6: \"id\" 'a' was used before, in line 1",
    ]
    assert found[4][1] == Prompt(messages=(Message("user", "Why?"), Message("assistant", "So.")))
    assert found[6][0]["id"] == "5"
    assert found[6][0]["line"] == 7


def test_fingerprint_tells_content_and_options_not_places(tmp_path: Path) -> None:
    file = prompt_files.jsonl(tmp_path)
    first = fingerprint(source_of(file))
    moved = file.rename(tmp_path / "moved.jsonl")
    assert fingerprint(source_of(moved)) == first
    others: list[dict[str, Any]] = [
        {"split": "extra"},
        {"chat": True},
        {"template": "{prompt}"},
        {"system": ""},
        {"id_column": "id"},
    ]
    fingerprints = {fingerprint(source_of(moved, **options)) for options in others}
    assert len(fingerprints | {first}) == 6
    write_jsonl(moved, ROWS[1:])
    assert fingerprint(source_of(moved)) != first


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_reading_streams(tmp_path: Path, kind: str) -> None:
    """20 MB of prompts pass through much less memory."""
    rows = [{"id": str(i), "prompt": f"{i} " + "x" * 4000} for i in range(5_000)]
    file = tmp_path / f"big.{kind}"
    if kind == "jsonl":
        write_jsonl(file, rows)
    else:
        write_parquet(file, rows, row_group_size=250, compression="none")
    del rows
    before = pa.total_allocated_bytes()
    arrow = 0
    tracemalloc.start()
    try:
        for _ in read(source_of(file)):
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert arrow < 8 << 20
