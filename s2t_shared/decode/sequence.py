"""State of one request being decoded: decided Steps, the token under decision, drafted tokens, LLM
calls in flight.

The engine tells a `LiveSequence` what the models said (`on_*`) and asks what the sequence needs
next (`next_input`, `next_query`); only the sequence itself changes its state. What a token becomes,
`decide` knows.

    WAITING -> RUNNING <-> SELECTING (the local selector scores candidates in the next forward)
                  |   \\-> AWAITING_LLM (a selection, or the scores of a finished rollout) -> ...
                  \\-> FINISHED

KL triggers draft: the SLM's own continuation is a list of undecided Steps that the LLM verifies
several at a time, as in speculative decoding. Drafted Steps become decided ones up to the first
that turns out otherwise.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from s2t_shared.decode import decide
from s2t_shared.decode.decide import Next
from s2t_shared.decode.interfaces import (
    ModelInput,
    NextTokenInput,
    Proposal,
    SamplingInput,
    SelectionInput,
    SequenceKV,
    SLMInfo,
)
from s2t_shared.decode.llm_calls import LLMCall, LLMQuery, Purpose
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.policy import may_trigger
from s2t_shared.types import (
    ChosenBy,
    DecodeRequest,
    FinishReason,
    Mode,
    OnLLMFailure,
    ScoreQuery,
    ScoreReply,
    Step,
    Usage,
)

VERIFICATION_COST = 4.0  # of one LLM forward over a draft, in drafted tokens
PRIOR_TOKENS = 64.0  # before anything was seen: one rejection in so many drafted tokens


class SequenceStatus(str, Enum):
    """What a sequence waits for."""

    WAITING = "waiting"  # for a place in the batch
    RUNNING = "running"  # for the SLM's next token
    SELECTING = "selecting"  # for the local selector's scores
    AWAITING_LLM = "awaiting_llm"  # for the LLM
    FINISHED = "finished"  # for nothing


@dataclass(eq=False, kw_only=True)
class LiveSequence:
    """One request being decoded.

    stop_ids: ids that end the answer, whoever chose them. max_draft_tokens: drafted per LLM call.
    local_selector: kept from the beginning, so that a sequence never changes its version.
    kv: the sequence's place in the SLM's KV cache while it runs. started_at, ended_at: when it was
    in the batch, on the engine's clock. drafted: tokens that the SLM drafted for the LLM to verify;
    accepted: those of them that the LLM let stand.
    """

    request: DecodeRequest
    slm: SLMInfo
    stop_ids: frozenset[int]
    max_new_tokens: int
    max_draft_tokens: int = 32
    local_selector: LocalSelector | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    kv: SequenceKV | None = None
    started_at: float | None = None
    ended_at: float | None = None
    token_ids: list[int] = field(init=False, repr=False)
    steps: list[Step] = field(init=False, repr=False)
    finish_reason: FinishReason | None = None
    llm_forwards: int = field(init=False)
    llm_failure: str = ""  # why it ended as LLM_FAILED
    cancelled: bool = False
    drafted: int = 0
    accepted: int = 0
    _pending: Step | None = None  # the next token, while somebody selects it
    _draft: list[Step] = field(default_factory=list, repr=False)
    _calls: deque[LLMCall] = field(default_factory=deque)
    _slm_takes_over: str = ""  # Mode.LLM: why the LLM cannot choose the next token
    _ends_as: FinishReason | None = None  # once its rollout is scored
    _handed_out: int = field(init=False)
    _verified: int = 0
    _rejected: int = 0

    def __post_init__(self) -> None:
        decided = self.request.decided
        self.token_ids = [*self.request.token_ids, *(step.token_id for step in decided)]
        self.steps = list(decided)
        self.llm_forwards = self.request.llm_forwards
        self._handed_out = len(decided)

    # -- what others read -------------------------------------------------------------------------

    @property
    def output_ids(self) -> tuple[int, ...]:
        """The decided ids, without the prompt."""
        return tuple(self.token_ids[len(self.request.token_ids) :])

    @property
    def decoded(self) -> int:
        """Steps that were decided here, and not before by another engine."""
        return len(self.steps) - len(self.request.decided)

    @property
    def version(self) -> str:
        """Version of the local selector, "" for none."""
        return self.local_selector.version if self.local_selector else ""

    @property
    def calls(self) -> tuple[LLMCall, ...]:
        """LLM calls in flight, oldest first."""
        return tuple(self._calls)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=len(self.steps),
            triggers=sum(step.triggered for step in self.steps),
            flips=sum(step.flipped for step in self.steps),
            llm_forwards=self.llm_forwards,
            degraded_steps=sum(bool(step.degraded) for step in self.steps),
        )

    @property
    def max_tokens(self) -> int:
        """Prompt and answer together, at most."""
        return len(self.request.token_ids) + self.max_new_tokens

    @property
    def is_ready(self) -> bool:
        """Whether the SLM can do something for the sequence now."""
        if self.status is SequenceStatus.SELECTING:
            return True
        if self.status is not SequenceStatus.RUNNING:
            return False
        return not self._draft or self._may_draft()

    @property
    def was_begun(self) -> bool:
        """Whether it ever had a place in the batch."""
        return self.started_at is not None

    @property
    def has_finished_call(self) -> bool:
        """Whether the oldest LLM call is over, answered or not."""
        return bool(self._calls) and self._calls[0].is_over

    # -- beginning and end ------------------------------------------------------------------------

    def start(self, kv: SequenceKV) -> None:
        """Join the batch."""
        assert self.status is SequenceStatus.WAITING
        self.kv = kv
        self._go_on()

    def cancel(self) -> None:
        """Ask the engine to end the sequence at its next step."""
        self.cancelled = True

    def finish(self, reason: FinishReason) -> None:
        """End the sequence: drop its draft and its LLM calls."""
        self._drop_draft()
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self._pending = None

    def take_new_steps(self) -> list[Step]:
        """Steps decided since the last call, never to change again.

        Steps of a rollout that is to be scored are handed out when the LLM has scored them.
        """
        if self.request.options.score_rollout and self.finish_reason is None:
            return []
        new = self.steps[self._handed_out :]
        self._handed_out = len(self.steps)
        return new

    # -- the SLM ----------------------------------------------------------------------------------

    def next_input(self) -> ModelInput:
        """What the SLM is to compute for a sequence that is ready."""
        assert self.kv is not None
        options = self.request.options
        if self.status is SequenceStatus.SELECTING:
            assert self._pending is not None
            assert self._pending.support is not None
            count = decide.candidate_count(options, self._pending)
            return SelectionInput(
                kv=self.kv,
                token_ids=self.token_ids,
                candidate_ids=self._pending.support.ids[:count],
                base_log_probs=self._pending.support.log_probs[:count],
            )
        sampling = None
        if options.policy.mode is Mode.SAMPLE:
            sampling = SamplingInput(options.sampling, len(self.steps))
        return NextTokenInput(
            kv=self.kv,
            token_ids=self._drafted_ids(),
            sampling=sampling,
            wants_support=self._wants_support(),
            signal=options.policy.trigger,
            pauses=self._pauses,
        )

    def on_proposal(self, proposal: Proposal) -> None:
        """The SLM has proposed the token behind the decided and drafted ones."""
        index = len(self.steps) + len(self._draft)
        step, then = decide.after_proposal(self.request.options, index, proposal)
        if self._slm_takes_over:
            step = step.changed(degraded=self._slm_takes_over)
            self._slm_takes_over = ""
        self._act(step, then)

    def _pauses(self, proposal: Proposal) -> bool:
        """Whether the next token will be selected, if this is proposed."""
        index = len(self.steps) + len(self._draft)
        return decide.divergence(self.request.options, index, proposal)[1]

    def on_local_scores(self, scores: tuple[float, ...]) -> None:
        """The local selector has scored the candidates."""
        assert self._pending is not None
        self._emit(decide.after_local_scores(self._pending, scores))

    def _wants_support(self) -> bool:
        """Whether the next proposal needs more than the SLM's first choice."""
        options = self.request.options
        if options.keep_support or options.score_rollout:
            return True
        return may_trigger(options.policy, len(self.steps) + len(self._draft))

    # -- the LLM ----------------------------------------------------------------------------------

    @property
    def wants_llm(self) -> bool:
        """Whether a query waits to be sent that the sequence cannot go on without."""
        return self.status is SequenceStatus.AWAITING_LLM and not self._calls

    @property
    def draft_fill(self) -> float:
        """Drafted tokens that no call verifies yet, in draft lengths; at least 1 sends the draft
        off."""
        unsent = self._unsent()
        if not unsent:
            return 0.0
        return 1.0 if self._draft_is_complete() else unsent / self._draft_length()

    def next_query(self) -> LLMQuery:
        """What to ask the LLM: a selection, the scores of a finished rollout, or to verify the
        draft."""
        if self.status is not SequenceStatus.AWAITING_LLM:
            return self._verification_query()
        if self._ends_as is not None:
            return self._rollout_query()
        assert self._pending is not None
        support = self._pending.support
        candidates = support.ids if support else ()
        query = self._query(self.token_ids, (len(self.token_ids) - 1,), (candidates,))
        return LLMQuery(Purpose.SELECT, query)

    def _verification_query(self) -> LLMQuery:
        """Every drafted token that was not sent yet."""
        unsent = self._draft[len(self._draft) - self._unsent() :]
        ids = self._drafted_ids()[:-1]  # the last drafted token is verified, not read
        positions = tuple(range(len(ids) - len(unsent), len(ids)))
        candidates = tuple(step.support.ids for step in unsent if step.support)
        return LLMQuery(Purpose.VERIFY, self._query(ids, positions, candidates))

    def _rollout_query(self) -> LLMQuery:
        """Every step that the LLM has not seen."""
        start = len(self.request.token_ids) - 1
        unseen = [step for step in self.steps if step.llm is None]
        positions = tuple(start + step.index for step in unseen)
        candidates = tuple(step.support.ids for step in unseen if step.support)
        ids = self.token_ids[: positions[-1] + 1]  # the last token is scored, not read
        return LLMQuery(Purpose.SCORE_ROLLOUT, self._query(ids, positions, candidates))

    def _query(
        self,
        token_ids: list[int],
        positions: tuple[int, ...],
        candidate_ids: tuple[tuple[int, ...], ...],
    ) -> ScoreQuery:
        return ScoreQuery(
            token_ids=tuple(token_ids),
            positions=positions,
            candidate_ids=candidate_ids,
            excluded_ids=self.slm.excluded_ids,
            vocab_size=self.slm.vocab_rows,
            sequence_id=self.request.request_id,
            fresh=self.request.options.fresh_selections,
            trace=self.request.trace,
        )

    def on_call(self, call: LLMCall) -> None:
        """The query of `next_query` was sent."""
        self._calls.append(call)

    def take_finished_call(self) -> LLMCall | None:
        """The oldest call in flight, if it is over."""
        return self._calls.popleft() if self.has_finished_call else None

    def on_llm_reply(self, call: LLMCall, reply: ScoreReply) -> None:
        """The LLM has answered."""
        self.llm_forwards += not reply.cached
        if call.purpose is Purpose.SELECT:
            assert self._pending is not None
            pending = self._pending.changed(llm_digest=reply.llm_digest)
            scores = reply.positions[0]
            self._act(*decide.after_llm_scores(self.request.options, pending, scores))
        elif call.purpose is Purpose.VERIFY:
            self._verify(reply)
        else:
            self._take_rollout_scores(reply)

    def on_llm_failure(self, call: LLMCall, reason: str) -> None:
        """The LLM has not answered: the sequence does without it and says so in its Steps, or ends,
        as its request chose."""
        if self.request.options.on_llm_failure is OnLLMFailure.FAIL:
            self.llm_failure = reason
            self.finish(FinishReason.LLM_FAILED)
        elif call.purpose is Purpose.SELECT:
            self._select_without_llm(reason)
        elif call.purpose is Purpose.VERIFY:
            self._accept_unverified(call.positions, reason)
        else:
            self.steps = [self._degraded(step, reason) for step in self.steps]
            self._finish_scored()

    def _select_without_llm(self, reason: str) -> None:
        assert self._pending is not None
        pending = self._pending.changed(degraded=reason)
        if pending.support is None:  # Mode.LLM: the SLM chooses this token
            self._pending = None
            self._slm_takes_over = reason
            self.status = SequenceStatus.RUNNING
        elif self.local_selector is not None:
            self._act(pending, Next.SELECT_LOCALLY)
        else:
            self._emit(pending)

    def _take_rollout_scores(self, reply: ScoreReply) -> None:
        """Fill in the LLM's view of the finished rollout where it was not asked before."""
        scores = iter(reply.positions)
        for i, step in enumerate(self.steps):
            if step.llm is None:
                step = step.changed(llm=next(scores), llm_digest=reply.llm_digest)
                self.steps[i] = decide.with_figures(step)
        self._finish_scored()

    def _finish_scored(self) -> None:
        assert self._ends_as is not None
        self.finish(self._ends_as)

    @staticmethod
    def _degraded(step: Step, reason: str) -> Step:
        return step.changed(degraded=reason) if step.llm is None else step

    # -- drafts -----------------------------------------------------------------------------------

    def _drafted_ids(self) -> list[int]:
        """The context as the SLM sees it: what is decided and what is drafted."""
        if not self._draft:
            return self.token_ids
        return [*self.token_ids, *(step.token_id for step in self._draft)]

    def _unsent(self) -> int:
        """Drafted tokens that no call verifies."""
        if not self._draft:
            return 0
        return len(self._draft) - sum(call.positions for call in self._calls)

    def _rejection_rate(self) -> float:
        """Rejections per drafted token, as this sequence has shown so far."""
        return (self._rejected + 1) / (self._verified + PRIOR_TOKENS)

    def _draft_length(self) -> int:
        """How many tokens to draft before the LLM is asked.

        With rejection rate r per token, a draft of n tokens costs V to verify and wastes about n *
        n * r / 2 tokens behind the first rejection. The cost per token is least at n = sqrt(2 V /
        r).
        """
        best = math.sqrt(2 * VERIFICATION_COST / self._rejection_rate())
        return max(1, min(self.max_draft_tokens, int(best)))

    def _draft_is_complete(self) -> bool:
        """Whether the draft reaches the end of the answer."""
        if not self._draft:
            return False
        stops = self._draft[-1].token_id in self.stop_ids
        return stops or len(self.steps) + len(self._draft) >= self.max_new_tokens

    def _may_draft(self) -> bool:
        """Whether to draft on: to a full draft, and beyond one in flight that will probably
        stand."""
        length = self._draft_length()
        room = length
        if self._calls:
            will_stand = self.max_draft_tokens > 1 and length * self._rejection_rate() < 0.5
            room = 2 * length if will_stand else 0
        if self._draft_is_complete():
            return False
        return self._unsent() < length and len(self._draft) < room

    def _verify(self, reply: ScoreReply) -> None:
        """Decide drafted tokens, up to the first that the LLM's view makes another one."""
        for scores in reply.positions:
            drafted = self._draft[0].changed(llm_digest=reply.llm_digest)
            step, then = decide.after_llm_scores(self.request.options, drafted, scores)
            self._verified += 1
            accepted = then is Next.EMIT and step.token_id == drafted.token_id
            if accepted:
                self.accepted += 1
                self._draft.pop(0)
            else:
                self._reject_draft()
            self._act(step, then)
            if not accepted or self.status is not SequenceStatus.RUNNING:
                return

    def _accept_unverified(self, count: int, reason: str) -> None:
        for _ in range(count):
            self._emit(self._draft.pop(0).changed(degraded=reason))
            if self.status is not SequenceStatus.RUNNING:
                return

    def _reject_draft(self) -> None:
        """The draft does not stand, and neither does the KV of its tokens."""
        self._rejected += 1
        self._drop_draft()
        assert self.kv is not None
        self.kv.truncate(len(self.token_ids))

    def _drop_draft(self) -> None:
        for call in self._calls:
            self.llm_forwards += call.was_answered and call.purpose is Purpose.VERIFY
            call.cancel()
        self._calls.clear()
        self._draft.clear()

    # -- deciding ---------------------------------------------------------------------------------

    def _act(self, step: Step, then: Next) -> None:
        """Do what the undecided Step needs."""
        if then is Next.EMIT:
            self._emit(step)
        elif then is Next.DRAFT:
            self.drafted += 1
            self._draft.append(step)
        else:
            self._pending = step
            selecting = then is Next.SELECT_LOCALLY
            self.status = SequenceStatus.SELECTING if selecting else SequenceStatus.AWAITING_LLM

    def _emit(self, step: Step) -> None:
        """The token is decided."""
        step = decide.finished(self.request.options, step)
        self.steps.append(step)
        self.token_ids.append(step.token_id)
        reason = self._reason_to_end(step)
        if reason is None:
            self._go_on()
        elif self.request.options.score_rollout and any(s.llm is None for s in self.steps):
            self._drop_draft()
            self._ends_as = reason
            self.status = SequenceStatus.AWAITING_LLM
        else:
            self.finish(reason)

    def _reason_to_end(self, step: Step) -> FinishReason | None:
        slm_ended = step.chosen_by is ChosenBy.SLM and step.token_id in self.slm.eos_ids
        if slm_ended or step.token_id in self.stop_ids:
            return FinishReason.STOP
        stopping = self.request.stopping
        if stopping is not None and stopping(step.token_id):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.steps) >= self.max_new_tokens else None

    def _go_on(self) -> None:
        """The next token is the SLM's to propose or, in Mode.LLM, the LLM's to choose."""
        self._pending = None
        self.status = SequenceStatus.RUNNING
        if self.request.options.policy.mode is Mode.LLM:
            self._pending = Step(index=len(self.steps), token_id=-1)
            self.status = SequenceStatus.AWAITING_LLM
