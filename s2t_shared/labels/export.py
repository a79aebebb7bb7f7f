"""The labels as a data set for others: one row a label, with its context.

    folder/
      README.md                            the dataset card (format hf only)
      data/train-00000-of-00002.parquet    zstd, of bounded size
      data/heldout-00000-of-00001.parquet  the problems that no training run sees

This is the layout that the Hugging Face hub and `datasets.load_dataset` expect. The same rows can
be written as JSON lines. The folder is written durably and atomically. Knows labels and files; of
models only the tokenizer, where text is wanted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from s2t_shared.errors import ConfigError, TokenizerMismatchError
from s2t_shared.files import new_folder
from s2t_shared.labels.label import SCHEMA_VERSION, Label, Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.schema import Column, Kind, columns
from s2t_shared.labels.shards import arrow_fields, arrow_type
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.splits import HELD_OUT_SHARE

EXPORT_BYTES = 256 << 20  # of a shard, about
BATCH_BYTES = 8 << 20  # of rows before they are written: one row group
SPLITS = ("train", "heldout")

# -- the columns ----------------------------------------------------------------------------------

# A row says where its label lies by its own context, and has a split of its own.
NOT_OF_LABEL = ("position",)
NOT_OF_ROLLOUT = ("request_id", "split", "created_at", "schema_version")
LABEL_COLUMNS = tuple(c for c in columns(Label) if c.name not in NOT_OF_LABEL)
ROLLOUT_COLUMNS = tuple(c for c in columns(Rollout) if not c.many and c.name not in NOT_OF_ROLLOUT)
COLUMNS = (
    Column("context_ids", Kind.WHOLE, "the full prefix: prompt, then the answer so far", True),
    *LABEL_COLUMNS,
    Column("step", Kind.WHOLE, "0-based index of the token in the answer", False),
    Column("split", Kind.TEXT, "train or heldout, by group of problems", False),
    *ROLLOUT_COLUMNS,
)
TEXT_COLUMNS = (
    Column("context", Kind.TEXT, "context_ids as text, special tokens shown", False),
    Column("candidates", Kind.TEXT, "each candidate as text", True),
)


def _columns(with_text: bool) -> tuple[Column, ...]:
    return COLUMNS + TEXT_COLUMNS if with_text else COLUMNS


# -- the export -----------------------------------------------------------------------------------


class ExportFormat(str, Enum):
    """What an export consists of."""

    HF = "hf"  # Parquet and a dataset card
    PARQUET = "parquet"
    JSONL = "jsonl"


@dataclass(kw_only=True)
class Exported:
    """What an export holds.

    labels: rows by split. tasks, sources: labels by name. pairs: labels by the digests of SLM, LLM,
    tokenizer and template.
    """

    snapshot: str
    labels: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.labels.total()

    def add(self, rollout: Rollout) -> None:
        count = len(rollout.labels)
        if not count:
            return
        digests = (
            rollout.slm_digest,
            rollout.llm_digest,
            rollout.tokenizer_digest,
            rollout.template_digest,
        )
        self.rollouts += 1
        self.labels[_split(rollout)] += count
        self.tasks[rollout.task] += count
        self.sources[rollout.source] += count
        self.pairs[digests] += count


def export_labels(
    lake: Lake,
    folder: Path,
    kind: ExportFormat = ExportFormat.HF,
    tokenizer: Tokenizer | None = None,
    on_labels: Callable[[int], None] = lambda count: None,
    shard_bytes: int = EXPORT_BYTES,
) -> Exported:
    """Write every label of the lake once, from a snapshot frozen now, to `folder`.

    tokenizer: contexts and candidates are written as text too. on_labels: called with the number of
    labels of each rollout.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written.
        TokenizerMismatchError: labels were made with another tokenizer.
        StoreError: the lake holds no labels, or a shard is damaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{str(folder)!r} exists and is not an empty folder; give another name, or remove it"
        )
    snapshot = lake.freeze()
    exported = Exported(snapshot=snapshot.id)
    with_text = tokenizer is not None
    try:
        with new_folder(folder.absolute()) as temporary:
            data = temporary / "data"
            data.mkdir()
            writers = {s: _writer(data, s, kind, with_text, shard_bytes) for s in SPLITS}
            for rollout in snapshot.rollouts():
                for row in _rows(rollout, tokenizer):
                    writers[row["split"]].write(row)
                exported.add(rollout)
                on_labels(len(rollout.labels))
            for writer in writers.values():
                writer.close()
            if kind is ExportFormat.HF:
                card = dataset_card(exported, with_text)
                (temporary / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot export to {str(folder)!r}: {reason}; free or grant space there"
        ) from error
    return exported


# -- rows -----------------------------------------------------------------------------------------


def _split(rollout: Rollout) -> str:
    return "heldout" if rollout.held_out else "train"


def _rows(rollout: Rollout, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    if tokenizer is not None and rollout.labels and rollout.tokenizer_digest != tokenizer.digest:
        raise TokenizerMismatchError(
            f"labels were made with the tokenizer {rollout.tokenizer_digest}, --with-text "
            f"names one with digest {tokenizer.digest}; give the SLM they were made with"
        )
    of_rollout = {column.name: getattr(rollout, column.name) for column in ROLLOUT_COLUMNS}
    of_rollout["split"] = _split(rollout)
    for label in rollout.labels:
        of_label = {column.name: getattr(label, column.name) for column in LABEL_COLUMNS}
        row = of_rollout | of_label
        row["context_ids"] = rollout.token_ids[: label.position]
        row["step"] = label.position - rollout.prompt_length
        if tokenizer is not None:
            row["context"] = _decode(tokenizer, row["context_ids"])
            row["candidates"] = [_decode(tokenizer, (i,)) for i in label.candidate_ids]
        yield row


def _decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    text = tokenizer.hf.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def _row_bytes(row: dict[str, Any]) -> int:
    """Approximate size of a row in memory."""
    ids = 4 * len(row["context_ids"]) + 12 * len(row["candidate_ids"])
    return 300 + ids + len(row.get("context", ""))


# -- files ----------------------------------------------------------------------------------------


class _ParquetFile:
    """One shard being written. Each call of `write` makes a row group."""

    suffix = "parquet"

    def __init__(self, path: Path, columns: Sequence[Column]) -> None:
        self._schema = pa.schema(arrow_fields(columns))
        self._stream = path.open("wb")
        self._writer = pq.ParquetWriter(self._stream, self._schema, compression="zstd")

    def write(self, rows: Sequence[dict[str, Any]]) -> int:
        """Append rows; returns the size of the file in bytes."""
        self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))
        return self._stream.tell()

    def close(self) -> None:
        self._writer.close()
        self._stream.close()


class _JsonlFile:
    """One shard of JSON lines being written."""

    suffix = "jsonl"

    def __init__(self, path: Path, columns: Sequence[Column]) -> None:
        self._names = [column.name for column in columns]
        self._stream = path.open("wb")

    def write(self, rows: Sequence[dict[str, Any]]) -> int:
        """Append rows; returns the size of the file in bytes."""
        for row in rows:
            ordered = {name: row[name] for name in self._names}
            line = json.dumps(ordered, ensure_ascii=False) + "\n"
            self._stream.write(line.encode())
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()


class _SplitWriter:
    """Writes the rows of one split to numbered files. Holds one batch of rows in memory."""

    def __init__(
        self,
        folder: Path,
        split: str,
        kind: type[_ParquetFile] | type[_JsonlFile],
        columns: Sequence[Column],
        shard_bytes: int,
    ) -> None:
        self._folder = folder
        self._split = split
        self._kind = kind
        self._columns = columns
        self._shard_bytes = shard_bytes
        self._rows: list[dict[str, Any]] = []
        self._rows_bytes = 0
        self._paths: list[Path] = []
        self._file: _ParquetFile | _JsonlFile | None = None

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._rows_bytes += _row_bytes(row)
        if self._rows_bytes >= min(BATCH_BYTES, self._shard_bytes):
            self._flush()

    def close(self) -> None:
        """Write the rest, and give the files their names, which say how many there are."""
        if self._rows:
            self._flush()
        self._end_file()
        count = len(self._paths)
        for number, path in enumerate(self._paths):
            name = f"{self._split}-{number:05}-of-{count:05}.{self._kind.suffix}"
            path.rename(self._folder / name)

    def _flush(self) -> None:
        if self._file is None:
            path = self._folder / f"{self._split}-{len(self._paths)}.part"
            self._paths.append(path)
            self._file = self._kind(path, self._columns)
        size = self._file.write(self._rows)
        self._rows = []
        self._rows_bytes = 0
        if size >= self._shard_bytes:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _writer(
    folder: Path, split: str, kind: ExportFormat, with_text: bool, shard_bytes: int
) -> _SplitWriter:
    file = _JsonlFile if kind is ExportFormat.JSONL else _ParquetFile
    return _SplitWriter(folder, split, file, _columns(with_text), shard_bytes)


# -- the card -------------------------------------------------------------------------------------

CARD = """
# Select-to-Think labels

Each row is one position of an answer of a small language model (SLM) where it was unsure, or
where a large one (LLM) disagreed: the SLM's candidates for the next token, and what the LLM
thinks of each. They train a *local selector*: the small model learns to choose among its own
candidates as the large one would (Select to Think, arXiv 2604.26940).

## What is in it

| split | labels |
|---|---|
{splits}

{total} labels of {rollouts} answers, each once. `heldout` holds every label of about
{held_out:.0%} of the problems, chosen by a hash of their name, which stays the same as the
collection grows: do not train on them. All were harvested from prompts declared as training data;
evaluation splits are refused by name.

| task | labels |
|---|---|
{tasks}

## How it was made

| whose path | labels |
|---|---|
{sources}

Labels lie at the positions that a harvest (`s2t harvest`) chose for their KL divergence or
entropy, or where a service asked the LLM; the columns `kl` and `entropy` say how they lie.
Written by `s2t labels export` from the snapshot `{snapshot}`, label schema {schema}. The models
that the numbers come from, as digests:

| SLM | LLM | tokenizer | chat template | labels |
|---|---|---|---|---|
{pairs}

Labels of different rows of this table must not be mixed in one training run.

## Columns

| column | type | meaning |
|---|---|---|
{columns}

## Licence and privacy

**The contexts hold what users or data sets asked, and the models' answers, as token ids{text};
token ids are text to anyone who has the tokenizer.** Before you pass this on: remove personal
data, and check the terms of the prompts' source and of both models. This export grants no licence
to any of them; the metadata says `other` until you decide.
"""


def dataset_card(exported: Exported, with_text: bool = False) -> str:
    """The README.md of an export, with the hub's metadata at its head."""
    metadata = yaml.safe_dump(_metadata(exported), sort_keys=False, allow_unicode=True)
    described = []
    for column in _columns(with_text):
        described.append((f"`{column.name}`", arrow_type(column), column.doc))
    pairs = [(*pair, count) for pair, count in sorted(exported.pairs.items())]
    body = CARD.format(
        splits=_table((split, exported.labels[split]) for split in SPLITS),
        total=exported.total,
        rollouts=exported.rollouts,
        held_out=HELD_OUT_SHARE,
        tasks=_table(sorted(exported.tasks.items())),
        sources=_table(sorted(exported.sources.items())),
        snapshot=exported.snapshot,
        schema=SCHEMA_VERSION,
        pairs=_table(pairs),
        columns=_table(described),
        text=" and as text" if with_text else "",
    )
    return f"---\n{metadata}---\n{body}"


def _metadata(exported: Exported) -> dict[str, Any]:
    data_files = []
    for split in SPLITS:
        if exported.labels[split]:
            data_files.append({"split": split, "path": f"data/{split}-*.parquet"})
    return {
        "pretty_name": "Select-to-Think labels",
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["select-to-think", "distillation", "token-selection"],
        "size_categories": [size_category(exported.total)],
        "configs": [{"config_name": "default", "data_files": data_files}],
    }


def _table(rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: Any) -> str:
    """The value on one line, without column breaks. Tasks are named by users."""
    text = str(value)
    for special, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;")):
        text = text.replace(special, escaped)
    return " ".join(text.split()) or "(none)"


def size_category(count: int) -> str:
    """The hub's name for a number of rows: n<1K, 1K<n<10K, ... n>1T."""
    steps = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    lower = ""
    for power, step in enumerate(steps, 3):
        if count < 10**power:
            return f"{lower}n<{step}"
        lower = f"{step}<"
    return "n>1T"
