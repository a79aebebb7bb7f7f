"""The labels as a data set for others: one row a label, with its context.

    folder/
      README.md                            the dataset card (format hf only)
      data/train-00000-of-00002.parquet    zstd, of bounded size
      data/heldout-00000-of-00001.parquet  the problems that no training run sees

Written by several workers, the files of each shard of the lake have its name in theirs.

This is the layout that the Hugging Face hub and `datasets.load_dataset` expect. The same rows can
be written as JSON lines. The folder is written durably and atomically. Knows labels and files; of
models only the tokenizer, where text is wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from s2t_shared.errors import ConfigError, TokenizerMismatchError
from s2t_shared.labels.json_lines import json_lines
from s2t_shared.labels.label import SCHEMA_VERSION, Label, Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.places import folder_at, is_url, new_folder_at
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.rows import PART, Rows, arrow_fields, arrow_type
from s2t_shared.labels.schema import Column, Kind, columns
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.splits import HELD_OUT_SHARE

EXPORT_BYTES = 256 << 20  # of a shard, about
BATCH_TOKENS = 2 << 20  # of contexts: one row group
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


DIGESTS = ("slm_digest", "llm_digest", "tokenizer_digest", "template_digest")
# Values that repeat. Of the others a dictionary would be built and thrown away.
DICTIONARIES = ["llm_top_rank", "step", "split", *(column.name for column in ROLLOUT_COLUMNS)]


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
    pairs: Counter[tuple[str, ...]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.labels.total()

    def join(self, other: Exported) -> None:
        """Count what another part of the export holds."""
        self.rollouts += other.rollouts
        self.labels += other.labels
        self.tasks += other.tasks
        self.sources += other.sources
        self.pairs += other.pairs

    def add(self, rows: Rows) -> None:
        self.rollouts += int((rows.label_counts > 0).sum())
        held_out = rows.numbers(PART) != 0
        for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
            self.labels[split] += int(rows.label_counts[chosen].sum())
        self.tasks += Counter({task: n for (task,), n in rows.labels_by("task").items()})
        self.sources += Counter({source: n for (source,), n in rows.labels_by("source").items()})
        self.pairs += rows.labels_by(*DIGESTS)


def export_labels(
    lake: Lake,
    folder: Path | str,
    kind: ExportFormat = ExportFormat.HF,
    tokenizer: Tokenizer | None = None,
    on_rollouts: Callable[[int], None] = lambda count: None,
    shard_bytes: int = EXPORT_BYTES,
    run: Run | None = None,
) -> Exported:
    """Write every label of the lake once, from a snapshot frozen now, to `folder`.

    tokenizer: contexts and candidates are written as text too. on_rollouts: called with the number
    of rollouts that were written since the last call. run: applies a function to readers of one
    shard each, as `map` does; elsewhere, if it likes. Then each shard of the lake makes files of
    its own, and `folder`, if it is no URL, is one that all workers see.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written.
        TokenizerMismatchError: labels were made with another tokenizer.
        StoreError: the lake holds no labels, or a shard is damaged.
    """
    snapshot = lake.freeze()
    exported = Exported(snapshot=snapshot.id)
    with_text = tokenizer is not None
    try:
        with new_folder_at(folder) as temporary:
            data = temporary / "data"
            data.mkdir()
            reader = snapshot.reader()
            if run is None:
                with _Writers(data, "", kind, tokenizer, shard_bytes) as writers:
                    for shard in range(len(reader.shards)):
                        for rows in reader.tables(shard):
                            writers.write(rows)
                            exported.add(rows)
                            on_rollouts(len(rows))
            else:
                target = f"{folder}/data" if is_url(folder) else data
                work = partial(
                    export_part,
                    data=target,
                    kind=kind,
                    tokenizer=tokenizer,
                    shard_bytes=shard_bytes,
                )
                for part in run(work, map(reader.part, range(len(reader.shards)))):
                    exported.join(part)
                    on_rollouts(part.rollouts)
            if kind is ExportFormat.HF:
                card = dataset_card(exported, with_text)
                (temporary / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot export to {str(folder)!r}: {reason}; free or grant space there"
        ) from error
    return exported


def export_part(
    part: Reader,
    data: Path | str,
    kind: ExportFormat,
    tokenizer: Tokenizer | None,
    shard_bytes: int,
) -> Exported:
    """Write the labels of a reader's first shard, to files that are named after it.

    Raises:
        TokenizerMismatchError: labels were made with another tokenizer.
        StoreError: the shard is damaged.
    """
    exported = Exported(snapshot="")
    name = f"-{part.shards[0].name}"
    with (
        folder_at(data) as folder,
        _Writers(folder, name, kind, tokenizer, shard_bytes) as writers,
    ):
        for rows in part.tables(0):
            writers.write(rows)
            exported.add(rows)
    return exported


Run = Callable[[Callable[[Reader], Exported], Iterable[Reader]], Iterable[Exported]]


# -- rows -----------------------------------------------------------------------------------------


def _bounded(rows: Rows) -> Iterator[Rows]:
    """The rollouts in runs whose contexts have about BATCH_TOKENS tokens together."""
    if not len(rows):
        return
    of_label = rows.of_labels("position")
    ends = np.concatenate([[0], np.cumsum(of_label)])[np.cumsum(rows.label_counts)]
    cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]) + BATCH_TOKENS, BATCH_TOKENS), "right")
    for start, end in pairwise(np.unique([0, *cuts, len(rows)]).tolist()):
        yield rows.slice(start, end - start)


class _Writers:
    """Writes rollouts' labels, one a row, to the files of both splits. Their names begin with the
    split's and `suffix`."""

    def __init__(
        self,
        data: Path,
        suffix: str,
        kind: ExportFormat,
        tokenizer: Tokenizer | None,
        shard_bytes: int,
    ) -> None:
        file = _JsonlFile if kind is ExportFormat.JSONL else _ParquetFile
        self._tokenizer = tokenizer
        self._splits: dict[str, _SplitWriter] = {}
        for split in SPLITS:
            self._splits[split] = _SplitWriter(data, f"{split}{suffix}", file, shard_bytes)

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for writer in self._splits.values():
                writer.close()

    def write(self, rows: Rows) -> None:
        for part in _bounded(rows):
            self._write(part)

    def _write(self, rows: Rows) -> None:
        labelled = rows.where(rows.label_counts > 0)
        if self._tokenizer is not None:
            for digest in labelled.column("tokenizer_digest").unique().to_pylist():
                _check_tokenizer(digest, self._tokenizer)
        held_out = labelled.numbers(PART) != 0
        for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
            of_split = labelled.where(chosen)
            if len(of_split):
                self._splits[split].write(_label_table(of_split, split, self._tokenizer))


def _check_tokenizer(digest: str, tokenizer: Tokenizer) -> None:
    if digest != tokenizer.digest:
        raise TokenizerMismatchError(
            f"labels were made with the tokenizer {digest}, --with-text names one with "
            f"digest {tokenizer.digest}; give the SLM they were made with"
        )


def _label_table(rows: Rows, split: str, tokenizer: Tokenizer | None) -> pa.Table:
    of = np.repeat(np.arange(len(rows)), rows.label_counts)  # each label's rollout
    positions = rows.of_labels("position")
    contexts = _contexts(rows, of, positions)
    arrays = {
        "context_ids": contexts,
        "step": pa.array(positions - rows.numbers("prompt_length")[of], pa.int32()),
        "split": pa.repeat(pa.scalar(split), len(of)),
    }
    arrays |= {column.name: rows.labels.field(column.name) for column in LABEL_COLUMNS}
    numbers = pa.array(of)
    arrays |= {column.name: rows.column(column.name).take(numbers) for column in ROLLOUT_COLUMNS}
    if tokenizer is not None:  # text by text: that is how tokenizers work
        candidates = arrays["candidate_ids"].to_pylist()
        arrays["context"] = pa.array([_decode(tokenizer, ids) for ids in contexts.to_pylist()])
        arrays["candidates"] = pa.array([[_decode(tokenizer, [i]) for i in c] for c in candidates])
    schema = pa.schema(arrow_fields(_columns(tokenizer is not None)))
    return pa.table({name: arrays[name] for name in schema.names}, schema=schema)


def _contexts(rows: Rows, of: np.ndarray, positions: np.ndarray) -> pa.ListArray:
    """The first `positions[i]` tokens of rollout `of[i]`."""
    lengths = rows.lengths("token_ids")
    starts = (np.cumsum(lengths) - lengths)[of]
    ends = np.cumsum(positions, dtype=np.int64)
    within = np.arange(ends[-1]) - np.repeat(ends - positions, positions)
    tokens = rows.values("token_ids")[np.repeat(starts, positions) + within]
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))


def _decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    text = tokenizer.hf.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


# -- files ----------------------------------------------------------------------------------------


class _ParquetFile:
    """One shard being written. Each call of `write` makes a row group."""

    suffix = "parquet"

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._stream = path.open("wb")
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": DICTIONARIES}
        self._writer = pq.ParquetWriter(self._stream, schema, **options)

    def write(self, rows: pa.Table) -> int:
        """Append rows; returns the size of the file in bytes."""
        self._writer.write_table(rows)
        return self._stream.tell()

    def close(self) -> None:
        self._writer.close()
        self._stream.close()


class _JsonlFile:
    """One shard of JSON lines being written."""

    suffix = "jsonl"

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._stream = path.open("wb")

    def write(self, rows: pa.Table) -> int:
        """Append rows; returns the size of the file in bytes."""
        self._stream.write(json_lines(rows))
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()


class _SplitWriter:
    """Writes the rows of one split to numbered files of about `shard_bytes`."""

    def __init__(
        self,
        folder: Path,
        split: str,
        kind: type[_ParquetFile] | type[_JsonlFile],
        shard_bytes: int,
    ) -> None:
        self._folder = folder
        self._split = split
        self._kind = kind
        self._shard_bytes = shard_bytes
        self._paths: list[Path] = []
        self._file: _ParquetFile | _JsonlFile | None = None

    def write(self, rows: pa.Table) -> None:
        # So many rows at once that a file does not become much larger than it may.
        step = max(1, rows.num_rows * self._shard_bytes // max(1, rows.nbytes))
        for start in range(0, rows.num_rows, step):
            self._append(rows.slice(start, step))

    def _append(self, rows: pa.Table) -> None:
        if self._file is None:
            path = self._folder / f"{self._split}-{len(self._paths)}.part"
            self._paths.append(path)
            self._file = self._kind(path, rows.schema)
        if self._file.write(rows) >= self._shard_bytes:
            self._end_file()

    def close(self) -> None:
        """Give the files their names, which say how many there are."""
        self._end_file()
        count = len(self._paths)
        for number, path in enumerate(self._paths):
            name = f"{self._split}-{number:05}-of-{count:05}.{self._kind.suffix}"
            path.rename(self._folder / name)

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


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
