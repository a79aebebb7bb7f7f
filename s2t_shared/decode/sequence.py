"""A live answer, what is known of its next tokens while they are being decided, and how they are decided.

State and decisions; the engine does what they say. A *draft* is the SLM's own continuation that the LLM has still to
check (KL triggers): judgements that become Steps one by one, until one turns out otherwise and the rest is dropped.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from s2t_shared import policy as decide
from s2t_shared.decode.proposer import Proposal, Track
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.types import (
    ChosenBy,
    DecodeRequest,
    FinishReason,
    Mode,
    PositionScores,
    ScoreReply,
    Step,
    Support,
    Trigger,
    Usage,
)

VERIFICATION_COST = 4.0  # what checking a draft costs, in drafted tokens (LLM forward against SLM step)
PRIOR_TOKENS = 64.0  # before anything was seen: one rejection in so many drafted tokens


class Action(Enum):
    """What happens next to a sequence's next token."""

    EMIT = "emit"
    DRAFT = "draft"
    ASK_LLM = "ask_llm"
    SELECT_LOCALLY = "select_locally"


@dataclass
class Judgement:
    """What is known about one next token of one sequence while it is being decided."""

    token_id: int = -1
    support: Support | None = None
    signal: float | None = None
    triggered: bool = False
    llm: PositionScores | None = None
    llm_cached: bool = False
    degraded: str = ""
    chosen_by: ChosenBy = ChosenBy.SLM
    scores: tuple[float, ...] = ()

    def candidate_count(self, request: DecodeRequest) -> int:
        assert self.support is not None
        return decide.candidate_count(request.policy.candidates, self.support.log_probs)

    def hear_llm(self, request: DecodeRequest, index: int, scores: PositionScores, cached: bool) -> Action:
        """The LLM's view of this token's position: is it a divergence point, and what does the LLM select?"""
        policy = request.policy
        self.llm, self.llm_cached = scores, cached
        if self.support is None:  # LLM mode
            self.token_id, self.chosen_by = scores.top_id, ChosenBy.LLM
            return Action.EMIT
        if policy.trigger.needs_llm:
            self.signal = decide.kl(self.support.log_probs, scores.log_probs,
                                    reverse=policy.trigger is Trigger.KL_REVERSE)
            self.triggered = decide.triggers(policy, self.signal, index)
            if not self.triggered:
                return Action.EMIT
            if policy.mode is Mode.S2T_LOCAL:
                return Action.SELECT_LOCALLY
        self.chosen_by = ChosenBy.LLM
        self.scores = scores.log_probs[: self.candidate_count(request)]
        self.token_id = (scores.top_id if policy.mode is Mode.TAKEOVER
                         else self.support.ids[int(np.argmax(self.scores))])
        return Action.EMIT

    def hear_local(self, scores: tuple[float, ...]) -> None:
        """The local selector's scores of the candidates."""
        assert self.support is not None
        self.scores, self.chosen_by = scores, ChosenBy.LOCAL
        self.token_id = self.support.ids[int(np.argmax(scores))]

    def step(self, request: DecodeRequest, index: int) -> Step:
        keep_support = self.triggered or request.score_rollout or request.keep_support
        candidates = self.support.ids[: len(self.scores)] if self.support and self.triggered else ()
        return Step(index, self.token_id, self.chosen_by, self.triggered, self.signal, candidates, self.scores,
                    self.support if keep_support else None, self.llm, self.llm_cached, self.degraded)


@dataclass
class Parked:
    """Waiting for the LLM. `judgement` None: for the finished rollout's scores."""

    judgement: Judgement | None
    future: Future[ScoreReply]
    give_up_at: float


@dataclass
class Check:
    """The LLM is looking at the next `count` drafted tokens."""

    count: int
    future: Future[ScoreReply]
    give_up_at: float


@dataclass(eq=False)
class LiveSequence:
    """A live answer. `steps` grows with every decided token; `finish_reason` is set when it is over.

    `draft`: judgements behind `steps` that the LLM has not confirmed; `checks`: the parts of it that were sent.
    `local_selector`: fixed when the request came, whatever becomes live or is unloaded since.
    `riding`: a triggered step whose candidates the local selector scores in the next forward.
    """

    request: DecodeRequest
    token_ids: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    local_selector: LocalSelector | None = None
    track: Track | None = None
    steps: list[Step] = field(default_factory=list)
    draft: list[Judgement] = field(default_factory=list)
    checks: deque[Check] = field(default_factory=deque)
    parked: Parked | None = None
    riding: Judgement | None = None
    use_slm_once: bool = False  # LLM mode: the LLM failed for this token
    cancelled: bool = False
    finish_reason: FinishReason | None = None
    llm_forwards: int = 0
    told: int = 0  # how much of the context the LLM was told ahead of need
    telling: Future[ScoreReply] | None = None
    checked_tokens: int = 0
    rejections: int = 0

    @property
    def selector_version(self) -> str:
        return self.local_selector.version if self.local_selector is not None else ""

    @property
    def output_ids(self) -> tuple[int, ...]:
        return tuple(self.token_ids[len(self.request.token_ids):])

    @property
    def drafted_ids(self) -> list[int]:
        """The context as the SLM sees it: what is decided and what is drafted."""
        return [*self.token_ids, *(j.token_id for j in self.draft)] if self.draft else self.token_ids

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.token_ids), completion_tokens=len(self.steps),
            triggers=sum(s.triggered for s in self.steps), flips=sum(s.flipped for s in self.steps),
            llm_forwards=self.llm_forwards, degraded_steps=sum(bool(s.degraded) for s in self.steps))

    def judge(self, proposal: Proposal) -> tuple[Judgement, Action]:
        """The SLM has proposed the token behind the steps and the draft: what now?"""
        policy, index = self.request.policy, len(self.steps) + len(self.draft)
        judgement = Judgement(proposal.top_id, proposal.support)
        if proposal.drawn_id is not None:
            judgement.token_id, judgement.chosen_by = proposal.drawn_id, ChosenBy.SAMPLER
            return judgement, Action.EMIT
        if self.use_slm_once:
            self.use_slm_once = False
            judgement.degraded = "the LLM did not answer"
            return judgement, Action.EMIT
        if not policy.can_trigger or not decide.may_trigger(policy, index):
            return judgement, Action.EMIT
        if policy.trigger.needs_llm:
            return judgement, Action.DRAFT
        assert proposal.support is not None
        judgement.signal = decide.slm_signal(policy.trigger, proposal.support, self.request.sampling.seed, index)
        judgement.triggered = decide.triggers(policy, judgement.signal, index)
        if not judgement.triggered:
            return judgement, Action.EMIT
        return judgement, Action.SELECT_LOCALLY if policy.mode is Mode.S2T_LOCAL else Action.ASK_LLM

    @property
    def wants_support(self) -> bool:
        """Whether the next proposal needs more than the SLM's first choice."""
        policy = self.request.policy
        return (self.request.keep_support or self.request.score_rollout
                or (policy.can_trigger and decide.may_trigger(policy, len(self.steps) + len(self.draft))))

    # -- drafts -----------------------------------------------------------------------------------------------------

    @property
    def unasked(self) -> int:
        """Drafted tokens that were not sent to be checked."""
        return len(self.draft) - sum(check.count for check in self.checks)

    def draft_length(self, longest: int) -> int:
        """How many tokens to draft before asking. With rejection rate r per token, a draft of n costs V to check and
        wastes about n * n * r / 2 tokens behind the first rejection: the cost per token is least at
        n = sqrt(2 V / r). r is what this sequence has shown so far."""
        rate = (self.rejections + 1) / (self.checked_tokens + PRIOR_TOKENS)
        return max(1, min(longest, int(math.sqrt(2 * VERIFICATION_COST / rate))))

    @property
    def draft_ended(self) -> bool:
        """The draft reaches the end of the answer."""
        return bool(self.draft) and (self.draft[-1].token_id in self.stop_ids
                                     or len(self.steps) + len(self.draft) >= self.max_new_tokens)

    def may_draft(self, longest: int) -> bool:
        """Whether to draft on: to a full draft, and beyond one that is being checked if it will probably stand."""
        length = self.draft_length(longest)
        rate = (self.rejections + 1) / (self.checked_tokens + PRIOR_TOKENS)
        room = length if not self.checks else 2 * length if longest > 1 and length * rate < 0.5 else 0
        return not self.draft_ended and self.unasked < length and len(self.draft) < room

    def drop_draft(self) -> None:
        """The draft does not stand; the KV of its tokens is forgotten with it."""
        for check in self.checks:
            if check.future.done() and not check.future.cancelled() and check.future.exception() is None:
                self.llm_forwards += 1  # in vain, but done
            check.future.cancel()
        self.checks.clear()
        self.draft.clear()

    def forget_questions(self) -> None:
        """Nobody waits for the LLM any more."""
        self.drop_draft()
        for future in (self.telling, self.parked.future if self.parked else None):
            if future is not None:
                future.cancel()

    def cut(self, steps: int) -> None:
        """The answer ends after so many steps, whatever was decided behind them."""
        del self.steps[steps:]
        del self.token_ids[len(self.request.token_ids) + steps:]
