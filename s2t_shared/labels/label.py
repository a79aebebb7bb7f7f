"""What a selection label is, and how the Steps of an answer become labels.

Labels are stored and sent inside their `Rollout`: the tokens of an answer once, and each labelled
position. The dataclasses `Label` and `Rollout` are the one schema. The metadata of each field says
its type, its range and its meaning. JSON, `check_rollout`, the lake's Parquet files (`shards`) and
the exported data set (`export`) follow from it.

Labels arrive at least once and are deduplicated by `label_id`, a hash of everything that a label's
value depends on: context, candidates, and the digests of SLM, LLM, tokenizer and chat template.
(Only the last digits of a value depend on more: on the arithmetic's precision, and on what was in
the same batch.) Knows Steps; no files, no Redis, no models.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2t_shared import policy
from s2t_shared.errors import StoreError
from s2t_shared.labels.schema import Kind, check_columns, column, read_columns
from s2t_shared.splits import check_split, is_held_out
from s2t_shared.types import (
    SUPPORT_SIZE,
    WARMUP_STEPS,
    CandidateRule,
    LabelOptions,
    LabelRule,
    Step,
    Trigger,
)

SCHEMA_VERSION = 2
ROUNDING = 1e-3  # by which a probability may exceed 1: kernels round
TEXT, WHOLE, RANK, RANK16, REAL, TIME = Kind

# -- the schema -----------------------------------------------------------------------------------


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
        """Index of the LLM's best candidate (ties go to the SLM's order)."""
        return self.llm_log_probs.index(max(self.llm_log_probs))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer and its labels.

    entropy, kl and llm_top_rank say how often the LLM's choice is among the SLM's first K, also
    where no label is.
    """

    rollout_id: str = column(TEXT, "joins the labels of one answer")
    request_id: str = column(TEXT, "of the request that was answered")
    problem_id: str = column(TEXT, "as the harvest named it")
    group: str = column(
        TEXT, "problems of one group are held out together; empty: the problem alone", default=""
    )
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
        """The problem's id, else a hash of the prompt."""
        return self.problem_id or problem_of(self.token_ids[: self.prompt_length])

    @property
    def split_group(self) -> str:
        """What is held out or trained on together, and is not independent in a statistic.

        The group if the rollout has one, else the problem.
        """
        return self.group or self.problem

    @property
    def held_out(self) -> bool:
        """Whether no training run may see the labels."""
        return is_held_out(self.task, self.split_group)

    def to_json(self) -> str:
        # Not `asdict`: it copies every number.
        row = vars(self) | {"labels": [vars(label) for label in self.labels]}
        return json.dumps(row, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Rollout:
        """Read what `to_json` wrote.

        Raises:
            StoreError: not a rollout of this schema version, or a value is impossible.
            EvaluationSplitError: it comes from an evaluation split.
        """
        try:
            row = json.loads(text)
            check_version(row["schema_version"])
            rollout = cls.from_row(row)
            check_rollout(rollout)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise StoreError(f"not labels: {type(error).__name__}: {error}") from error
        return rollout

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Rollout:
        """From a row of the lake or of JSON: the same names, lists for tuples."""
        labels = tuple(Label(**read_columns(Label, label)) for label in row["labels"])
        return cls(labels=labels, **read_columns(Rollout, row))


def problem_of(prompt_ids: Sequence[int]) -> str:
    """The id of a problem that was given none: a hash of its prompt."""
    return hashlib.sha256(json.dumps(prompt_ids).encode()).hexdigest()


# -- checks ---------------------------------------------------------------------------------------


def check_version(version: Any) -> None:
    """Raises StoreError: it is another schema's."""
    if version != SCHEMA_VERSION:
        raise StoreError(f"labels of schema {version}, this program reads {SCHEMA_VERSION}")


def check_rollout(rollout: Rollout) -> None:
    """Check the values of a rollout. Anyone who can reach Redis may have written it.

    Raises:
        StoreError: a value has the wrong type, range or length.
        EvaluationSplitError: it comes from an evaluation split.
    """
    check_columns(rollout)
    length = len(rollout.token_ids)
    answer_length = length - rollout.prompt_length
    if not 0 < rollout.prompt_length <= length:
        raise StoreError("prompt_length: must lie inside token_ids")
    for values in (rollout.entropy, rollout.kl, rollout.llm_top_rank):
        if len(values) not in (0, answer_length):
            raise StoreError("entropy, kl, llm_top_rank: one value per answer token, or none")
    for label in rollout.labels:
        _check_label(label, length)
    check_split(rollout.split)


def _check_label(label: Label, length: int) -> None:
    check_columns(label)
    if not 0 < label.position <= length:
        raise StoreError("position: must lie inside token_ids")
    count = len(label.candidate_ids)
    if not count or {len(label.slm_log_probs), len(label.llm_log_probs)} != {count}:
        raise StoreError(
            "candidate_ids, slm_log_probs, llm_log_probs: empty or of different lengths"
        )


def check_sense(rollout: Rollout) -> None:
    """Check that the values of labels go together, as what an engine of ours made does.

    Raises:
        StoreError: they do not.
    """
    for label in rollout.labels:
        count = len(label.candidate_ids)
        if count > SUPPORT_SIZE or len(set(label.candidate_ids)) < count:
            raise StoreError(f"candidate_ids: must be at most {SUPPORT_SIZE}, each once")
        if max(*label.slm_log_probs, *label.llm_log_probs, label.mass - 1) > ROUNDING:
            raise StoreError("slm_log_probs, llm_log_probs, mass: must be of probabilities up to 1")
        _check_rank(label)


def _check_rank(label: Label) -> None:
    """Check that `llm_top_rank` is the place of `llm_top_id` among the candidates, or beyond."""
    rank = label.llm_top_rank
    if label.llm_top_id in label.candidate_ids:
        is_right = label.candidate_ids.index(label.llm_top_id) == rank
    else:
        is_right = rank == -1 or rank >= len(label.candidate_ids)
    if not is_right:
        raise StoreError(
            f"llm_top_rank={rank}: must be the place of llm_top_id={label.llm_top_id} among the "
            f"{len(label.candidate_ids)} candidates, or behind them, or -1"
        )


# -- which positions are labels -------------------------------------------------------------------


def is_label(signals: Mapping[Trigger, float], rules: Iterable[LabelRule]) -> bool:
    """Whether a scored position is a label: the signal of one rule is strictly above its threshold.

    signals: the values of the rules' triggers at the position, which lies behind the warm-up.
    """
    return any(signals[rule.trigger] > rule.threshold for rule in rules)


def _is_label(step: Step, rules: Sequence[LabelRule]) -> bool:
    if not _is_scored(step):
        return False
    if not rules:
        return step.triggered
    if step.index < WARMUP_STEPS:
        return False
    signals = {rule.trigger: policy.step_signal(step, rule.trigger) for rule in rules}
    return is_label(signals, rules)


def _is_scored(step: Step) -> bool:
    return step.support is not None and step.llm is not None


def _seen_by(llm_digest: str, step: Step) -> Step:
    """The Step without what another LLM said."""
    return step if step.llm_digest in ("", llm_digest) else step.changed(llm=None)


# -- from Steps to a rollout ----------------------------------------------------------------------


@dataclass(frozen=True)
class Digests:
    """Which models, tokenizer and chat template the numbers of a label come from."""

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
    """Fold the Steps of one answer into its rollout.

    Every LLM selection becomes a label, or, of a scored rollout, every position that one of
    `options.rules` marks. Steps that another LLM than `digests.llm` answered count as not scored.

    Raises:
        EvaluationSplitError: `options.split` names an evaluation split.
    """
    check_split(options.split)
    steps = [_seen_by(digests.llm, step) for step in steps]
    figures = [_figures(step) for step in steps if _is_scored(step)]
    if len(figures) < len(steps):
        figures = []
    rollout = Rollout(
        rollout_id="",
        request_id=request_id,
        problem_id=options.problem_id,
        group=options.group,
        task=options.task,
        split=options.split,
        source=source,
        token_ids=(*prompt_ids, *(step.token_id for step in steps)),
        prompt_length=len(prompt_ids),
        entropy=tuple(entropy for entropy, _, _ in figures),
        kl=tuple(kl for _, kl, _ in figures),
        llm_top_rank=tuple(rank for _, _, rank in figures),
        labels=(),
        slm_digest=digests.slm,
        llm_digest=digests.llm,
        tokenizer_digest=digests.tokenizer,
        template_digest=digests.template,
        created_at=time.time(),
    )
    return with_labels(rollout, _labels(prompt_ids, steps, rule, options.rules, digests))


def with_labels(rollout: Rollout, labels: tuple[Label, ...]) -> Rollout:
    """The rollout with these labels, under the id that goes with them."""
    key = [
        rollout.request_id,
        rollout.token_ids,
        [label.label_id for label in labels],
        bool(rollout.llm_top_rank),
        rollout.slm_digest,
        rollout.llm_digest,
        rollout.tokenizer_digest,
        rollout.template_digest,
    ]
    text = json.dumps([SCHEMA_VERSION, *key], separators=(",", ":"))
    rollout_id = hashlib.sha256(text.encode()).hexdigest()[:32]
    return replace(rollout, labels=labels, rollout_id=rollout_id)


def _labels(
    prompt_ids: Sequence[int],
    steps: Sequence[Step],
    rule: CandidateRule,
    rules: Sequence[LabelRule],
    digests: Digests,
) -> tuple[Label, ...]:
    labels = []
    models = [digests.slm, digests.llm, digests.tokenizer, digests.template]
    context = hashlib.sha256(json.dumps([SCHEMA_VERSION, *models, *prompt_ids]).encode())
    for i, step in enumerate(steps):
        if _is_label(step, rules):
            labels.append(_label(context.copy(), len(prompt_ids) + i, step, rule))
        context.update(b",%d" % step.token_id)
    return tuple(labels)


def _label(context: hashlib._Hash, position: int, step: Step, rule: CandidateRule) -> Label:
    """context: a hash of all tokens before `position` and of what scored them."""
    assert step.support is not None and step.llm is not None
    count = policy.candidate_count(rule, step.support.log_probs)
    candidate_ids = step.support.ids[:count]
    llm_log_probs = step.llm.log_probs[:count]
    entropy, kl, rank = _figures(step)
    context.update(json.dumps(["candidates", *candidate_ids]).encode())
    return Label(
        label_id=context.hexdigest()[:32],
        position=position,
        candidate_ids=candidate_ids,
        slm_log_probs=step.support.log_probs[:count],
        llm_log_probs=llm_log_probs,
        llm_top_id=step.llm.top_id,
        llm_top_rank=rank,
        mass=sum(math.exp(x) for x in llm_log_probs),
        kl=kl,
        entropy=entropy,
    )


def _figures(step: Step) -> tuple[float, float, int]:
    """Entropy, KL and the LLM's rank. The engine computes them wherever it keeps the support."""
    assert step.entropy is not None and step.kl is not None and step.llm_top_rank is not None
    return step.entropy, step.kl, step.llm_top_rank
