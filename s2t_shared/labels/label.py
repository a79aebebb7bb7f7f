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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from s2t_shared import policy as decide
from s2t_shared.errors import EvaluationSplitError, StoreError
from s2t_shared.types import SUPPORT_SIZE, WARMUP_STEPS, CandidateRule, LabelOptions, Step

SCHEMA_VERSION = 2
EVALUATION_SPLITS = frozenset(
    {"test", "eval", "evaluation", "heldout", "held_out", "held-out", "val", "validation", "dev"}
)
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Label:
    """One LLM selection, at one position of a rollout.

    position: tokens before it; the context is `rollout.token_ids[:position]`. candidate_ids: the
    SLM's top K in its order; slm_log_probs and llm_log_probs: natural logs of the same candidates
    over each model's whole vocabulary. llm_top_rank: place of the LLM's top-1 in the SLM's order, 0
    = first, -1 = outside its top 64. mass: the LLM's probability on the candidates. kl, entropy:
    nats, on the SLM's top-64 support.
    """

    label_id: str
    position: int
    candidate_ids: tuple[int, ...]
    slm_log_probs: tuple[float, ...]
    llm_log_probs: tuple[float, ...]
    llm_top_id: int
    llm_top_rank: int
    mass: float
    kl: float
    entropy: float

    @property
    def best(self) -> int:
        """Index of the LLM's best candidate (ties to the SLM's order)."""
        return max(range(len(self.candidate_ids)), key=lambda i: (self.llm_log_probs[i], -i))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer and its labels.

    token_ids: prompt and answer; the first `prompt_length` are the prompt. source: "plain" (greedy
    SLM, then scored), "intervened" (S2T decoding) or "online". entropy, kl (nats), llm_top_rank: of
    every position of the answer where all were scored, else empty; they say how often the LLM's
    choice is among the SLM's first K, also where no label is.
    """

    rollout_id: str
    request_id: str
    problem_id: str
    task: str
    split: str
    source: str
    token_ids: tuple[int, ...]
    prompt_length: int
    entropy: tuple[float, ...]
    kl: tuple[float, ...]
    llm_top_rank: tuple[int, ...]
    labels: tuple[Label, ...]
    slm_digest: str
    llm_digest: str
    tokenizer_digest: str
    template_digest: str
    created_at: float
    schema_version: int = SCHEMA_VERSION

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
        labels = tuple(Label(**_values(Label, label, _LABEL_LISTS)) for label in row["labels"])
        return cls(**_values(cls, row, _ROLLOUT_LISTS) | {"labels": labels})


_LABEL_LISTS = ("candidate_ids", "slm_log_probs", "llm_log_probs")
_ROLLOUT_LISTS = ("token_ids", "entropy", "kl", "llm_top_rank")


def _values(kind: type[Any], row: dict[str, Any], lists: tuple[str, ...]) -> dict[str, Any]:
    return {f.name: tuple(row[f.name]) if f.name in lists else row[f.name] for f in fields(kind)}


def check_split(split: str) -> None:
    """Raises EvaluationSplitError: calibrating, harvesting or training there would spoil every
    figure."""
    if split.strip().lower() in EVALUATION_SPLITS or not split.strip():
        raise EvaluationSplitError(
            f"split {split!r}: labels and thresholds must never come from an evaluation split; "
            "use training problems (split 'train')"
        )


def check_rollout(rollout: Rollout) -> None:
    """What a JSON text alone does not promise: anyone who can reach Redis may have written it.

    Raises: StoreError: a value has the wrong type or range. EvaluationSplitError: it comes from an
        evaluation split.
    """
    n = len(rollout.token_ids)
    whole = [*rollout.token_ids, rollout.prompt_length]
    real: list[Any] = [*rollout.entropy, *rollout.kl]
    texts = [
        getattr(rollout, f.name)
        for f in fields(Rollout)
        if f.name.endswith("_id") or f.name.endswith("_digest")
    ]
    for label in rollout.labels:
        whole += [label.position, label.llm_top_id, *label.candidate_ids]
        real += [*label.slm_log_probs, *label.llm_log_probs, label.mass, label.kl, label.entropy]
        texts.append(label.label_id)
        k = len(label.candidate_ids)
        if not k == len(label.slm_log_probs) == len(label.llm_log_probs) > 0:
            raise StoreError(
                "candidate_ids, slm_log_probs, llm_log_probs: empty or of different lengths"
            )
    ranks = [*rollout.llm_top_rank, *(label.llm_top_rank for label in rollout.labels)]
    if not (
        all(type(i) is int and 0 <= i < 2**31 for i in whole)
        and all(type(i) is int and -1 <= i < SUPPORT_SIZE for i in ranks)
    ):
        raise StoreError("token ids, ranks and positions must be whole numbers in range")
    if (
        not all(_is_float32(x) for x in real)
        or type(rollout.created_at) is not float
        or not math.isfinite(rollout.created_at)
    ):
        raise StoreError(
            "log-probabilities, entropy, kl, mass and created_at must be finite numbers"
        )
    try:
        "".join([*texts, rollout.task, rollout.split, rollout.source]).encode()
    except (TypeError, UnicodeEncodeError):
        raise StoreError("ids, digests, task, split and source must be texts") from None
    if not 0 < rollout.prompt_length <= n or not all(
        0 < label.position <= n for label in rollout.labels
    ):
        raise StoreError("prompt_length and label positions must lie inside token_ids")
    for values in (rollout.entropy, rollout.kl, rollout.llm_top_rank):
        if len(values) not in (0, n - rollout.prompt_length):
            raise StoreError("entropy, kl, llm_top_rank: one value per answer token, or none")
    check_split(rollout.split)


def _is_float32(value: Any) -> bool:
    return (
        type(value) is float and abs(value) < 1e30 or type(value) is int and abs(value) <= 1 << 24
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
    labels, context = (
        [],
        hashlib.sha256(
            json.dumps([SCHEMA_VERSION, *asdict(digests).values(), *prompt_ids]).encode()
        ),
    )
    for i, step in enumerate(steps):
        if step.support is not None and step.llm is not None and _is_label(step, options):
            labels.append(_label(context.copy(), start + i, step, rule))
        context.update(b",%d" % step.token_id)
    entropy: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()
    if steps and all(step.support is not None and step.llm is not None for step in steps):
        measured = [_position(step) for step in steps]
        entropy, kl = tuple(m[0] for m in measured), tuple(m[1] for m in measured)
        ranks = tuple(m[2] for m in measured)
    rollout = Rollout(
        rollout_id="",
        request_id=request_id,
        problem_id=options.problem_id,
        task=options.task,
        split=options.split,
        source=source,
        token_ids=token_ids,
        prompt_length=start,
        entropy=entropy,
        kl=kl,
        llm_top_rank=ranks,
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


def _is_label(step: Step, options: LabelOptions) -> bool:
    if not options.rules:
        return step.triggered
    if step.index < WARMUP_STEPS:
        return False
    return any(decide.step_signal(step, r.trigger) > r.threshold for r in options.rules)


def _position(step: Step) -> tuple[float, float, int]:
    """Entropy and KL of a scored step, and the rank of the LLM's first choice."""
    assert step.support is not None and step.llm is not None
    support, llm = step.support, step.llm
    rank = support.ids.index(llm.top_id) if llm.top_id in support.ids else -1
    return decide.entropy(support.log_probs), decide.kl(support.log_probs, llm.log_probs), rank


def _label(context: hashlib._Hash, position: int, step: Step, rule: CandidateRule) -> Label:
    """`context`: a hash of all tokens before `position` and of what scored them."""
    assert step.support is not None and step.llm is not None
    k = decide.candidate_count(rule, step.support.log_probs)
    candidates, scores = step.support.ids[:k], step.llm.log_probs[:k]
    entropy, kl, rank = _position(step)
    context.update(json.dumps(["candidates", *candidates]).encode())
    return Label(
        label_id=context.hexdigest()[:32],
        position=position,
        candidate_ids=candidates,
        slm_log_probs=step.support.log_probs[:k],
        llm_log_probs=scores,
        llm_top_id=step.llm.top_id,
        llm_top_rank=rank,
        mass=sum(math.exp(score) for score in scores),
        kl=kl,
        entropy=entropy,
    )


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(
        json.dumps([SCHEMA_VERSION, *parts], separators=(",", ":")).encode()
    ).hexdigest()[:32]
