"""A live answer, and what is known of its next token while it is being decided. State only; the engine acts on it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

from s2t_shared import policy as decide
from s2t_shared.roles import Track
from s2t_shared.types import (
    ChosenBy,
    DecodeRequest,
    FinishReason,
    PositionScores,
    ScoreReply,
    Step,
    Support,
    Usage,
)


class Action(Enum):
    """What happens next to a sequence's next token."""

    EMIT = "emit"
    ASK_LLM = "ask_llm"
    SELECT_LOCALLY = "select_locally"
    PROPOSE_NEXT_STEP = "propose_next_step"


@dataclass
class Judgement:
    """What is known about the next token of one sequence while it is being decided."""

    sequence: LiveSequence
    support: Support | None
    signal: float | None = None
    triggered: bool = False
    llm: PositionScores | None = None
    llm_cached: bool = False
    degraded: str = ""
    token_id: int = -1
    chosen_by: ChosenBy = ChosenBy.SLM
    scores: tuple[float, ...] = ()

    @property
    def candidate_count(self) -> int:
        assert self.support is not None
        return decide.candidate_count(self.sequence.request.policy.candidates, self.support.log_probs)


@dataclass
class Parked:
    judgement: Judgement | None  # None: the finished rollout's scores
    future: Future[ScoreReply]
    give_up_at: float


@dataclass(eq=False)
class LiveSequence:
    """A live answer. `steps` grows by one per token; `finish_reason` is set when it is over."""

    request: DecodeRequest
    token_ids: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    track: Track | None = None
    selector_version: str = ""
    steps: list[Step] = field(default_factory=list)
    parked: Parked | None = None
    use_slm_once: bool = False  # LLM mode: the LLM failed for this token
    cancelled: bool = False
    finish_reason: FinishReason | None = None
    rollout_forwards: int = 0

    @property
    def output_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[len(self.request.token_ids):])

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.token_ids), completion_tokens=len(self.steps),
            triggers=sum(s.triggered for s in self.steps), flips=sum(s.flipped for s in self.steps),
            llm_forwards=self.rollout_forwards or sum(s.llm is not None and not s.llm_cached for s in self.steps),
            degraded_steps=sum(bool(s.degraded) for s in self.steps))
