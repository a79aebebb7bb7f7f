"""The labels as a data set for others: one row a label, with its context, in Parquet shards of
bounded size and a dataset card, as the Hugging Face hub and `datasets.load_dataset` expect it; or
the same rows as JSON lines.

    folder/
      README.md                            what is in it, how it was made (format hf)
      data/train-00000-of-00002.parquet    zstd
      data/heldout-00000-of-00001.parquet  the problems that no training run sees

Written aside, renamed whole. Knows labels and files; of models only, where text is wanted, the
tokenizer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from s2t_shared.errors import ConfigError, TokenizerMismatchError
from s2t_shared.files import new_folder
from s2t_shared.labels.label import HELD_OUT_SHARE, SCHEMA_VERSION, Label, Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.schema import columns
from s2t_shared.labels.shards import arrow_type
from s2t_shared.model.tokenizer import Tokenizer

EXPORT_BYTES = 256 << 20  # of a shard, about
BATCH_BYTES = 8 << 20  # of rows before they are written: one row group
SPLITS = ("train", "heldout")

OWN_COLUMNS = (
    ("context_ids", pa.list_(pa.int32()), "the full prefix: prompt, then the answer so far"),
    ("step", pa.int32(), "0-based index of the token in the answer"),
    ("split", pa.string(), "train or heldout, by problem"),
)
ORDER = (
    "label_id context_ids candidate_ids slm_log_probs llm_log_probs llm_top_id llm_top_rank mass kl "
    "entropy step prompt_length split task problem_id source rollout_id slm_digest llm_digest "
    "tokenizer_digest template_digest"
).split()


def _all_columns() -> tuple[tuple[str, pa.DataType, str], ...]:
    """Name, type and meaning of every exported column: the label's, its rollout's, our own."""
    known = {}
    for column in (*columns(Rollout), *columns(Label)):
        known[column.name] = (column.name, arrow_type(column), column.doc)
    known |= {own[0]: own for own in OWN_COLUMNS}
    return tuple(known[name] for name in ORDER)


COLUMNS = _all_columns()
TEXT_COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("context", pa.string(), "context_ids as text, special tokens shown"),
    ("candidates", pa.list_(pa.string()), "each candidate as text"),
)


class ExportFormat(str, Enum):
    HF = "hf"  # Parquet and a dataset card
    PARQUET = "parquet"
    JSONL = "jsonl"


@dataclass
class Exported:
    """What an export holds. `labels`: rows by split; `pairs`: labels by (SLM, LLM, tokenizer,
    template) digests."""

    snapshot: str
    labels: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.labels.total()


def export_labels(
    lake: Lake,
    folder: Path,
    kind: ExportFormat = ExportFormat.HF,
    tokenizer: Tokenizer | None = None,
    on_labels: Callable[[int], None] = lambda count: None,
    shard_bytes: int = EXPORT_BYTES,
) -> Exported:
    """Write every label of the lake once, from a snapshot frozen now, to `folder`; with a
    `tokenizer` also as text.

    Raises: ConfigError: the folder exists and is not empty, or cannot be written.
        TokenizerMismatchError: labels were made with another tokenizer. StoreError: the lake holds
        no labels, or a shard is damaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{str(folder)!r} exists and is not an empty folder; give another name, or remove it"
        )
    snapshot = lake.freeze()
    exported = Exported(snapshot.id)
    try:
        with new_folder(folder.absolute()) as aside:
            (aside / "data").mkdir()
            writers = {
                split: _Shards(aside / "data", split, kind, tokenizer is not None, shard_bytes)
                for split in SPLITS
            }
            for rollout in snapshot.rollouts():
                for row in _rows(rollout, tokenizer):
                    writers[row["split"]].write(row)
                _tally(exported, rollout)
                on_labels(len(rollout.labels))
            for writer in writers.values():
                writer.close()
            if kind is ExportFormat.HF:
                (aside / "README.md").write_text(
                    dataset_card(exported, tokenizer is not None), encoding="utf-8"
                )
    except OSError as error:
        raise ConfigError(
            f"cannot export to {str(folder)!r}: {error.strerror or error}; free or grant space "
            "there"
        ) from error
    return exported


def _rows(rollout: Rollout, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    if tokenizer is not None and rollout.labels and rollout.tokenizer_digest != tokenizer.digest:
        raise TokenizerMismatchError(
            f"labels were made with the tokenizer {rollout.tokenizer_digest}, --with-text "
            f"names one with digest {tokenizer.digest}; give the SLM they were made with"
        )
    shared = {
        "split": SPLITS[rollout.held_out],
        "prompt_length": rollout.prompt_length,
        "task": rollout.task,
        "problem_id": rollout.problem_id,
        "source": rollout.source,
        "rollout_id": rollout.rollout_id,
        "slm_digest": rollout.slm_digest,
        "llm_digest": rollout.llm_digest,
        "tokenizer_digest": rollout.tokenizer_digest,
        "template_digest": rollout.template_digest,
    }
    for label in rollout.labels:
        context = rollout.token_ids[: label.position]
        row = {
            **shared,
            **_of_label(label),
            "context_ids": context,
            "step": label.position - rollout.prompt_length,
        }
        if tokenizer is not None:
            row["context"] = _decode(tokenizer, context)
            row["candidates"] = [_decode(tokenizer, (i,)) for i in label.candidate_ids]
        yield row


def _of_label(label: Label) -> dict[str, Any]:
    return {
        name: getattr(label, name)
        for name in (
            "label_id",
            "candidate_ids",
            "slm_log_probs",
            "llm_log_probs",
            "llm_top_id",
            "llm_top_rank",
            "mass",
            "kl",
            "entropy",
        )
    }


def _decode(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> str:
    return str(
        tokenizer.hf.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def _tally(exported: Exported, rollout: Rollout) -> None:
    count = len(rollout.labels)
    if count:
        exported.rollouts += 1
        exported.labels[SPLITS[rollout.held_out]] += count
        exported.tasks[rollout.task] += count
        exported.sources[rollout.source] += count
        exported.pairs[
            rollout.slm_digest,
            rollout.llm_digest,
            rollout.tokenizer_digest,
            rollout.template_digest,
        ] += count


class _Shards:
    """Rows of one split on their way to numbered files; one batch of rows in memory."""

    def __init__(
        self, folder: Path, split: str, kind: ExportFormat, text: bool, shard_bytes: int
    ) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._suffix = "jsonl" if kind is ExportFormat.JSONL else "parquet"
        self._names = [name for name, *_ in _columns(text)]
        self._schema = pa.schema([(name, type_) for name, type_, _ in _columns(text)])
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._paths: list[Path] = []
        self._stream: Any = None
        self._parquet: Any = None

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._size += (
            300
            + 4 * len(row["context_ids"])
            + 12 * len(row["candidate_ids"])
            + len(row.get("context", ""))
        )
        if self._size >= min(BATCH_BYTES, self._shard_bytes):
            self._flush()
            if self._stream.tell() >= self._shard_bytes:
                self._end()

    def close(self) -> None:
        """Write the rest, and give the files their names, which say how many there are."""
        self._flush()
        self._end()
        for number, path in enumerate(self._paths):
            path.rename(
                self._folder / f"{self._split}-{number:05}-of-{len(self._paths):05}.{self._suffix}"
            )

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._stream is None:
            self._paths.append(self._folder / f"{self._split}-{len(self._paths)}.part")
            self._stream = self._paths[-1].open("wb")
            if self._suffix == "parquet":
                self._parquet = pq.ParquetWriter(self._stream, self._schema, compression="zstd")
        if self._parquet is not None:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        else:
            self._stream.writelines(
                (
                    json.dumps({name: row[name] for name in self._names}, ensure_ascii=False) + "\n"
                ).encode()
                for row in self._rows
            )
        self._rows, self._size = [], 0

    def _end(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        if self._stream is not None:
            self._stream.close()
        self._stream = self._parquet = None


def _columns(text: bool) -> tuple[tuple[str, pa.DataType, str], ...]:
    return COLUMNS + TEXT_COLUMNS if text else COLUMNS


# -- the card -------------------------------------------------------------------------------------

CARD = """
# Select-to-Think labels

Each row is one position of an answer of a small language model (SLM) where it was unsure, or where a large one (LLM)
disagreed: the SLM's candidates for the next token, and what the LLM thinks of each. They train a *local selector*: the
small model learns to choose among its own candidates as the large one would (Select to Think, arXiv 2604.26940).

## What is in it

| split | labels |
|---|---|
{splits}

{total} labels of {rollouts} answers, each once. `heldout` holds every label of about {held_out:.0%} of the problems,
chosen by a hash of their name, which stays the same as the collection grows: do not train on them. All were harvested
from prompts declared as training data; evaluation splits are refused by name.

| task | labels |
|---|---|
{tasks}

## How it was made

| whose path | labels |
|---|---|
{sources}

Labels lie at the positions that a harvest (`s2t harvest`) chose for their KL divergence or entropy, or where a service
asked the LLM; the columns `kl` and `entropy` say how they lie. Written by `s2t labels export` from the snapshot
`{snapshot}`, label schema {schema}. The models that the numbers come from, as digests:

| SLM | LLM | tokenizer | chat template | labels |
|---|---|---|---|---|
{pairs}

Labels of different rows of this table must not be mixed in one training run.

## Columns

| column | type | meaning |
|---|---|---|
{columns}

## Licence and privacy

**The contexts hold what users or data sets asked, and the models' answers, as token ids{text}; token ids are text to
anyone who has the tokenizer.** Before you pass this on: remove personal data, and check the terms of the prompts'
source and of both models. This export grants no licence to any of them; the metadata says `other` until you decide.
"""


def dataset_card(exported: Exported, text: bool = False) -> str:
    """The README.md of an export, with the hub's metadata at its head."""
    metadata = {
        "pretty_name": "Select-to-Think labels",
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["select-to-think", "distillation", "token-selection"],
        "size_categories": [_size_category(exported.total)],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.parquet"}
                    for split in SPLITS
                    if exported.labels[split]
                ],
            }
        ],
    }
    body = CARD.format(
        splits=_table((split, exported.labels[split]) for split in SPLITS),
        total=exported.total,
        rollouts=exported.rollouts,
        held_out=HELD_OUT_SHARE,
        tasks=_table(sorted(exported.tasks.items())),
        sources=_table(sorted(exported.sources.items())),
        snapshot=exported.snapshot,
        schema=SCHEMA_VERSION,
        pairs=_table((*pair, count) for pair, count in sorted(exported.pairs.items())),
        columns=_table((f"`{name}`", type_, meaning) for name, type_, meaning in _columns(text)),
        text=" and as text" if text else "",
    )
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{body}"


def _table(rows: Any) -> str:
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)


def _cell(value: Any) -> str:
    """One line, no column breaks: tasks are named by users."""
    return (
        " ".join(str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
        or "(none)"
    )


def _size_category(count: int) -> str:
    """The hub's names: n<1K, 1K<n<10K, ... 1T<n."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for power, step in enumerate(steps):
        if count < 10 ** (power + 3):
            return f"n<{step}" if not power else f"{steps[power - 1]}<n<{step}"
    return "n>1T"
