"""What a selection label is, and the Parquet lake it ends in.

    lake/
      shard-<id>.parquet    labels, zstd
      shard-<id>.json       its manifest, written last: a shard without one does not exist
      snapshots/<id>.json   a frozen list of shards; a training run names the snapshot it read

Labels arrive at least once and are deduplicated by `label_id`, which hashes everything a label's value depends on.
Knows Steps and files; not Redis, not models.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2t_shared import policy as decide
from s2t_shared.errors import EvaluationSplitError, StoreError
from s2t_shared.files import sha256_file, write_atomically
from s2t_shared.types import WARMUP_STEPS, CandidateRule, LabelOptions, Step

SCHEMA_VERSION = 1
EVALUATION_SPLITS = frozenset({"test", "eval", "evaluation", "heldout", "held_out", "held-out", "val", "validation",
                               "dev"})


@dataclass(frozen=True)
class Label:
    """One LLM selection.

    context_ids: the full prefix. candidate_ids: the SLM's top K in its order; slm_log_probs and llm_log_probs:
    natural logs of the same candidates over each model's whole vocabulary. llm_top_rank: place of the LLM's top-1
    in the SLM's order, 0 = first, -1 = outside its top 64. mass: the LLM's probability on the candidates.
    kl, entropy: nats, on the SLM's top-64 support. step: 0-based index in the answer; rollout_id joins the labels
    of one answer.
    """

    label_id: str
    context_ids: tuple[int, ...]
    candidate_ids: tuple[int, ...]
    slm_log_probs: tuple[float, ...]
    llm_log_probs: tuple[float, ...]
    llm_top_id: int
    llm_top_rank: int
    mass: float
    kl: float
    entropy: float
    slm_digest: str
    llm_digest: str
    tokenizer_digest: str
    task: str
    problem_id: str
    split: str
    step: int
    rollout_id: str
    created_at: float
    schema_version: int = SCHEMA_VERSION

    @property
    def best(self) -> int:
        """Index of the LLM's best candidate (ties to the SLM's order)."""
        return max(range(len(self.candidate_ids)), key=lambda i: (self.llm_log_probs[i], -i))

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Label:
        """Raises StoreError: not a label of this schema version."""
        try:
            row = json.loads(text)
            if row["schema_version"] != SCHEMA_VERSION:
                raise StoreError(f"label of schema {row['schema_version']}, this program reads {SCHEMA_VERSION}")
            return cls.from_row(row)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"not a label: {type(error).__name__}: {error}") from error

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Label:
        values: dict[str, Any] = {f.name: row[f.name] for f in fields(cls)}
        return cls(**values | {name: tuple(values[name]) for name in LIST_FIELDS})


LIST_FIELDS = ("context_ids", "candidate_ids", "slm_log_probs", "llm_log_probs")
ARROW_SCHEMA = pa.schema(
    [("label_id", pa.string()), ("context_ids", pa.list_(pa.int32())), ("candidate_ids", pa.list_(pa.int32())),
     ("slm_log_probs", pa.list_(pa.float32())), ("llm_log_probs", pa.list_(pa.float32())),
     ("llm_top_id", pa.int32()), ("llm_top_rank", pa.int32()), ("mass", pa.float32()), ("kl", pa.float32()),
     ("entropy", pa.float32()), ("slm_digest", pa.string()), ("llm_digest", pa.string()),
     ("tokenizer_digest", pa.string()), ("task", pa.string()), ("problem_id", pa.string()), ("split", pa.string()),
     ("step", pa.int32()), ("rollout_id", pa.string()), ("created_at", pa.float64()), ("schema_version", pa.int32())],
    metadata={"s2t_schema_version": str(SCHEMA_VERSION)})


def check_split(split: str) -> None:
    """Raises EvaluationSplitError: calibrating, harvesting or training there would spoil every figure."""
    if split.strip().lower() in EVALUATION_SPLITS or not split.strip():
        raise EvaluationSplitError(f"split {split!r}: labels and thresholds must never come from an evaluation split; "
                                   "use training problems (split 'train')")


@dataclass(frozen=True)
class Digests:
    """Which models and tokenizer a label's numbers come from."""

    slm: str
    llm: str
    tokenizer: str


def labels_of(prompt_ids: Sequence[int], steps: Sequence[Step], rule: CandidateRule, options: LabelOptions,
              digests: Digests, rollout_id: str) -> list[Label]:
    """Fold the Steps of one answer into labels: every LLM selection, or, of a scored rollout, every position that
    one of `options.rules` marks.

    Raises:
        EvaluationSplitError: `options.split` names an evaluation split.
    """
    check_split(options.split)
    labels, context = [], list(prompt_ids)
    now = time.time()
    for step in steps:
        if step.support is not None and step.llm is not None and _is_label(step, options):
            labels.append(_label(tuple(context), step, rule, options, digests, rollout_id, now))
        context.append(step.token_id)
    return labels


def _is_label(step: Step, options: LabelOptions) -> bool:
    if not options.rules:
        return step.triggered
    if step.index < WARMUP_STEPS:
        return False
    return any(decide.step_signal(step, r.trigger) > r.threshold for r in options.rules)


def _label(context: tuple[int, ...], step: Step, rule: CandidateRule, options: LabelOptions, digests: Digests,
           rollout_id: str, now: float) -> Label:
    assert step.support is not None and step.llm is not None
    support, llm = step.support, step.llm
    k = decide.candidate_count(rule, support.log_probs)
    candidates, scores = support.ids[:k], llm.log_probs[:k]
    key = json.dumps([SCHEMA_VERSION, context, candidates, digests.slm, digests.llm, digests.tokenizer])
    return Label(
        label_id=hashlib.sha256(key.encode()).hexdigest()[:32], context_ids=context, candidate_ids=candidates,
        slm_log_probs=support.log_probs[:k], llm_log_probs=scores, llm_top_id=llm.top_id,
        llm_top_rank=support.ids.index(llm.top_id) if llm.top_id in support.ids else -1,
        mass=sum(math.exp(s) for s in scores), kl=decide.kl(support.log_probs, llm.log_probs),
        entropy=decide.entropy(support.log_probs), slm_digest=digests.slm, llm_digest=digests.llm,
        tokenizer_digest=digests.tokenizer, task=options.task, problem_id=options.problem_id, split=options.split,
        step=step.index, rollout_id=rollout_id, created_at=now)


# -- the lake -----------------------------------------------------------------------------------------------------


def write_shard(lake: Path, labels: Sequence[Label]) -> str:
    """Write one shard, then its manifest; returns the shard's name. A crash in between leaves nothing visible."""
    lake.mkdir(parents=True, exist_ok=True)
    name = f"shard-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
    columns = {f: [getattr(label, f) for label in labels] for f in ARROW_SCHEMA.names}
    path = lake / f"{name}.parquet"
    pq.write_table(pa.table(columns, schema=ARROW_SCHEMA), path, compression="zstd")
    manifest = {"shard": path.name, "rows": len(labels), "sha256": sha256_file(path), "schema_version": SCHEMA_VERSION}
    write_atomically(lake / f"{name}.json", json.dumps(manifest, indent=2))
    return name


def freeze_snapshot(lake: Path) -> str:
    """Record the shards there are now; returns the snapshot's id (a hash of their content).

    Raises:
        StoreError: the lake holds no complete shard.
    """
    manifests = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(lake.glob("shard-*.json"))]
    if not manifests:
        raise StoreError(f"no labels in the lake folder {lake.name!r}; harvest first (s2t harvest)")
    shards = [{"shard": m["shard"], "sha256": m["sha256"], "rows": m["rows"]} for m in manifests]
    snapshot = hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()[:16]
    (lake / "snapshots").mkdir(exist_ok=True)
    write_atomically(lake / "snapshots" / f"{snapshot}.json", json.dumps({"shards": shards}, indent=2))
    return snapshot


def read_snapshot(lake: Path, snapshot: str) -> list[Label]:
    """The labels of a snapshot, each once, in a stable order.

    Raises:
        StoreError: a shard is missing, changed, or of another schema.
    """
    listed = json.loads((lake / "snapshots" / f"{snapshot}.json").read_text(encoding="utf-8"))
    labels: dict[str, Label] = {}
    for entry in listed["shards"]:
        path = lake / entry["shard"]
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            raise StoreError(f"label shard {path.name} is missing or changed since the snapshot {snapshot}")
        for label in _read_shard(path):
            labels.setdefault(label.label_id, label)
    return sorted(labels.values(), key=lambda label: label.label_id)


def _read_shard(path: Path) -> Iterable[Label]:
    table = pq.read_table(path)
    if table.schema.names != ARROW_SCHEMA.names:
        raise StoreError(f"label shard {path.name} has another schema: {table.schema.names}")
    return (Label.from_row(row) for row in table.to_pylist())


def lake_rows(lake: Path) -> int:
    """Labels in complete shards, before deduplication."""
    return sum(json.loads(p.read_text(encoding="utf-8"))["rows"] for p in lake.glob("shard-*.json"))
