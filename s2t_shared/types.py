"""The value types that everything else speaks: requests, policies, Steps. No behaviour beyond small derivations.

Knows nothing of models, transports or storage; imports the standard library only, so that clients can use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Mode(str, Enum):
    """How an answer is made (DESIGN section 1)."""

    GREEDY = "greedy"  # the SLM alone, argmax
    SAMPLE = "sample"  # the SLM alone, sampled
    S2T = "s2t"  # at a divergence point the LLM selects among the SLM's candidates
    S2T_LOCAL = "s2t_local"  # at a divergence point the distilled local selector selects; no LLM
    TAKEOVER = "takeover"  # at a divergence point the LLM's top-1 over the whole vocabulary is emitted
    LLM = "llm"  # the LLM alone, argmax
    MAJORITY = "majority"  # n sampled SLM answers, majority vote of the extracted answers

    @property
    def asks_llm(self) -> bool:
        """Whether the mode itself needs the LLM (a KL trigger needs it too)."""
        return self in (Mode.S2T, Mode.TAKEOVER, Mode.LLM)


class Trigger(str, Enum):
    """The signal that marks a divergence point; a step triggers when it is strictly above the threshold."""

    ENTROPY = "entropy"
    KL = "kl"  # D(p_S || p_L)
    KL_REVERSE = "kl_reverse"  # D(p_L || p_S)
    MARGIN = "margin"
    RANDOM = "random"
    NEVER = "never"
    ALWAYS = "always"

    @property
    def needs_llm(self) -> bool:
        return self in (Trigger.KL, Trigger.KL_REVERSE)

    @property
    def needs_threshold(self) -> bool:
        return self not in (Trigger.NEVER, Trigger.ALWAYS)


class Proposals(str, Enum):
    """Whether the SLM proposes with its base weights or with the local selector's adapter left on."""

    BASE = "base"
    ADAPTED = "adapted"


class ChosenBy(str, Enum):
    """Who chose the token of a step."""

    SLM = "slm"  # the SLM's own top-1
    SAMPLER = "sampler"  # drawn from the SLM's distribution
    LLM = "llm"
    LOCAL = "local"  # the distilled local selector


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


MAX_CANDIDATES = 64
SUPPORT_SIZE = 64
WARMUP_STEPS = 3


@dataclass(frozen=True)
class CandidateRule:
    """Which of the SLM's top ids are candidates: the first `k`, or adaptively those with p >= ratio * p_max.

    `k`: 1..64. `ratio`: 0 for the fixed rule, else in (0, 1].
    """

    k: int = 8
    ratio: float = 0.0


@dataclass(frozen=True)
class Policy:
    """What to do at each step. `threshold` is in the signal's unit (nats for entropy and KL)."""

    mode: Mode = Mode.GREEDY
    trigger: Trigger = Trigger.ENTROPY
    threshold: float = 0.0
    candidates: CandidateRule = CandidateRule()
    proposals: Proposals = Proposals.BASE
    warmup_steps: int = WARMUP_STEPS

    @property
    def can_trigger(self) -> bool:
        return self.mode in (Mode.S2T, Mode.S2T_LOCAL, Mode.TAKEOVER) and self.trigger is not Trigger.NEVER

    @property
    def needs_llm(self) -> bool:
        return self.mode is Mode.LLM or (self.can_trigger and (self.mode.asks_llm or self.trigger.needs_llm))


@dataclass(frozen=True)
class Sampling:
    """Sampling of `Mode.SAMPLE`. `top_k` 0 and `top_p` 1 switch those cuts off; `seed` makes it repeatable."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class DecodeRequest:
    """One sequence for the engine: token ids in, Steps out.

    `deadline` is a `time.monotonic()` value in seconds. `score_rollout` asks the LLM, after the answer is
    finished, for its log-probabilities at every position in one prefill (the plain harvest). `keep_support`
    leaves every Step its support (64 ids and numbers), not only the triggered ones. `fresh_selections`: the LLM is
    asked even where a cache knows the answer.
    `selector_version` None means the version that is live when the request is added; "" means none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    policy: Policy = Policy()
    sampling: Sampling = Sampling()
    max_new_tokens: int = 256
    deadline: float | None = None
    score_rollout: bool = False
    keep_support: bool = False
    fresh_selections: bool = False
    selector_version: str | None = None


@dataclass(frozen=True)
class Support:
    """The SLM's top ids at one position, best first. `log_probs`: natural log over the whole vocabulary
    (reserved ids masked out), same order and length (<= 64) as `ids`."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True)
class ScoreQuery:
    """The one selection primitive: log-probabilities of candidates at positions of a context.

    `positions[i]` asks for the distribution of the token that follows `token_ids[positions[i]]`, and
    `candidate_ids[i]` are the ids wanted there (may be empty: then only the top-1 is wanted). `excluded_ids`
    (the reserved ids) and every id >= `vocab_size` (0 = no limit) get probability zero first.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    candidate_ids: tuple[tuple[int, ...], ...]
    excluded_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    sequence_id: str = ""
    fresh: bool = False  # not from a cache


@dataclass(frozen=True)
class PositionScores:
    """The LLM at one position: natural-log probabilities of the asked candidates (same order), and its top-1."""

    log_probs: tuple[float, ...]
    top_id: int
    top_log_prob: float


@dataclass(frozen=True)
class ScoreReply:
    """One `PositionScores` per asked position. `cached`: answered from the selection cache, no LLM forward."""

    positions: tuple[PositionScores, ...]
    llm_version: str = ""
    cached: bool = False


@dataclass(frozen=True)
class Step:
    """One emitted token and how it came about. Text, metrics and labels are folded from Steps.

    `signal`: the trigger's value, None when it was not computed. `candidate_ids`/`scores`: at triggered steps
    only; scores are the LLM's log-probabilities or the local selector's scores, by `chosen_by`.
    `llm`: what the LLM said over `support` here (top-1 and log-probabilities), where it was asked.
    `degraded`: empty, or why the step fell back from the LLM.
    """

    index: int
    token_id: int
    chosen_by: ChosenBy
    triggered: bool = False
    signal: float | None = None
    candidate_ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    support: Support | None = None
    llm: PositionScores | None = None
    llm_cached: bool = False
    degraded: str = ""

    @property
    def slm_top_id(self) -> int | None:
        return self.support.ids[0] if self.support else None

    @property
    def llm_top_id(self) -> int | None:
        return self.llm.top_id if self.llm else None

    @property
    def flipped(self) -> bool:
        """The chosen token is not the SLM's own first choice."""
        return self.triggered and self.token_id != self.slm_top_id


@dataclass(frozen=True)
class Usage:
    """Counts of one answer. `llm_forwards`: LLM forward passes this answer caused (cache hits cost none)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    triggers: int = 0
    flips: int = 0
    llm_forwards: int = 0
    degraded_steps: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[int, ...]:
        return (self.prompt_tokens, self.completion_tokens, self.triggers, self.flips, self.llm_forwards,
                self.degraded_steps)


@dataclass(frozen=True)
class Versions:
    """Which weights made an answer: digests of SLM and LLM, and the local selector's version ("" for none)."""

    slm: str = ""
    llm: str = ""
    selector: str = ""


@dataclass(frozen=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """Exactly one of text, messages or token ids."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelRule:
    """A position becomes a label when this trigger's signal is strictly above the threshold."""

    trigger: Trigger
    threshold: float


@dataclass(frozen=True)
class LabelOptions:
    """Whether and how an answer's LLM selections are kept as labels. `split` must not be an evaluation split.

    Every LLM selection becomes a label. Of a scored rollout (harvest) those positions do that one of `rules` marks;
    the rules are made from `triggers` and `budget` (share of positions per trigger) when they are empty. `durable`:
    the answer waits until its labels are stored durably; `collect`: it carries them.
    """

    store: bool = False
    task: str = ""
    problem_id: str = ""
    split: str = "train"
    triggers: tuple[Trigger, ...] = ()
    budget: float = 0.1
    rules: tuple[LabelRule, ...] = ()
    durable: bool = False
    collect: bool = False


@dataclass(frozen=True)
class Answer:
    """A finished answer: what `generate` returns and the wire's last message carries."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    versions: Versions
    steps: tuple[Step, ...] = field(default=(), repr=False)
