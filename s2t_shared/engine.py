"""The decode loop: token ids in, Steps out. Knows no text, no Ray, no Redis, no labels.

`step()` advances every live sequence that can move, in one batch, whatever their modes. Sequences join and leave
at any step. A sequence that waits for the LLM parks while the others go on; one whose selector is dead or late
takes the best choice there is without it, and says so in the Step.

One thread owns an engine.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace

import numpy as np

from s2t_shared import policy as decide
from s2t_shared.errors import InvalidRequestError, S2TError, SelectorUnavailableError, VersionNotFoundError
from s2t_shared.local_selector import LocalSelector
from s2t_shared.roles import Draw, Proposer, SelectorClient, Track
from s2t_shared.sequence import Action, Judgement, LiveSequence, Parked
from s2t_shared.types import (
    ChosenBy,
    DecodeRequest,
    FinishReason,
    Mode,
    ScoreQuery,
    ScoreReply,
    Step,
    Support,
)

REST_AFTER_LATE_S = 1.0  # after a late reply the LLM is not asked for so long
ROLLOUT_PATIENCE = 10.0  # a whole rollout is scored in one prefill: it may take this many selection timeouts
SelectorLookup = Callable[[str | None], LocalSelector | None]  # version (None: live) -> local selector


class Engine:
    """Continuous batching over one proposer and, where there is one, an LLM."""

    def __init__(self, proposer: Proposer, selector: SelectorClient | None = None,
                 local_selectors: SelectorLookup = lambda version: None, max_running: int = 32,
                 selection_timeout_s: float = 2.0) -> None:
        self.proposer, self._selector = proposer, selector
        self._local_selectors = local_selectors
        self._max_running, self._selection_timeout = max_running, selection_timeout_s
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        self._wake = threading.Event()
        self._resting_until = 0.0

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: DecodeRequest) -> LiveSequence:
        """Queue a request; it joins the batch at the next step that has room.

        Raises:
            InvalidRequestError: prompt too long or empty, id out of range, impossible policy, no LLM configured.
        """
        decide.check_policy(request.policy)
        info = self._selector.info if self._selector is not None else None
        if info is None and (request.policy.needs_llm or request.score_rollout):
            raise InvalidRequestError(f"mode {request.policy.mode.value!r} with trigger "
                                      f"{request.policy.trigger.value!r} asks the LLM, but none is configured; "
                                      "give an LLM, or choose mode greedy, sample or s2t_local")
        if request.score_rollout and request.policy.mode not in (Mode.GREEDY, Mode.SAMPLE):
            raise InvalidRequestError(f"score_rollout goes with mode greedy or sample, not {request.policy.mode.value}")
        n = len(request.token_ids)
        longest = self.proposer.runtime.max_length
        stop_ids = self.proposer.runtime.eos_ids
        if info is not None and (request.policy.needs_llm or request.score_rollout):
            longest = min(longest, info.max_length)
        if info is not None and request.policy.needs_llm:
            stop_ids = info.eos_ids if request.policy.mode is Mode.LLM else stop_ids | info.eos_ids
        if not n:
            raise InvalidRequestError("the prompt is empty: it has no tokens")
        if n >= longest:
            raise InvalidRequestError(f"the prompt has {n} tokens, but prompt and answer together fit {longest}; "
                                      "shorten the prompt")
        if request.max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens={request.max_new_tokens}: must be at least 1")
        self.proposer.runtime.check_ids(request.token_ids)
        sequence = LiveSequence(request, list(request.token_ids), min(request.max_new_tokens, longest - n), stop_ids)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: LiveSequence) -> None:
        """Its rows are free again within one step."""
        sequence.cancelled = True
        self._wake.set()

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def wait(self, timeout_s: float = 0.05) -> None:
        """Block until a parked sequence's reply may have come, if nothing else can move."""
        if self._running and all(s.parked and not s.cancelled for s in self._running):
            self._wake.wait(timeout_s)
        self._wake.clear()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[LiveSequence, Step | None]]:
        """One token for every sequence that can move. Returns (sequence, its new Step) in batch order; a sequence
        that ended without a token (cancelled, expired, rollout scored) comes with None."""
        self._admit()
        ended = self._drop_cancelled_and_expired() + self._take_rollout_scores()
        ready = [s for s in self._running if s.parked is None]
        judged = [self._judge_reply(s) for s in self._replied()]
        llm_only = [s for s in ready if s.request.policy.mode is Mode.LLM and not s.use_slm_once]
        proposing = [s for s in ready if s not in llm_only]
        judged += [self._judge(s, *proposed) for s, proposed in zip(proposing, self._propose(proposing), strict=True)]
        judged += [(Judgement(s, None), Action.ASK_LLM) for s in llm_only]
        self._ask([j for j, action in judged if action is Action.ASK_LLM])
        self._select_locally([j for j, action in judged if action is Action.SELECT_LOCALLY])
        emitted = [(j.sequence, self._emit(j)) for j, action in judged
                   if action in (Action.EMIT, Action.SELECT_LOCALLY)]
        self._retire()
        return [*((s, None) for s in ended), *emitted]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            if not sequence.cancelled:
                version = sequence.request.selector_version
                try:
                    selector = self._local_selectors(version)
                except VersionNotFoundError:  # it was there when the request was checked, and was removed since
                    selector = self._local_selectors(None)
                track = self.proposer.open(selector, sequence.request.policy)
                if track is None:
                    return
                sequence.track, sequence.selector_version = track, selector.version if selector else ""
            self._running.append(self._waiting.popleft())

    def _drop_cancelled_and_expired(self) -> list[LiveSequence]:
        now = time.monotonic()
        ended = []
        for s in [*self._running, *self._waiting]:
            if s.cancelled:
                s.finish_reason = FinishReason.CANCELLED
            elif s.request.deadline is not None and now >= s.request.deadline:
                s.finish_reason = FinishReason.DEADLINE
            else:
                continue
            if s.parked:
                s.parked.future.cancel()
            ended.append(s)
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._retire()
        return ended

    def _propose(self, sequences: Sequence[LiveSequence]) -> list[tuple[Support, int | None]]:
        if not sequences:
            return []
        draws = [Draw(s.request.sampling, len(s.steps)) if s.request.policy.mode is Mode.SAMPLE else None
                 for s in sequences]
        return self.proposer.propose([_track(s) for s in sequences], [s.token_ids for s in sequences], draws)

    def _judge(self, sequence: LiveSequence, support: Support, drawn: int | None) -> tuple[Judgement, Action]:
        """The SLM has proposed: emit its choice, ask the LLM, or score locally."""
        policy, index = sequence.request.policy, len(sequence.steps)
        judgement = Judgement(sequence, support, token_id=support.ids[0])
        if drawn is not None:
            judgement.token_id, judgement.chosen_by = drawn, ChosenBy.SAMPLER
            return judgement, Action.EMIT
        if sequence.use_slm_once:
            sequence.use_slm_once = False
            judgement.degraded = "the LLM did not answer"
            return judgement, Action.EMIT
        if not policy.can_trigger or not decide.may_trigger(policy, index):
            return judgement, Action.EMIT
        if policy.trigger.needs_llm:
            return judgement, Action.ASK_LLM
        judgement.signal = decide.slm_signal(policy.trigger, support, sequence.request.sampling.seed, index)
        judgement.triggered = decide.triggers(policy, judgement.signal, index)
        if not judgement.triggered:
            return judgement, Action.EMIT
        return judgement, Action.SELECT_LOCALLY if policy.mode is Mode.S2T_LOCAL else Action.ASK_LLM

    def _judge_reply(self, sequence: LiveSequence) -> tuple[Judgement, Action]:
        """The LLM has answered, failed, or is late."""
        assert sequence.parked is not None and sequence.parked.judgement is not None
        judgement, future = sequence.parked.judgement, sequence.parked.future
        sequence.parked = None
        policy = sequence.request.policy
        if not future.done():
            self._resting_until = time.monotonic() + REST_AFTER_LATE_S
        reply = _result(future)
        if isinstance(reply, str):
            judgement.degraded = reply
            if judgement.support is None:  # LLM mode: the SLM takes this token
                sequence.use_slm_once = True
                return judgement, Action.PROPOSE_NEXT_STEP
            has_local = judgement.triggered and sequence.selector_version
            return judgement, Action.SELECT_LOCALLY if has_local else Action.EMIT
        judgement.llm, judgement.llm_cached = reply.positions[0], reply.cached
        if judgement.support is None:
            judgement.token_id, judgement.chosen_by = judgement.llm.top_id, ChosenBy.LLM
            return judgement, Action.EMIT
        if policy.trigger.needs_llm:
            judgement.signal = decide.kl(judgement.support.log_probs, judgement.llm.log_probs,
                                         reverse=policy.trigger is policy.trigger.KL_REVERSE)
            judgement.triggered = decide.triggers(policy, judgement.signal, len(sequence.steps))
            if not judgement.triggered:
                return judgement, Action.EMIT
            if policy.mode is Mode.S2T_LOCAL:
                return judgement, Action.SELECT_LOCALLY
        judgement.chosen_by = ChosenBy.LLM
        judgement.scores = judgement.llm.log_probs[: judgement.candidate_count]
        judgement.token_id = (judgement.llm.top_id if policy.mode is Mode.TAKEOVER
                              else judgement.support.ids[int(np.argmax(judgement.scores))])
        return judgement, Action.EMIT

    def _ask(self, judgements: Sequence[Judgement]) -> None:
        """Send all LLM selections of this step out together; their sequences park."""
        if not judgements:
            return
        queries = [self._query(j.sequence, (len(j.sequence.token_ids) - 1,),
                               (j.support.ids if j.support else (),)) for j in judgements]
        for judgement, future in zip(judgements, self._submit(queries), strict=True):
            self._park(judgement.sequence, judgement, future)

    def _query(self, sequence: LiveSequence, positions: tuple[int, ...],
               candidates: tuple[tuple[int, ...], ...]) -> ScoreQuery:
        return ScoreQuery(tuple(sequence.token_ids), positions, candidates, self.proposer.excluded_ids,
                          self.proposer.runtime.vocab_rows, sequence.request.request_id,
                          sequence.request.fresh_selections)

    def _submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        """Ask, unless the LLM was late a moment ago: waiting out the timeout at every token would stall answers."""
        assert self._selector is not None
        if time.monotonic() >= self._resting_until:
            return self._selector.submit(queries)
        futures: list[Future[ScoreReply]] = [Future() for _ in queries]
        for future in futures:
            future.set_exception(SelectorUnavailableError("the LLM was late a moment ago"))
        return futures

    def _park(self, sequence: LiveSequence, judgement: Judgement | None, future: Future[ScoreReply]) -> None:
        patience = self._selection_timeout * (1.0 if judgement else ROLLOUT_PATIENCE)
        sequence.parked = Parked(judgement, future, time.monotonic() + patience)
        future.add_done_callback(lambda _: self._wake.set())

    def _replied(self) -> list[LiveSequence]:
        now = time.monotonic()
        return [s for s in self._running if s.parked and s.parked.judgement
                and (s.parked.future.done() or now >= s.parked.give_up_at)]

    def _select_locally(self, judgements: Sequence[Judgement]) -> None:
        """Score all local selections of this step in one forward."""
        if not judgements:
            return
        supports = [j.support for j in judgements if j.support is not None]
        scores = self.proposer.select([_track(j.sequence) for j in judgements],
                                      [j.sequence.token_ids for j in judgements], supports,
                                      [j.candidate_count for j in judgements])
        for judgement, support, group in zip(judgements, supports, scores, strict=True):
            judgement.scores, judgement.chosen_by = group, ChosenBy.LOCAL
            judgement.token_id = support.ids[int(np.argmax(group))]

    def _emit(self, judgement: Judgement) -> Step:
        sequence, request = judgement.sequence, judgement.sequence.request
        support = judgement.support
        keep_support = judgement.triggered or request.score_rollout or request.keep_support
        candidates = support.ids[: len(judgement.scores)] if support and judgement.triggered else ()
        step = Step(len(sequence.steps), judgement.token_id, judgement.chosen_by, judgement.triggered,
                    judgement.signal, candidates, judgement.scores, support if keep_support else None,
                    judgement.llm, judgement.llm_cached, judgement.degraded)
        sequence.steps.append(step)
        sequence.token_ids.append(step.token_id)
        slm_ended = step.chosen_by is ChosenBy.SLM and step.token_id in self.proposer.runtime.eos_ids
        if slm_ended or step.token_id in sequence.stop_ids:
            self._finish(sequence, FinishReason.STOP)
        elif len(sequence.steps) >= sequence.max_new_tokens:
            self._finish(sequence, FinishReason.LENGTH)
        return step

    # -- endings ----------------------------------------------------------------------------------------------------

    def _finish(self, sequence: LiveSequence, reason: FinishReason) -> None:
        if not sequence.request.score_rollout:
            sequence.finish_reason = reason
            return
        start = len(sequence.request.token_ids) - 1
        positions = tuple(range(start, start + len(sequence.steps)))
        supports = tuple(s.support.ids for s in sequence.steps if s.support)
        self._park(sequence, None, self._submit([self._query(sequence, positions, supports)])[0])

    def _take_rollout_scores(self) -> list[LiveSequence]:
        """Fill in the LLM's view of finished rollouts that asked for it."""
        ended = []
        for sequence in self._running:
            parked = sequence.parked
            if parked is None or parked.judgement is not None:
                continue
            if not parked.future.done() and time.monotonic() < parked.give_up_at:
                continue
            reply = _result(parked.future)
            if isinstance(reply, str):
                sequence.steps = [replace(step, degraded=reply) for step in sequence.steps]
            else:
                sequence.steps = [replace(step, llm=scores, llm_cached=reply.cached)
                                  for step, scores in zip(sequence.steps, reply.positions, strict=True)]
                sequence.rollout_forwards = 0 if reply.cached else 1
            sequence.parked = None
            stopped = sequence.steps[-1].token_id in sequence.stop_ids
            sequence.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            ended.append(sequence)
        self._retire()
        return ended

    def _retire(self) -> None:
        for sequence in self._running:
            if sequence.finish_reason is not None and sequence.track is not None:
                self.proposer.close(sequence.track)
                sequence.track = None
        self._running = [s for s in self._running if s.finish_reason is None]


def _track(sequence: LiveSequence) -> Track:
    assert sequence.track is not None
    return sequence.track


def _result(future: Future[ScoreReply]) -> ScoreReply | str:
    """The reply, or why there is none (for `Step.degraded`)."""
    if not future.done():
        future.cancel()
        return "the LLM was late"
    try:
        return future.result()
    except (S2TError, CancelledError) as error:
        return str(error) or "the LLM could not be asked"
