"""What a selection label is. Labels travel and rest inside the `Rollout` they were found in: its
tokens once, then each labelled position, which is also how the trainer reads them.

Labels arrive at least once and are deduplicated by `label_id`, a hash of everything that a label's
value depends on: context, candidates, and the digests of SLM, LLM, tokenizer and chat template.
(Only the last digits of a value depend on more: the arithmetic's precision, and what was in the
same batch.) Knows Steps; no files, Redis, models.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from s2t_shared.errors import StoreError
from s2t_shared.labels.schema import Kind, check_columns, column, columns
from s2t_shared.policy import candidate_count, step_signal
from s2t_shared.splits import check_split
from s2t_shared.types import (
    WARMUP_STEPS,
    CandidateRule,
    LabelOptions,
    LabelRule,
    Step,
    Trigger,
)

SCHEMA_VERSION = 2
HELD_OUT_SHARE = 0.1
TEXT, WHOLE, RANK, RANK16, REAL, TIME = Kind


@dataclass(frozen=True, kw_only=True)
class Label:
    """One LLM selection, at one position of a rollout: its context is `token_ids[:position]`."""

    label_id: str = column(TEXT, "hash of all that the label's value depends on; unique")
    position: int = column(WHOLE, "tokens of the rollout before the labelled one")
    candidate_ids: tuple[int, ...] = column(WHOLE, "the SLM's top K tokens, best first", many=True)
    slm_log_probs: tuple[float, ...] = column(
        REAL, "the SLM's natural-log probability of each candidate", many=True
    )
    llm_log_probs: tuple[float, ...] = column(
        REAL, "the LLM's natural-log probability of each candidate", many=True
    )
    llm_top_id: int = column(WHOLE, "the LLM's first choice over its whole vocabulary")
    llm_top_rank: int = column(
        RANK, "its place in the SLM's order, 0 = first, -1 = outside the SLM's top 64"
    )
    mass: float = column(REAL, "the LLM's probability on the candidates together")
    kl: float = column(REAL, "D(p_SLM || p_LLM) on the SLM's top 64, nats")
    entropy: float = column(REAL, "of p_SLM on its top 64, nats")

    @property
    def best(self) -> int:
        """Index of the LLM's best candidate (ties to the SLM's order)."""
        return max(range(len(self.candidate_ids)), key=lambda i: (self.llm_log_probs[i], -i))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer and its labels.

    entropy, kl and llm_top_rank say how often the LLM's choice is among the SLM's first K, also
    where no label is.
    """

    rollout_id: str = column(TEXT, "joins the labels of one answer")
    request_id: str = column(TEXT, "of the request that was answered")
    problem_id: str = column(TEXT, "as the harvest named it")
    task: str = column(TEXT, "as the harvest named it")
    split: str = column(TEXT, "that the prompt comes from")
    source: str = column(
        TEXT, "whose path it lies on: plain (the SLM's), intervened (S2T's) or online (served)"
    )
    token_ids: tuple[int, ...] = column(WHOLE, "prompt and answer", many=True)
    prompt_length: int = column(WHOLE, "tokens of the context that are the prompt")
    entropy: tuple[float, ...] = column(
        REAL, "of each answer position, nats; empty where not all were scored", many=True
    )
    kl: tuple[float, ...] = column(REAL, "D(p_SLM || p_LLM) of the same positions", many=True)
    llm_top_rank: tuple[int, ...] = column(
        RANK16, "place of the LLM's first choice at the same positions", many=True
    )
    labels: tuple[Label, ...]
    slm_digest: str = column(TEXT, "of the SLM's weights")
    llm_digest: str = column(TEXT, "of the LLM's weights")
    tokenizer_digest: str = column(TEXT, "of their common tokenizer")
    template_digest: str = column(TEXT, "of the chat template")
    created_at: float = column(TIME, "when it was made, Unix seconds")
    schema_version: int = column(WHOLE, "of these columns", default=SCHEMA_VERSION)

    @property
    def problem(self) -> str:
        """What a split into training and held-out problems goes by: the problem's id, else the
        prompt itself."""
        return (
            self.problem_id
            or hashlib.sha256(json.dumps(self.token_ids[: self.prompt_length]).encode()).hexdigest()
        )

    @property
    def held_out(self) -> bool:
        """Split by problem, by hash: stable when the lake grows, and no problem is on both
        sides."""
        digest = hashlib.sha256(f"{self.task}/{self.problem}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Rollout:
        """Raises StoreError: not a rollout of this schema version, or one whose values cannot
        be."""
        try:
            row = json.loads(text)
            if row["schema_version"] != SCHEMA_VERSION:
                raise StoreError(
                    f"labels of schema {row['schema_version']}, this program reads {SCHEMA_VERSION}"
                )
            rollout = cls.from_row(row)
            check_rollout(rollout)
            return rollout
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise StoreError(f"not labels: {type(error).__name__}: {error}") from error

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Rollout:
        """From a row of the lake or of JSON: the same names, lists for tuples."""
        labels = tuple(Label(**_values(Label, label)) for label in row["labels"])
        return cls(labels=labels, **_values(cls, row))


def _values(kind: type[Any], row: dict[str, Any]) -> dict[str, Any]:
    return {c.name: c.read(row[c.name]) for c in columns(kind)}


def check_rollout(rollout: Rollout) -> None:
    """What a JSON text alone does not promise: anyone who can reach Redis may have written it.

    Raises:
        StoreError: a value has the wrong type or range.
        EvaluationSplitError: it comes from an evaluation split.
    """
    check_columns(rollout)
    tokens = len(rollout.token_ids)
    answer = tokens - rollout.prompt_length
    if not 0 < rollout.prompt_length <= tokens:
        raise StoreError("prompt_length: must lie inside token_ids")
    for values in (rollout.entropy, rollout.kl, rollout.llm_top_rank):
        if len(values) not in (0, answer):
            raise StoreError("entropy, kl, llm_top_rank: one value per answer token, or none")
    for label in rollout.labels:
        _check_label(label, tokens)
    check_split(rollout.split)


def _check_label(label: Label, tokens: int) -> None:
    check_columns(label)
    if not 0 < label.position <= tokens:
        raise StoreError("position: must lie inside token_ids")
    k = len(label.candidate_ids)
    if not k == len(label.slm_log_probs) == len(label.llm_log_probs) > 0:
        raise StoreError(
            "candidate_ids, slm_log_probs, llm_log_probs: empty or of different lengths"
        )


@dataclass(frozen=True)
class Digests:
    """Which models, tokenizer and chat template a label's numbers come from."""

    slm: str
    llm: str
    tokenizer: str
    template: str = ""


def rollout_of(
    prompt_ids: Sequence[int],
    steps: Sequence[Step],
    rule: CandidateRule,
    options: LabelOptions,
    digests: Digests,
    request_id: str,
    source: str = "online",
) -> Rollout:
    """Fold the Steps of one answer into its rollout: a label for every LLM selection, or, of a
    scored rollout, for every position that one of `options.rules` marks.

    Raises:
        EvaluationSplitError: `options.split` names an evaluation split.
    """
    check_split(options.split)
    token_ids = (*prompt_ids, *(step.token_id for step in steps))
    start = len(prompt_ids)
    key = [SCHEMA_VERSION, *asdict(digests).values(), *prompt_ids]
    context = hashlib.sha256(json.dumps(key).encode())
    labels = []
    for i, step in enumerate(steps):
        if step.support is not None and step.llm is not None and _is_label(step, options):
            labels.append(_label(context.copy(), start + i, step, rule))
        context.update(b",%d" % step.token_id)
    scored = bool(steps) and all(s.support is not None and s.llm is not None for s in steps)
    measured = [s for s in steps if scored and s.entropy is not None and s.kl is not None]
    rollout = Rollout(
        rollout_id="",
        request_id=request_id,
        problem_id=options.problem_id,
        task=options.task,
        split=options.split,
        source=source,
        token_ids=token_ids,
        prompt_length=start,
        entropy=tuple(s.entropy for s in measured if s.entropy is not None),
        kl=tuple(s.kl for s in measured if s.kl is not None),
        llm_top_rank=tuple(s.llm_top_rank for s in measured if s.llm_top_rank is not None),
        labels=(),
        slm_digest=digests.slm,
        llm_digest=digests.llm,
        tokenizer_digest=digests.tokenizer,
        template_digest=digests.template,
        created_at=time.time(),
    )
    return with_labels(rollout, tuple(labels))


def with_labels(rollout: Rollout, labels: tuple[Label, ...]) -> Rollout:
    """The rollout with these labels, under the id that goes with them."""
    r = rollout
    key = [
        r.request_id,
        r.token_ids,
        [label.label_id for label in labels],
        bool(r.llm_top_rank),
        r.slm_digest,
        r.llm_digest,
        r.tokenizer_digest,
        r.template_digest,
    ]
    return replace(rollout, labels=labels, rollout_id=_hash(key))


def is_label(signals: Mapping[Trigger, float], rules: Sequence[LabelRule]) -> bool:
    """Whether a position is a label: one of its signals lies above its rule's threshold."""
    return any(signals[rule.trigger] > rule.threshold for rule in rules)


def _is_label(step: Step, options: LabelOptions) -> bool:
    if not options.rules:
        return step.triggered
    if step.index < WARMUP_STEPS:
        return False
    signals = {rule.trigger: step_signal(step, rule.trigger) for rule in options.rules}
    return is_label(signals, options.rules)


def _label(context: hashlib._Hash, position: int, step: Step, rule: CandidateRule) -> Label:
    """context: a hash of all tokens before `position` and of what scored them."""
    assert step.support is not None
    assert step.llm is not None
    assert step.llm_top_rank is not None and step.kl is not None and step.entropy is not None
    k = candidate_count(rule, step.support.log_probs)
    candidate_ids = step.support.ids[:k]
    llm_log_probs = step.llm.log_probs[:k]
    context.update(json.dumps(["candidates", *candidate_ids]).encode())
    return Label(
        label_id=context.hexdigest()[:32],
        position=position,
        candidate_ids=candidate_ids,
        slm_log_probs=step.support.log_probs[:k],
        llm_log_probs=llm_log_probs,
        llm_top_id=step.llm.top_id,
        llm_top_rank=step.llm_top_rank,
        mass=sum(math.exp(log_prob) for log_prob in llm_log_probs),
        kl=step.kl,
        entropy=step.entropy,
    )


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(
        json.dumps([SCHEMA_VERSION, *parts], separators=(",", ":")).encode()
    ).hexdigest()[:32]
