"""Files of prompts, in every format that is read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2t_shared.data.prompts import PromptSource, read
from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import Prompt

ROWS = [{"id": f"p{i}", "prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(600)]
PART_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: part-*
  - split: test
    path: other.jsonl
---
# A set
"""


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    """One JSON object a line; a string is written as it stands."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


def write_parquet(file: Path, rows: list[Any], **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file


def source_of(path: Path | str, **options: Any) -> PromptSource:
    return PromptSource(source=str(path), **options)


def read_prompts_of(path: Path | str, **options: Any) -> list[Prompt]:
    """The prompts of a source in which nothing is broken."""
    found = [prompt for _, prompt in read(source_of(path, **options))]
    broken = [error for error in found if isinstance(error, InvalidRequestError)]
    assert not broken, broken
    return [prompt for prompt in found if isinstance(prompt, Prompt)]


def read_errors_of(path: Path | str, **options: Any) -> list[str]:
    """The errors of a source's broken rows."""
    found = [prompt for _, prompt in read(source_of(path, **options))]
    return [str(error) for error in found if isinstance(error, InvalidRequestError)]


# -- ROWS in every kind of source -----------------------------------------------------------------


def jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", ROWS)


def gz(folder: Path) -> Path:
    file = folder / "a.jsonl.gz"
    file.write_bytes(gzip.compress(jsonl(folder).read_bytes()))
    return file


def zst(folder: Path) -> Path:
    file = folder / "a.jsonl.zst"
    with pa.CompressedOutputStream(str(file), "zstd") as stream:
        stream.write(jsonl(folder).read_bytes())
    return file


def json_list(folder: Path) -> Path:
    file = folder / "a.json"
    file.write_text(" \n" + json.dumps(ROWS), encoding="utf-8-sig")
    return file


def comma_separated(folder: Path) -> Path:
    return _write_table(folder / "a.csv", ",")


def tab_separated(folder: Path) -> Path:
    return _write_table(folder / "a.tsv", "\t")


def _write_table(file: Path, delimiter: str) -> Path:
    lines = [delimiter.join(ROWS[0]), *(delimiter.join(row.values()) for row in ROWS)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def parquet(folder: Path) -> Path:
    return write_parquet(folder / "a.parquet", ROWS, row_group_size=100)


def arrow_file(folder: Path) -> Path:
    """The layout with an index at its end."""
    return _write_arrow(folder / "a.arrow", pa.ipc.new_file)


def arrow_stream(folder: Path) -> Path:
    """The layout that `datasets` writes."""
    return _write_arrow(folder / "a.arrow", pa.ipc.new_stream)


def _write_arrow(file: Path, new_writer: Any) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with new_writer(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=250)
    return file


def hub_layout(folder: Path) -> Path:
    """A hub repository's usual layout: the test split beside it must not leak in."""
    data = folder / "set/data"
    for part, rows in enumerate((ROWS[:250], ROWS[250:])):
        write_parquet(data / f"train-{part:05}-of-00002-ab12.parquet", rows)
    test = [{"id": "t", "prompt": "x", "answer": ""}]
    write_parquet(data / "test-00000-of-00001.parquet", test)
    return folder / "set"


def with_card(folder: Path) -> Path:
    """The dataset card's word goes over the files' names."""
    pytest.importorskip("datasets")
    write_jsonl(folder / "set/part-1.jsonl", ROWS[:10])
    write_jsonl(folder / "set/part-2.jsonl", ROWS[10:])
    write_jsonl(folder / "set/other.jsonl", [{"id": "t", "prompt": "x"}])
    (folder / "set/README.md").write_text(PART_CARD, encoding="utf-8")
    return folder / "set"


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(ROWS)
    test = datasets.Dataset.from_list(ROWS[:1])
    both = datasets.DatasetDict(train=train, test=test)
    both.save_to_disk(str(folder / "saved"), num_shards={"train": 3, "test": 1})
    return folder / "saved"


def saved_split(folder: Path) -> Path:
    return saved(folder) / "train"
