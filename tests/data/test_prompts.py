"""Prompts from every kind of source: same rows, every broken one named, nothing held in memory, no
evaluation split."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2t_shared.data.prompts import PromptSource, count, fingerprint, read, read_prompts
from s2t_shared.errors import ConfigError, EvaluationSplitError, InvalidRequestError
from s2t_shared.types import Message, Prompt

ROWS = [{"id": f"p{i}", "prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(600)]


def jsonl(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )
    return file


def prompts(source: PromptSource | Path | str, **options: Any) -> list[Prompt]:
    rows = list(
        read(
            source
            if isinstance(source, PromptSource)
            else PromptSource(source=str(source), **options)
        )
    )
    assert not (errors := [p for _, p in rows if not isinstance(p, Prompt)]), errors
    return [p for _, p in rows if isinstance(p, Prompt)]


def errors(source: Path, **options: Any) -> list[str]:
    return [
        str(p)
        for _, p in read(PromptSource(source=str(source), **options))
        if isinstance(p, InvalidRequestError)
    ]


# -- every kind of source gives the same rows -----------------------------------------------------


def _jsonl(folder: Path) -> Path:
    return jsonl(folder / "a.jsonl", ROWS)


def _gz(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl(folder).read_bytes()))
    return folder / "a.jsonl.gz"


def _zst(folder: Path) -> Path:
    with pa.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as stream:
        stream.write(_jsonl(folder).read_bytes())
    return folder / "a.jsonl.zst"


def _list(folder: Path) -> Path:
    (folder / "a.json").write_text(" \n" + json.dumps(ROWS), encoding="utf-8-sig")
    return folder / "a.json"


def _csv(folder: Path) -> Path:
    lines = [",".join(row.values()) for row in ROWS]
    (folder / "a.csv").write_text("\n".join(["id,prompt,answer", *lines]), encoding="utf-8")
    return folder / "a.csv"


def _parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=100)
    return folder / "a.parquet"


def _parquets(folder: Path) -> Path:
    """A hub repository's usual layout: the test split beside it must not leak in."""
    data = folder / "set" / "data"
    data.mkdir(parents=True)
    for part, rows in enumerate((ROWS[:250], ROWS[250:])):
        pq.write_table(pa.Table.from_pylist(rows), data / f"train-{part:05}-of-00002-ab12.parquet")
    test = pa.Table.from_pylist([{"id": "t", "prompt": "x", "answer": ""}])
    pq.write_table(test, data / "test-00000-of-00001.parquet")
    return folder / "set"


def _card(folder: Path) -> Path:
    """The dataset card's word goes over the files' names."""
    jsonl(folder / "set/part-1.jsonl", ROWS[:10])
    jsonl(folder / "set/part-2.jsonl", ROWS[10:])
    jsonl(folder / "set/other.jsonl", [{"id": "t", "prompt": "x"}])
    (folder / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part-*\n"
        "  - split: test\n    path: other.jsonl\n---\n# A set\n",
        encoding="utf-8",
    )
    return folder / "set"


def _saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
    ).save_to_disk(str(folder / "saved"), num_shards={"train": 3, "test": 1})
    return folder / "saved"


def _saved_split(folder: Path) -> Path:
    return _saved(folder) / "train"


@pytest.mark.parametrize(
    "make",
    [_jsonl, _gz, _zst, _list, _csv, _parquet, _parquets, _card, _saved, _saved_split],
    ids=lambda f: f.__name__.strip("_"),
)
def test_same_rows_from_every_kind(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = PromptSource(source=str(make(tmp_path)))
    rows = list(read(source))
    assert [row["id"] for row, _ in rows] == [r["id"] for r in ROWS]
    assert [prompt for _, prompt in rows] == [Prompt(text=r["prompt"]) for r in ROWS]
    assert [row["answer"] for row, _ in rows] == [r["answer"] for r in ROWS]
    assert count(source) in (len(ROWS), None) and fingerprint(source) == fingerprint(source)
    if make not in (_list, _csv):
        assert count(source) == len(ROWS)


def test_messages_and_ids_in_tables(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "Short."},
                {"role": "user", "content": "How?"},
            ]
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    heard: list[str] = []
    found = list(read(PromptSource(source=str(tmp_path / "chats.parquet")), heard.append))
    assert [prompt.messages for _, prompt in found if isinstance(prompt, Prompt)] == [
        (Message("user", "Why?"),),
        (Message("system", "Short."), Message("user", "How?")),
    ]
    assert [row["id"] for row, _ in found] == ["row-1", "row-2"]
    assert len(heard) == 1 and "assistant" in heard[0]
    pq.write_table(pa.table({"token_ids": [[1, 2], [3]]}), tmp_path / "ids.parquet")
    assert [p.token_ids for p in prompts(tmp_path / "ids.parquet")] == [(1, 2), (3,)]
    # preference sets: a column "prompt" that holds messages
    pq.write_table(
        pa.Table.from_pylist([{"prompt": rows[0]["messages"]}]), tmp_path / "pairs.parquet"
    )
    assert [p.messages for p in prompts(tmp_path / "pairs.parquet")] == [(Message("user", "Why?"),)]


# -- columns, templates, chat ---------------------------------------------------------------------


def test_a_common_column_is_taken_and_said(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl", [{"text": "t", "question": "q1"}, {"question": "q2"}, {"text": "t"}]
    )
    heard: list[str] = []
    found = [p for _, p in read(PromptSource(source=str(file)), heard.append)]
    assert found[:2] == [Prompt(text="q1"), Prompt(text="q2")]
    assert "line 3: there is no column 'question', but 'text'" in str(found[2])  # never a mixture
    assert len(heard) == 1 and "'question'" in heard[0] and "--prompt-column" in heard[0]
    assert prompts(
        jsonl(tmp_path / "b.jsonl", [{"text": "t", "question": "q"}]), prompt_column="text"
    ) == [Prompt(text="t")]
    assert (
        "none of prompt, messages, token_ids"
        in errors(jsonl(tmp_path / "c.jsonl", [{"body": "x"}]))[0]
    )


def test_first_of_prompt_messages_token_ids(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"prompt": None, "token_ids": [4]},
    ]
    assert prompts(jsonl(tmp_path / "a.jsonl", rows)) == [Prompt(text="a"), Prompt(token_ids=(4,))]


def test_template(tmp_path: Path) -> None:
    row = {"question": "What is {x}?", "options": 3, "id": "a"}
    file = jsonl(tmp_path / "a.jsonl", [row])
    assert prompts(
        file, template=r"Q: {question}\nPick of {options}, in \boxed{}, as {{options}} {0}: "
    ) == [Prompt(text="Q: What is {x}?\nPick of 3, in \\boxed{}, as {options} {0}: ")]
    assert errors(file, template="{Question}") == [
        "line 1: --template: there is no column 'Question', but 'question', 'options', 'id'"
    ]
    assert (
        "holds no text"
        in errors(jsonl(tmp_path / "b.jsonl", [{"question": None}]), template="{question}")[0]
    )
    with pytest.raises(ConfigError, match="one of them"):
        read(PromptSource(source=str(file), template="{question}", prompt_column="question"))


def test_chat_and_system(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    assert prompts(file, chat=True) == [Prompt(messages=(Message("user", "Hi"),))]
    assert prompts(file, system="Be kind.") == [
        Prompt(messages=(Message("system", "Be kind."), Message("user", "Hi")))
    ]
    assert prompts(file, template="<{prompt}>", chat=True) == [
        Prompt(messages=(Message("user", "<Hi>"),))
    ]
    own = [{"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]}]
    assert prompts(jsonl(tmp_path / "b.jsonl", own), system="Other.")[0].messages[0] == Message(
        "system", "Own."
    )
    assert (
        "token ids are taken as they are"
        in errors(jsonl(tmp_path / "c.jsonl", [{"token_ids": [1]}]), chat=True)[0]
    )


def test_ids(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "a.jsonl",
        [{"key": 7, "prompt": "a"}, {"key": "7", "prompt": "b"}, {"prompt": "c"}],
    )
    rows = list(read(PromptSource(source=str(file), id_column="key")))
    assert rows[0][0]["id"] == "7"
    assert str(rows[1][1]) == "line 2: \"key\" '7' was used before, in line 1"
    assert str(rows[2][1]) == "line 3: there is no column 'key', but 'prompt'"
    numbered = [
        row["id"]
        for row, _ in read(
            PromptSource(
                source=str(jsonl(tmp_path / "b.jsonl", [{"prompt": "a"}, "", {"prompt": "b"}]))
            )
        )
    ]
    assert numbered == ["row-1", "row-3"]
    folder = tmp_path / "set"
    jsonl(folder / "1.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    jsonl(folder / "2.jsonl", [{"prompt": "c"}, {"prompt": "d", "id": "row-1"}])
    found = list(read(PromptSource(source=str(folder))))
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
        ('{"prompt": "\\ud800"}', 'line 2: "prompt" is not Unicode text'),
        ('{"id": "\\ud800", "prompt": "a"}', 'line 2: "id" is not Unicode text'),
        ('{"token_ids": [1, true]}', 'line 2: "token_ids" must hold whole numbers'),
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
    ids=lambda v: str(v)[:40],
)
def test_a_broken_line_is_named_and_the_others_go_on(
    tmp_path: Path, line: str, message: str
) -> None:
    found = list(
        read(
            PromptSource(
                source=str(jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, line, {"prompt": "b"}]))
            )
        )
    )
    assert [p for _, p in found if isinstance(p, Prompt)] == [Prompt(text="a"), Prompt(text="b")]
    assert str(found[1][1]).startswith(message)


def test_bytes_that_are_no_text_break_one_line_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}\n{"prompt": "x\xe2\x80\xa8y"}'
    )
    found = [p for _, p in read(PromptSource(source=str(tmp_path / "a.jsonl")))]
    assert (found[0], found[2]) == (
        Prompt(text="a"),
        Prompt(text="x\u2028y"),
    )  # U+2028 ends no line of JSONL
    assert "line 2: not JSON" in str(found[1])


def test_csv_rows_with_too_many_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,prompt\n1,"two\nlines"\n2,b,c\n', encoding="utf-8")
    found = [p for _, p in read(PromptSource(source=str(tmp_path / "a.csv")))]
    assert found[0] == Prompt(text="two\nlines") and "row 2: more values" in str(found[1])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[junk")
    with pytest.raises(ConfigError, match=f"{name}.*cannot be read"):
        list(read(PromptSource(source=str(tmp_path / name))))


def test_a_table_cut_off_in_the_middle(tmp_path: Path) -> None:
    """Found at once or while reading, but always one typed error."""
    whole = _gz(tmp_path).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    rows = read(PromptSource(source=str(tmp_path / "cut.jsonl.gz")))
    assert next(rows)[1] == Prompt(text="0 + 1 = ?")
    with pytest.raises(ConfigError, match=r"cut.jsonl.gz.*cannot be read"):
        list(rows)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("/nowhere.jsonl", "no such file"),
        ("data/nowhere.parquet", "no such file"),
        ("nowhere", "no such file"),
        ("org/name/deeper", "no such file"),
    ],
)
def test_nothing_there(where: str, message: str) -> None:
    for ask in (lambda s: list(read(s)), fingerprint, count):
        with pytest.raises(ConfigError, match=message):
            ask(PromptSource(source=where))


def test_folders_without_the_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split 'extra', but train, test"):
        read(PromptSource(source=str(_saved(tmp_path)), split="extra"))
    with pytest.raises(ConfigError, match="its card names no split 'extra', but train, test"):
        read(PromptSource(source=str(_card(tmp_path)), split="extra"))
    jsonl(tmp_path / "only/test.jsonl", ROWS[:1])
    with pytest.raises(ConfigError, match=r"no data files of split 'train' \(splits found: test"):
        read(PromptSource(source=str(tmp_path / "only")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no data files"):
        read(PromptSource(source=str(tmp_path / "empty")))


def test_configurations(tmp_path: Path) -> None:
    jsonl(tmp_path / "set/en/train.jsonl", [{"prompt": "one"}])
    jsonl(tmp_path / "set/de/train.jsonl", [{"prompt": "eins"}])
    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*\n"
        "- config_name: de\n  data_files: [de/train.jsonl]\n---\n",
        "utf-8",
    )
    assert prompts(f"{tmp_path}/set:de") == [Prompt(text="eins")]
    with pytest.raises(ConfigError, match=r"FOLDER:NAME \(there are: en, de\)"):
        read(PromptSource(source=str(tmp_path / "set")))
    card = (tmp_path / "set/README.md").read_text("utf-8")
    (tmp_path / "set/README.md").write_text(
        card.replace("name: de\n", "name: de\n  default: true\n"), "utf-8"
    )
    assert prompts(tmp_path / "set") == [Prompt(text="eins")]
    for bad in ("/etc/*", "**x"):
        (tmp_path / "set/README.md").write_text(card.replace("en/*", f"'{bad}'"), encoding="utf-8")
        with pytest.raises(ConfigError, match="no pattern inside it"):
            read(PromptSource(source=f"{tmp_path}/set:en"))
    jsonl(tmp_path / "outside.jsonl", [{"prompt": "secret"}])
    (tmp_path / "set/README.md").write_text(
        card.replace("en/*", "../outside.jsonl"), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="no data files"):
        read(PromptSource(source=f"{tmp_path}/set:en"))
    (tmp_path / "set/README.md").unlink()
    with pytest.raises(ConfigError, match="there are: none"):
        read(PromptSource(source=f"{tmp_path}/set:en"))
    (tmp_path / "set/README.md").write_text("---\nconfigs: [\n---\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="dataset card.*cannot be read"):
        read(PromptSource(source=str(tmp_path / "set")))


# -- evaluation splits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "split", ["test", "Validation", "test_sft", "validation-matched", "dev", ""]
)
def test_evaluation_splits_are_refused(tmp_path: Path, split: str) -> None:
    for ask in (read, fingerprint, count):
        with pytest.raises(EvaluationSplitError):
            ask(PromptSource(source=str(_jsonl(tmp_path)), split=split))


@pytest.mark.parametrize(
    "name", ["test.jsonl", "gsm8k_test.jsonl", "test-00000-of-00001.parquet", "val.parquet"]
)
def test_a_file_named_like_an_evaluation_split_is_refused(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / name, ROWS[:1])
    with pytest.raises(EvaluationSplitError, match="rename it"):
        read(PromptSource(source=str(tmp_path / name)))
    assert (
        name.endswith("parquet") or len(list(read_prompts(tmp_path / name))) == 1
    )  # to answer, not to learn


def test_a_saved_test_split_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path) / "test"
    state = json.loads((folder / "state.json").read_text("utf-8"))
    (folder / "state.json").write_text(json.dumps({**state, "_split": "test"}), encoding="utf-8")
    with pytest.raises(EvaluationSplitError):
        read(PromptSource(source=str(folder)))


def test_other_named_splits_can_be_chosen(tmp_path: Path) -> None:
    for split in ("train_sft", "train_gen", "test_sft"):
        jsonl(tmp_path / f"set/data/{split}-00000-of-00001.jsonl", [{"prompt": split}])
    assert prompts(tmp_path / "set", split="train_gen") == [Prompt(text="train_gen")]


# -- requests, fingerprints, memory ---------------------------------------------------------------


def test_request_files_are_taken_literally(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "prompt": "x"},
        {"prompt": "x"},
        {"id": "b", "prompt": "x", "token_ids": [1]},
        {"id": "c"},
        {
            "id": "d",
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        },
        {"id": "a", "prompt": "x"},
        {"id": 5, "prompt": "x", "split": "test"},
    ]
    found = list(read_prompts(jsonl(tmp_path / "requests.txt", lines)))
    assert [str(p) for _, p in found if isinstance(p, InvalidRequestError)] == [
        'line 2: "id" is missing; give a string',
        'line 3: give exactly one of "prompt", "messages", "token_ids" (found [\'prompt\', '
        "'token_ids'])",
        'line 4: give exactly one of "prompt", "messages", "token_ids" (found none)',
        "line 6: \"id\" 'a' was used before, in line 1",
    ]
    assert found[4][1] == Prompt(messages=(Message("user", "x"), Message("assistant", "y")))
    assert found[6][0]["id"] == "5" and found[6][0]["line"] == 7


def test_fingerprint_tells_content_and_options_not_places(tmp_path: Path) -> None:
    file = _jsonl(tmp_path)
    first = fingerprint(PromptSource(source=str(file)))
    moved = file.rename(tmp_path / "moved.jsonl")
    assert fingerprint(PromptSource(source=str(moved))) == first
    assert (
        len(
            {
                first,
                *(
                    fingerprint(PromptSource(source=str(moved), **o))
                    for o in (
                        {"split": "extra"},
                        {"chat": True},
                        {"template": "{prompt}"},
                        {"system": ""},
                        {"id_column": "id"},
                    )
                ),
            }
        )
        == 6
    )
    jsonl(moved, ROWS[1:])
    assert fingerprint(PromptSource(source=str(moved))) != first


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_reading_streams(tmp_path: Path, kind: str) -> None:
    """20 MB of prompts pass through much less memory."""
    rows = [{"id": str(i), "prompt": f"{i} " + "x" * 1000} for i in range(20_000)]
    file = tmp_path / f"big.{kind}"
    if kind == "jsonl":
        jsonl(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000, compression="none")
    del rows
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        arrow = 0
        for _ in read(PromptSource(source=str(file))):
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20 and arrow < 8 << 20


# -- the hub --------------------------------------------------------------------------------------


def test_hub_without_its_package_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: pip install 's2t\[hub\]'"):
        list(read(PromptSource(source="org/name:main")))


HUB_FILES = {
    "README.md": b"# A set\n",
    "data/train.jsonl": b'{"question": "q1"}\n{"question": "q2"}\n',
    "data/test.jsonl": b'{"question": "secret"}\n',
}
REVISION = "a1" * 20


class FakeHub(BaseHTTPRequestHandler):
    """As much of huggingface.co as reading one public data set takes."""

    def do_GET(self) -> None:
        path, api, files = (
            self.path.partition("?")[0],
            "/api/datasets/org/name",
            "/datasets/org/name/resolve/",
        )
        if path == api or path.startswith(f"{api}/revision/"):
            self.answer(
                200,
                {
                    "id": "org/name",
                    "sha": REVISION,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in HUB_FILES],
                },
            )
        elif path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            self.answer(
                200,
                [
                    entry
                    for entry in map(self.entry, ["data", *HUB_FILES])
                    if entry["path"].rpartition("/")[0] == folder
                ],
            )
        elif (
            path.startswith(files)
            and (name := path.removeprefix(files).partition("/")[2]) in HUB_FILES
        ):
            self.answer(200, HUB_FILES[name])
        else:
            self.answer(404, {}, "EntryNotFound" if path.startswith(files) else "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer(
            200, [self.entry(name) for name in paths if name == "data" or name in HUB_FILES]
        )

    def entry(self, name: str) -> dict[str, Any]:
        size = len(HUB_FILES.get(name, b""))
        return {
            "type": "file" if name in HUB_FILES else "directory",
            "oid": "0" * 40,
            "size": size,
            "path": name,
        }

    def answer(self, status: int, content: Any, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        start, _, end = (self.headers.get("Range") or "bytes=0-").partition("=")[2].partition("-")
        part = body[int(start) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers and status == 200 else status)
        for key, value in {
            "Content-Length": len(part),
            "X-Repo-Commit": REVISION,
            "ETag": '"1"',
            "X-Error-Code": error,
            "Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}",
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


HUB_READER = """
import json, sys
from s2t_shared.errors import S2TError
from s2t_shared.data.prompts import PromptSource, count, fingerprint, read
sources = (
    PromptSource(source="org/name"),
    PromptSource(source="org/other"),
    PromptSource(source="org/name", split="extra"),
)
for source in sources:
    try:
        rows = [[row["id"], prompt.text] for row, prompt in read(source)]
        told = rows, len(fingerprint(source)), count(source)
    except S2TError as error:
        told = f"{type(error).__name__}: {error}"
    print(json.dumps(told))
"""


def test_hub_ids_are_streamed(tmp_path: Path) -> None:
    """The real client packages against a small hub of our own: the right split, and errors that say
    what to check."""
    pytest.importorskip("datasets")
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", HUB_READER],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    found, missing, no_split = map(json.loads, done.stdout.splitlines()[-3:])
    assert found == [[["row-1", "q1"], ["row-2", "q2"]], 64, None]
    assert (
        missing.startswith("ConfigError: the hub's 'org/other' cannot be read: ")
        and "check the name" in missing
    )
    assert no_split.startswith("ConfigError") and "Available splits: ['train', 'test']" in no_split
