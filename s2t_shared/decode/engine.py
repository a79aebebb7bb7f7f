"""The decode loop: token ids in, Steps out. Knows no text, no Ray, no Redis, no labels.

`step()` advances every live sequence that can move, in one packed forward, whatever their modes. Sequences join,
leave and are cancelled at any step. A sequence that waits for the LLM parks while the others go on, one that drafts
goes on itself; one whose selector is dead or late takes the best choice there is without it, and says so in the Step.

One thread owns an engine.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from s2t_shared import policy as decide
from s2t_shared.decode.llm_calls import Asker
from s2t_shared.decode.llm_selector import SelectorClient
from s2t_shared.decode.proposer import Draw, Proposal, Propose, Proposer, Result, Score, Work
from s2t_shared.decode.sequence import Action, Judgement, LiveSequence
from s2t_shared.errors import InvalidRequestError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.types import ChosenBy, DecodeRequest, FinishReason, Mode, ScoreReply, Step

LONGEST_DRAFT = 32
SelectorLookup = Callable[[str | None], LocalSelector | None]  # version (None: live) -> local selector


@dataclass(frozen=True)
class Load:
    """What an engine holds now: sequences in the batch, sequences that wait for room, KV rows in use."""

    running: int
    waiting: int
    live_kv_rows: int


class Engine:
    """Continuous batching over one proposer and, where there is one, an LLM.

    longest_draft: drafted tokens per LLM check, at most; 1 asks token by token. read_ahead_tokens: how far the LLM
    may lag behind a sequence that asks it rarely, before it is told the context ahead of need; 0: never.
    """

    def __init__(self, proposer: Proposer, selector: SelectorClient | None = None,
                 local_selectors: SelectorLookup = lambda version: None, max_running: int = 32,
                 selection_timeout_s: float = 2.0, longest_draft: int = LONGEST_DRAFT,
                 read_ahead_tokens: int = 0) -> None:
        self.proposer, self._local_selectors = proposer, local_selectors
        self._max_running, self._longest_draft = max_running, longest_draft
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        self._events: dict[LiveSequence, list[Step]] = {}
        self._wake = threading.Event()
        self._asker = Asker(selector, proposer.excluded_ids, proposer.runtime.vocab_rows, selection_timeout_s,
                            read_ahead_tokens, self._wake.set) if selector is not None else None

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: DecodeRequest, local_selector: LocalSelector | None = None) -> LiveSequence:
        """Queue a request; it joins the batch at the next step that has room.

        `local_selector` serves it to its end. None: the one that `request.selector_version` names now.

        Raises:
            VersionNotFoundError: the version it names is not loaded.
            InvalidRequestError: prompt too long or empty, id out of range, impossible policy, no LLM configured,
                or more KV needed than there is.
        """
        policy, n = request.policy, len(request.token_ids)
        decide.check_policy(policy)
        info = self._asker.info if self._asker is not None else None
        asks = policy.needs_llm or request.score_rollout
        if info is None and asks:
            raise InvalidRequestError(f"mode {policy.mode.value!r} with trigger {policy.trigger.value!r} asks the "
                                      "LLM, but none is configured; give an LLM, or choose mode greedy, sample or "
                                      "s2t_local")
        if request.score_rollout and policy.mode is Mode.LLM:
            raise InvalidRequestError("score_rollout goes with every mode but llm, where no SLM proposes")
        longest = self.proposer.runtime.max_length
        stop_ids = self.proposer.runtime.eos_ids
        if info is not None and asks:
            longest = min(longest, info.max_length)
        if info is not None and policy.needs_llm:
            stop_ids = info.eos_ids if policy.mode is Mode.LLM else stop_ids | info.eos_ids
        if not n:
            raise InvalidRequestError("the prompt is empty: it has no tokens")
        if n >= longest:
            raise InvalidRequestError(f"the prompt has {n} tokens, but prompt and answer together fit {longest}; "
                                      "shorten the prompt")
        if request.max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens={request.max_new_tokens}: must be at least 1")
        new = min(request.max_new_tokens, longest - n)
        if not self.proposer.fits(policy, n + new):
            raise InvalidRequestError(f"prompt and answer may take {n + new} tokens, more than the KV pool of "
                                      f"{self.proposer.runtime.pool.max_tokens} tokens can ever hold for this mode; "
                                      "lower max_new_tokens, shorten the prompt or raise slm.kv_gib")
        self.proposer.runtime.check_ids(request.token_ids)
        if local_selector is None:
            local_selector = self._local_selectors(request.selector_version)
        sequence = LiveSequence(request, list(request.token_ids), new, stop_ids, local_selector)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: LiveSequence) -> None:
        """Its KV is free again within one step."""
        sequence.cancelled = True
        self._wake.set()

    @property
    def load(self) -> Load:
        """May be read from any thread."""
        return Load(len(self._running), len(self._waiting), self.proposer.runtime.pool.live_rows)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def wait(self, timeout_s: float = 0.05) -> None:
        """Block until a reply may have come, if nothing can move before."""
        if self._running and not any(s.cancelled or self._can_move(s) for s in self._running):
            self._wake.wait(timeout_s)
        self._wake.clear()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[LiveSequence, list[Step]]]:
        """One forward for every sequence that can move. Returns the sequences that got new Steps or ended, with
        those Steps (none where one ended without: cancelled, expired, rollout scored)."""
        self._events = {}
        self._admit()
        self._drop_cancelled_and_expired()
        self._hear_replies()
        moving = [s for s in self._running if self._can_move(s)]
        llm_only = [s for s in moving if _is_llm_turn(s)]
        if llm_only and self._asker:
            self._asker.select(llm_only, [Judgement() for _ in llm_only])
        working = [s for s in moving if not _is_llm_turn(s)]
        self._hear_slm(working, self.proposer.run([self._work(s) for s in working]))
        self._ask()
        self._retire()
        return list(self._events.items())

    def _admit(self) -> None:
        """First come, first served, as far as sequences and KV allow."""
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            request = sequence.request
            if not sequence.cancelled:
                sequence.track = self.proposer.open(sequence.local_selector, request.policy, request.token_ids,
                                                    len(request.token_ids) + sequence.max_new_tokens)
                if sequence.track is None:
                    return
            self._running.append(self._waiting.popleft())

    def _drop_cancelled_and_expired(self) -> None:
        now = time.monotonic()
        for s in [*self._running, *self._waiting]:
            if s.cancelled:
                self._end(s, FinishReason.CANCELLED)
            elif s.request.deadline is not None and now >= s.request.deadline:
                self._end(s, FinishReason.DEADLINE)
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._retire()

    def _can_move(self, s: LiveSequence) -> bool:
        if s.finish_reason is not None or s.parked is not None:
            return False
        return s.riding is not None or not (s.draft or s.checks) or s.may_draft(self._longest_draft)

    def _work(self, s: LiveSequence) -> Work:
        assert s.track is not None
        if s.riding is not None:
            assert s.riding.support is not None
            count = s.riding.candidate_count(s.request)
            return Score(s.track, s.token_ids, s.riding.support.ids[:count], s.riding.support.log_probs[:count])
        draw = Draw(s.request.sampling, len(s.steps)) if s.request.policy.mode is Mode.SAMPLE else None
        return Propose(s.track, s.drafted_ids, draw, s.wants_support)

    def _hear_slm(self, sequences: Sequence[LiveSequence], results: Sequence[Result]) -> None:
        """Proposals and local scores: what the sequences do next."""
        asking: list[tuple[LiveSequence, Judgement]] = []
        for s, result in zip(sequences, results, strict=True):
            if result is None:  # still reading
                continue
            if not isinstance(result, Proposal):
                assert s.riding is not None
                judgement, s.riding = s.riding, None
                judgement.hear_local(result)
                self._emit(s, judgement)
                continue
            judgement, action = s.judge(result)
            if action is Action.ASK_LLM:
                asking.append((s, judgement))
            else:
                self._act(s, judgement, action)
        if asking and self._asker:
            self._asker.select([s for s, _ in asking], [j for _, j in asking])

    def _act(self, s: LiveSequence, judgement: Judgement, action: Action) -> None:
        if action is Action.DRAFT:
            s.draft.append(judgement)
        elif action is Action.SELECT_LOCALLY:
            s.riding = judgement
        else:
            self._emit(s, judgement)

    # -- the LLM ----------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Send full drafts off, and with them those at least half full: one LLM forward then serves them all."""
        if self._asker is None:
            return
        drafting = {s: s.unasked / s.draft_length(self._longest_draft) if not s.draft_ended else 1.0
                    for s in self._running if s.finish_reason is None and s.unasked}
        if any(fill >= 1.0 for fill in drafting.values()):
            self._asker.check_drafts([s for s, fill in drafting.items() if fill >= 0.5])
        self._asker.tell_ahead([s for s in self._running if s.finish_reason is None])

    def _hear_replies(self) -> None:
        if self._asker is None:
            return
        for s in self._running:
            if s.parked is not None and self._asker.is_over(s.parked):
                parked, s.parked = s.parked, None
                reply = self._asker.reply(s, parked)
                if parked.judgement is None:
                    self._take_rollout_scores(s, reply)
                else:
                    self._hear_selection(s, parked.judgement, reply)
            while s.checks and s.finish_reason is None and self._asker.is_over(s.checks[0]):
                check = s.checks.popleft()
                self._confirm(s, check.count, self._asker.reply(s, check))
        self._retire()

    def _hear_selection(self, s: LiveSequence, judgement: Judgement, reply: ScoreReply | str) -> None:
        if not isinstance(reply, str):
            self._act(s, judgement, judgement.hear_llm(s.request, len(s.steps), reply.positions[0], reply.cached))
            return
        judgement.degraded = reply
        if judgement.support is None:  # LLM mode: the SLM takes this token
            s.use_slm_once = True
        elif s.selector_version:
            s.riding = judgement
        else:
            self._emit(s, judgement)

    def _confirm(self, s: LiveSequence, count: int, reply: ScoreReply | str) -> None:
        """Make the first `count` drafted tokens Steps, up to the first that turns out otherwise."""
        for i in range(count):
            judgement = s.draft[0]
            drafted = judgement.token_id
            action = Action.EMIT
            if isinstance(reply, str):
                judgement.degraded = reply
            else:
                action = judgement.hear_llm(s.request, len(s.steps), reply.positions[i], reply.cached)
                s.checked_tokens += 1
            stands = action is Action.EMIT and judgement.token_id == drafted
            if stands:
                s.draft.pop(0)
            else:
                s.rejections += 1
                s.drop_draft()
                assert s.track is not None
                s.track.truncate(len(s.token_ids))
            self._act(s, judgement, action)
            if not stands or s.finish_reason is not None:
                return

    # -- endings ----------------------------------------------------------------------------------------------------

    def _emit(self, s: LiveSequence, judgement: Judgement) -> None:
        step = judgement.step(s.request, len(s.steps))
        s.steps.append(step)
        s.token_ids.append(step.token_id)
        self._events.setdefault(s, []).append(step)
        slm_ended = step.chosen_by is ChosenBy.SLM and step.token_id in self.proposer.runtime.eos_ids
        if slm_ended or step.token_id in s.stop_ids:
            self._finish(s, FinishReason.STOP)
        elif len(s.steps) >= s.max_new_tokens:
            self._finish(s, FinishReason.LENGTH)

    def _finish(self, s: LiveSequence, reason: FinishReason) -> None:
        if s.request.score_rollout and self._asker and any(step.llm is None for step in s.steps):
            self._asker.score_rollout(s)
        else:
            self._end(s, reason)

    def _take_rollout_scores(self, s: LiveSequence, reply: ScoreReply | str) -> None:
        """Fill in the LLM's view of a finished rollout where it has not been asked before."""
        if isinstance(reply, str):
            s.steps = [replace(step, degraded=reply) if step.llm is None else step for step in s.steps]
        else:
            scores = iter(reply.positions)
            s.steps = [replace(step, llm=next(scores), llm_cached=reply.cached) if step.llm is None else step
                       for step in s.steps]
        stopped = s.steps[-1].token_id in s.stop_ids
        self._end(s, FinishReason.STOP if stopped else FinishReason.LENGTH)

    def _end(self, s: LiveSequence, reason: FinishReason) -> None:
        s.finish_reason = reason
        self._events.setdefault(s, [])

    def _retire(self) -> None:
        """Give back what ended sequences hold."""
        for s in self._running:
            if s.finish_reason is not None and s.track is not None:
                s.forget_questions()
                self.proposer.close(s.track)
                s.track = None
        self._running = [s for s in self._running if s.finish_reason is None]


def _is_llm_turn(s: LiveSequence) -> bool:
    return s.request.policy.mode is Mode.LLM and not s.use_slm_once
