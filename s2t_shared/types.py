"""Value types that every layer speaks: requests, policies, Steps, answers.

Imports the standard library only, so that a client can use the types without torch or numpy. Knows
no model, transport or storage. Natural logarithms everywhere; entropy and KL are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

MAX_CANDIDATES = 64
MAX_SAMPLES = 64
SUPPORT_SIZE = 64
WARMUP_STEPS = 3


class Mode(str, Enum):
    """How an answer is decoded."""

    GREEDY = "greedy"  # the SLM alone, argmax
    SAMPLE = "sample"  # the SLM alone, sampled
    S2T = "s2t"  # at a divergence point the LLM selects among the SLM's candidates
    S2T_LOCAL = "s2t_local"  # at a divergence point the local selector selects; no LLM
    TAKEOVER = (
        "takeover"  # at a divergence point the LLM's top-1 of the whole vocabulary is emitted
    )
    LLM = "llm"  # the LLM alone, argmax
    MAJORITY = "majority"  # n sampled SLM answers, majority vote of the extracted answers

    @property
    def asks_llm(self) -> bool:
        """Whether the mode itself needs the LLM. A KL trigger needs the LLM in any mode."""
        return self in (Mode.S2T, Mode.TAKEOVER, Mode.LLM)

    @property
    def can_trigger(self) -> bool:
        """Whether the mode does anything at a divergence point."""
        return self in (Mode.S2T, Mode.S2T_LOCAL, Mode.TAKEOVER)


class Trigger(str, Enum):
    """The signal that marks a divergence point. A step triggers strictly above the threshold."""

    ENTROPY = "entropy"
    KL = "kl"  # D(p_S || p_L)
    KL_REVERSE = "kl_reverse"  # D(p_L || p_S)
    MARGIN = "margin"
    RANDOM = "random"
    NEVER = "never"
    ALWAYS = "always"

    @property
    def needs_llm(self) -> bool:
        """Whether the signal is computed from the LLM's probabilities."""
        return self in (Trigger.KL, Trigger.KL_REVERSE)

    @property
    def needs_threshold(self) -> bool:
        """Whether the trigger compares a signal with a threshold."""
        return self not in (Trigger.NEVER, Trigger.ALWAYS)


# Triggers whose thresholds are measured for a budget.
CALIBRATED = (Trigger.ENTROPY, Trigger.MARGIN, Trigger.KL, Trigger.KL_REVERSE)


class SelectorKind(str, Enum):
    """Which tokens a local selector looks at to score candidates; see `model.local_selector`."""

    RESERVED = "reserved"
    PREFIX = "prefix"
    JOINT = "joint"


class Reading(str, Enum):
    """Over whose keys and values a local selector reads the context."""

    BASE = "base"  # the base model's: an activated LoRA
    ADAPTED = "adapted"  # the adapter's own: an ordinary LoRA


class Scoring(str, Enum):
    """How the logits of the reserved rows become a score."""

    EXPECTED = "expected"  # the expected bin value
    BINARY = "binary"  # the logit of the second bin


class Proposals(str, Enum):
    """Which weights of the SLM propose tokens: the base ones, or with the local selector's
    adapter."""

    BASE = "base"
    ADAPTED = "adapted"


class OnLLMFailure(str, Enum):
    """What an answer does when the LLM is needed and does not answer."""

    DEGRADE = "degrade"  # it goes on without the LLM, and its Steps say so
    FAIL = "fail"  # it ends with an error


class ChosenBy(str, Enum):
    """Who chose the token of a step."""

    SLM = "slm"  # the SLM's own top-1
    SAMPLER = "sampler"  # drawn from the SLM's distribution
    LLM = "llm"  # the LLM selector
    LOCAL = "local"  # the local selector


class FinishReason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    LLM_FAILED = "llm_failed"


# -- what to decode -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateRule:
    """Which of the SLM's top ids are candidates.

    k: 1..64. ratio: 0 takes the first `k`; a ratio in (0, 1] takes those of the first `k` with
    p >= ratio * p_max.
    """

    k: int = 8
    ratio: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What to do at each step. `threshold` is in the trigger's unit."""

    mode: Mode = Mode.GREEDY
    trigger: Trigger = Trigger.ENTROPY
    threshold: float = 0.0
    candidates: CandidateRule = CandidateRule()
    proposals: Proposals = Proposals.BASE
    warmup_steps: int = WARMUP_STEPS

    @property
    def can_trigger(self) -> bool:
        """Whether any step can be a divergence point."""
        return self.mode.can_trigger and self.trigger is not Trigger.NEVER

    @property
    def needs_llm(self) -> bool:
        """Whether decoding asks the LLM."""
        if self.mode is Mode.LLM:
            return True
        return self.can_trigger and (self.mode.asks_llm or self.trigger.needs_llm)


@dataclass(frozen=True)
class Sampling:
    """How `Mode.SAMPLE` draws. `top_k` 0 and `top_p` 1 switch those cuts off."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How a sequence is decoded, whether it came as text or as token ids.

    version: name of the local selector's version. None means the live one when the sequence starts,
    "" means none (the wire and the client write "none").
    score_rollout: after the answer the LLM scores every position in one prefill (plain harvest).
    keep_support: every Step keeps its support, not only the triggered ones.
    fresh_selections: the LLM is asked even where a cache knows the answer.
    on_llm_failure: whether the answer goes on without the LLM, or ends, when it does not answer.
    """

    policy: Policy = Policy()
    sampling: Sampling = Sampling()
    max_new_tokens: int = 256
    version: str | None = None
    score_rollout: bool = False
    keep_support: bool = False
    fresh_selections: bool = False
    on_llm_failure: OnLLMFailure = OnLLMFailure.DEGRADE

    @property
    def needs_llm(self) -> bool:
        """Whether the LLM takes part, during decoding or after it."""
        return self.policy.needs_llm or self.score_rollout


TraceHeaders = tuple[tuple[str, str], ...]  # W3C trace context; () where nothing is traced
StoppingCriteria = Callable[[int], bool]  # called with each emitted id; True ends the answer


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One sequence for the engine: token ids in, Steps out.

    deadline, start_by: `time.monotonic()` values in seconds. A sequence that has no place in the
    batch by `start_by` is not begun any more. turn: the lowest begins first, equal ones as they
    came. stopping: ends the answer by its text. decided: Steps that are decided already, by another
    engine; the sequence goes on behind them. llm_forwards: that they caused. trace: what its
    queries to the LLM belong to.
    """

    request_id: str
    token_ids: tuple[int, ...]
    options: DecodeOptions = DecodeOptions()
    deadline: float | None = None
    start_by: float | None = None
    turn: float = 0.0
    stopping: StoppingCriteria | None = None
    decided: tuple[Step, ...] = ()
    llm_forwards: int = 0
    trace: TraceHeaders = ()


@dataclass(frozen=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A prompt: exactly one of text, messages or token ids."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelRule:
    """A position becomes a label when the trigger's signal is strictly above the threshold."""

    trigger: Trigger
    threshold: float


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Whether and how an answer's LLM selections are kept as labels.

    Every LLM selection becomes a label. Of a scored rollout those positions become labels that one
    of `rules` marks. Empty rules are made from `triggers` and `budget` (share of positions per
    trigger). durable: the answer waits until its labels are stored durably. collect: the answer
    carries its labels. split: an evaluation split is refused. group: problems of one group are
    held out together; "" for a problem of its own.
    """

    store: bool = False
    task: str = ""
    problem_id: str = ""
    group: str = ""
    split: str = "train"
    triggers: tuple[Trigger, ...] = ()
    budget: float = 0.1
    rules: tuple[LabelRule, ...] = ()
    durable: bool = False
    collect: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One question and how to answer it.

    budget: share of steps that may trigger; None keeps `options.policy.threshold`.
    samples: n of majority@n. timeout_s: seconds; 0 means no deadline.
    return_steps: the answer carries the triggered Steps (with score_rollout: every Step).
    stream_steps: each Step is streamed as soon as it is decided.
    alternatives: streamed Steps whose support was kept say what the token could have been: all
    candidates, and at least so many of the SLM's top tokens. None: they do not.
    prompt_alternatives: the stream's first piece says how likely the SLM finds each token of the
    prompt, with so many of its top tokens. None: it does not.
    answer_pattern: regular expression that finds the answer in a text, for majority@n.
    client: who asks, as the gateway knows it: clients get equal shares of a proposer.
    progress: what another proposer has decided of the answer; None at its beginning.
    trace: what the answer belongs to.
    """

    request_id: str
    prompt: Prompt
    options: DecodeOptions = DecodeOptions()
    budget: float | None = None
    samples: int = 8
    stop: tuple[str, ...] = ()
    timeout_s: float = 0.0
    return_steps: bool = False
    stream_steps: bool = False
    alternatives: int | None = None
    prompt_alternatives: int | None = None
    labels: LabelOptions = LabelOptions()
    answer_pattern: str = ""
    client: str = ""
    progress: Progress | None = None
    trace: TraceHeaders = ()


# -- what the models say --------------------------------------------------------------------------


@dataclass(frozen=True)
class Support:
    """The SLM's top ids at one position, best first, at most 64.

    log_probs: over the whole vocabulary with reserved ids masked out; same order as `ids`.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreQuery:
    """The one selection primitive: log-probabilities of candidates at positions of a context.

    positions[i] asks for the distribution of the token that follows `token_ids[positions[i]]`.
    candidate_ids[i]: the ids wanted there; empty means that only the top-1 is wanted.
    excluded_ids (the reserved ids) and all ids >= vocab_size (0: no limit) get probability zero.
    fresh: a cache must not answer. patience_s: how long the caller waits, seconds; 0: not said.
    trace: what the query belongs to.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    candidate_ids: tuple[tuple[int, ...], ...]
    excluded_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    sequence_id: str = ""
    fresh: bool = False
    patience_s: float = 0.0
    trace: TraceHeaders = ()


@dataclass(frozen=True)
class PositionScores:
    """The LLM at one position: log-probabilities of the asked candidates, and its own top-1 id."""

    log_probs: tuple[float, ...]
    top_id: int


@dataclass(frozen=True)
class ScoreReply:
    """One `PositionScores` per asked position. cached: no LLM forward was needed."""

    positions: tuple[PositionScores, ...]
    llm_digest: str = ""
    cached: bool = False


# -- what was decided -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A token that could have been chosen at a step.

    slm, llm: the models' log-probabilities; None where it is not known. local: the local selector's
    score; None where it was not asked.
    """

    token_id: int
    text: str
    slm: float | None = None
    llm: float | None = None
    local: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decided token and how it came about. Text, metrics and labels are folded from Steps.

    signal: value of the trigger; None where it was not computed.
    candidate_ids, scores: at triggered steps only. Scores are the LLM's log-probabilities or the
    local selector's scores, by `chosen_by`.
    slm_top_id, llm_top_id: each model's own first choice, where known.
    entropy, kl: nats on the SLM's support. llm_top_rank: place of the LLM's first choice in the
    SLM's order, 0 = first, -1 = outside the support. All three only where the support was kept.
    llm_digest: of the LLM that answered; "" where none was asked or none answered.
    degraded: empty, or why the step did without the LLM.
    text: what this token added to the answer's text, where the text was asked for.
    support, llm: the two models' numbers; they stay in the process that decoded.
    chosen, alternatives: made of them where a request wants `alternatives`: the emitted token, and
    what it could have been, the SLM's best first.
    """

    index: int
    token_id: int
    chosen_by: ChosenBy = ChosenBy.SLM
    triggered: bool = False
    signal: float | None = None
    candidate_ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    slm_top_id: int | None = None
    llm_top_id: int | None = None
    llm_top_rank: int | None = None
    entropy: float | None = None
    kl: float | None = None
    llm_digest: str = ""
    degraded: str = ""
    text: str = ""
    support: Support | None = None
    llm: PositionScores | None = None
    chosen: Alternative | None = None
    alternatives: tuple[Alternative, ...] = ()

    def changed(self, **changes: Any) -> Step:
        """A copy with other values of the named fields.

        As `dataclasses.replace`, which takes ten times as long for so many fields: a Step is
        copied several times for every token.
        """
        assert changes.keys() <= self.__dict__.keys(), changes
        copy = object.__new__(Step)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    @property
    def flipped(self) -> bool:
        """Whether a divergence point changed the token."""
        return self.triggered and self.token_id != self.slm_top_id


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counts of one answer.

    llm_forwards: LLM forward passes that the answer caused; cache hits cost none.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    triggers: int = 0
    flips: int = 0
    llm_forwards: int = 0
    degraded_steps: int = 0

    def __add__(self, other: Usage) -> Usage:
        names = [f.name for f in fields(Usage)]
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class Versions:
    """Which weights made an answer: digests of SLM and LLM, version of the local selector.

    llm: "" when no LLM answered; the last one where it was replaced meanwhile.
    """

    slm: str = ""
    llm: str = ""
    local_selector: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer.

    labels_stored: labels that were handed to the label store.
    rollout: the rollout with its labels as JSON, when labels were to be collected.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    versions: Versions
    steps: tuple[Step, ...] = field(default=(), repr=False)
    labels_stored: int = 0
    rollout: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class AnswerPiece:
    """Part of a streamed answer.

    text: new since the last piece. steps: those that made it. answer: the whole, in the last piece.
    progress: what the piece adds to the answer's progress. prompt: the prompt's tokens as Steps,
    their indices below 0, in a piece of their own, where the request has `prompt_alternatives`.
    Both stay inside the service.
    """

    text: str = ""
    steps: tuple[Step, ...] = ()
    answer: Answer | None = None
    progress: Progress | None = field(default=None, repr=False)
    prompt: tuple[Step, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What was decided of an answer, and with what: all that another proposer needs to go on.

    token_ids: the decided ones. steps: those of them that are more than their token, because they
    triggered, were degraded or asked the LLM. llm_forwards: that the answer caused so far. slm:
    digest of the SLM. version: of the local selector, "" for none. threshold: of the trigger.
    """

    slm: str
    version: str
    threshold: float
    llm_forwards: int = 0
    token_ids: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def decided(self) -> tuple[Step, ...]:
        """One Step for each token."""
        more = {step.index: step for step in self.steps}
        ids = enumerate(self.token_ids)
        return tuple(more.get(i) or Step(index=i, token_id=token_id) for i, token_id in ids)


# -- what a service says of itself ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServiceDescription:
    """What a service runs.

    llm_digest: as last known, "" while no LLM was reached yet. llm_reachable: whether there is one
    to ask now. max_length: of prompt and answer, in tokens. live_version, canary_version: of the
    local selector, "" for none. canary_share: of the requests that name no version. proposers:
    replicas that run now. running_sequences, waiting_sequences and live_kv_slots are those
    of the one proposer that answered.
    """

    slm_digest: str
    tokenizer_digest: str
    template_digest: str
    llm_digest: str
    max_length: int
    llm_reachable: bool = False
    live_version: str = ""
    canary_version: str = ""
    canary_share: float = 0.0
    calibrated_triggers: tuple[Trigger, ...] = ()
    proposers: int = 1
    running_sequences: int = 0
    waiting_sequences: int = 0
    live_kv_slots: int = 0


@dataclass(frozen=True, kw_only=True)
class PublishedVersion:
    """A published local selector.

    created_at: Unix seconds. share: of the requests that name no version.
    metrics: held-out figures by name, for example agree_at_1.
    """

    name: str
    kind: str
    reads: str
    live: bool
    created_at: float
    share: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelCounts:
    """Where labels are.

    queued: rollouts in the stream that are not in the lake yet. in_lake: labels, duplicates
    included. dead_letters: stream entries that were not labels. dropped: labels that were lost, for
    whatever reason.
    """

    queued: int = 0
    in_lake: int = 0
    dead_letters: int = 0
    dropped: int = 0
