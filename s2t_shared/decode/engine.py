"""The decode loop: token ids in, Steps out. Knows no text, no Ray, no Redis, no labels.

`step()` advances every live sequence that can move, in one packed forward, whatever their modes.
Sequences join, leave and are cancelled at any step. A sequence that waits for the LLM does not hold
up the others. A sequence whose LLM is dead or late takes the best choice there is without it, and
its Step says so.

One thread owns an engine.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from s2t_shared import policy as policies
from s2t_shared.decode.interfaces import LLMInfo, Proposal, SelectorClient, SLMProposer
from s2t_shared.decode.llm_calls import LLMCalls
from s2t_shared.decode.sequence import LiveSequence, SequenceStatus
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.types import DecodeRequest, FinishReason, Mode, Step

MAX_DRAFT_TOKENS = 32
LocalSelectorLookup = Callable[
    [str | None], LocalSelector | None
]  # a version's name, None: live, "": none


def no_local_selector(version: str | None) -> LocalSelector | None:
    """The lookup of an engine that has no published versions."""
    return None


@dataclass(frozen=True)
class EngineLoad:
    """What an engine holds now: sequences in the batch, sequences that wait, KV slots in use.

    parked: of those in the batch, the ones that wait for the LLM.
    """

    running: int
    waiting: int
    kv_slots: int
    parked: int = 0


def _check_decided(request: DecodeRequest, max_new_tokens: int) -> None:
    """Check that there is something left to decide."""
    if len(request.decided) >= max_new_tokens:
        raise InvalidRequestError(
            f"{len(request.decided)} tokens are decided already, and the answer has "
            f"{max_new_tokens} at most; send the request again, from its beginning"
        )
    assert not (request.decided and request.options.score_rollout), "it is decided as a whole"


class Engine:
    """Continuous batching over one SLM proposer and, where there is one, an LLM selector.

    local_selectors: finds a version's local selector. max_num_seqs: sequences in one batch.
    selection_timeout_s: a later LLM selection degrades the step. capacity: sequences that can run
    at once, as far as KV has shown.
    max_draft_tokens: drafted tokens per LLM call, at most; 1 asks token by token.
    clock: seconds, on which requests' deadlines are.
    """

    def __init__(
        self,
        proposer: SLMProposer,
        selector: SelectorClient | None = None,
        local_selectors: LocalSelectorLookup = no_local_selector,
        *,
        max_num_seqs: int = 32,
        selection_timeout_s: float = 2.0,
        max_draft_tokens: int = MAX_DRAFT_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.proposer = proposer
        self.capacity = max_num_seqs
        self._clock = clock
        self._local_selectors = local_selectors
        self._max_num_seqs = max_num_seqs
        self._max_draft_tokens = max_draft_tokens
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        self._wake = threading.Event()
        self._llm: LLMCalls | None = None
        if selector is not None:
            self._llm = LLMCalls(selector, selection_timeout_s, self._wake.set)

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self, request: DecodeRequest, local_selector: LocalSelector | None = None
    ) -> LiveSequence:
        """Queue a request. It joins the batch at the next step that has room for it.

        local_selector: serves the request to its end; None: the one that the request names now.

        Raises:
            InvalidRequestError: prompt too long or empty, id out of range, impossible policy, no
                LLM, more KV needed than there is, all tokens are decided already, or a local
                selector that the SLM's runtime cannot run.
            VersionNotFoundError: there is no local selector of the named version.
        """
        options = request.options
        policies.check_policy(options.policy)
        if local_selector is None:
            local_selector = self._local_selectors(options.version)
        if local_selector is not None and local_selector.always_on:
            options = replace(options, policy=local_selector.served(options.policy))
            request = replace(request, options=options)
        llm = self._llm_info(request) if options.needs_llm else None
        max_new_tokens = self._max_new_tokens(request, llm)
        self.proposer.check(request.token_ids, options.policy, local_selector)
        _check_decided(request, max_new_tokens)
        sequence = LiveSequence(
            request=request,
            slm=self.proposer.info,
            stop_ids=self._stop_ids(request, llm),
            max_new_tokens=max_new_tokens,
            max_draft_tokens=self._max_draft_tokens,
            local_selector=local_selector,
        )
        insort(self._waiting, sequence, key=lambda s: s.request.turn)
        return sequence

    def cancel(self, sequence: LiveSequence) -> None:
        """End a sequence. Its KV is free again within one step."""
        sequence.cancel()
        self._wake.set()

    @property
    def sequences(self) -> tuple[LiveSequence, ...]:
        """The sequences that run, then those that wait."""
        return (*self._running, *self._waiting)

    @property
    def load(self) -> EngineLoad:
        """What the engine holds now. May be read from any thread."""
        running = self._running
        parked = sum(s.status is SequenceStatus.AWAITING_LLM for s in running)
        return EngineLoad(len(running), len(self._waiting), self.proposer.kv_slots_in_use, parked)

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self._waiting and not self._running

    def wait(self, timeout_s: float = 0.05) -> None:
        """Block until a reply may have come, if no sequence can move before."""
        if self._running and not any(s.cancelled or s.is_ready for s in self._running):
            self._wake.wait(timeout_s)
        self._wake.clear()

    def _llm_info(self, request: DecodeRequest) -> LLMInfo:
        policy = request.options.policy
        if self._llm is None:
            raise InvalidRequestError(
                f"mode {policy.mode.value!r} with trigger {policy.trigger.value!r} asks the LLM, "
                "but none is configured; give an LLM, or choose mode greedy, sample or s2t_local",
                field="mode",
            )
        if request.options.score_rollout and policy.mode is Mode.LLM:
            raise InvalidRequestError(
                "score_rollout goes with every mode but llm, where no SLM proposes",
                field="score_rollout",
            )
        return self._llm.info

    def _max_new_tokens(self, request: DecodeRequest, llm: LLMInfo | None) -> int:
        """How long the answer may be: as asked, cut where a model's length ends."""
        prompt = len(request.token_ids)
        wanted = request.options.max_new_tokens
        longest = self.proposer.info.max_length
        if llm is not None:
            longest = min(longest, llm.max_length)
        if not prompt:
            raise InvalidRequestError("the prompt is empty: it has no tokens", field="prompt")
        if prompt >= longest:
            raise InvalidRequestError(
                f"the prompt has {prompt} tokens, but prompt and answer together fit {longest}; "
                "shorten the prompt",
                field="prompt",
            )
        if wanted < 1:
            raise InvalidRequestError(
                f"max_new_tokens={wanted}: must be at least 1", field="max_new_tokens"
            )
        new = min(wanted, longest - prompt)
        if not self.proposer.fits(request.options.policy, prompt + new):
            raise InvalidRequestError(
                f"prompt and answer may take {prompt + new} tokens, more than the KV pool of "
                f"{self.proposer.info.kv_tokens} tokens can ever hold for this mode; lower "
                "max_new_tokens, shorten the prompt or raise slm.kv_gib",
                field="max_new_tokens",
            )
        return new

    def _stop_ids(self, request: DecodeRequest, llm: LLMInfo | None) -> frozenset[int]:
        slm_ids = self.proposer.info.eos_ids
        policy = request.options.policy
        if llm is None or not policy.needs_llm:
            return slm_ids
        return llm.eos_ids if policy.mode is Mode.LLM else slm_ids | llm.eos_ids

    # -- the loop ---------------------------------------------------------------------------------

    def step(self) -> list[tuple[LiveSequence, list[Step]]]:
        """Run one packed SLM forward for all sequences that can move.

        Returns the sequences that got new Steps or ended, with those Steps.
        """
        ended = self._end_cancelled_and_expired()
        self._admit()
        self._deliver_replies()
        self._ask_llm()  # before the forward, so that both models work at once
        self._run_slm()
        self._ask_llm()
        return [(s, s.take_new_steps()) for s in ended] + self._retire()

    def _end_cancelled_and_expired(self) -> list[LiveSequence]:
        """End sequences that were cancelled, ran past their deadline, or would do so if begun now.

        Returns those that never ran.
        """
        now = self._clock()
        for s in [*self._waiting, *self._running]:
            if s.cancelled:
                s.finish(FinishReason.CANCELLED)
            elif s.request.deadline is not None and now >= s.request.deadline:
                s.finish(FinishReason.DEADLINE)
        for s in self._waiting:
            if s.request.start_by is not None and now >= s.request.start_by:
                s.finish(FinishReason.DEADLINE)
        ended = [s for s in self._waiting if s.finish_reason is not None]
        self._waiting = deque(s for s in self._waiting if s.finish_reason is None)
        self._release_kv()
        return ended

    def _admit(self) -> None:
        """In the order of their turns, as far as sequences and KV allow."""
        while self._waiting and self._unfinished() < self._max_num_seqs:
            sequence = self._waiting[0]
            kv = self.proposer.open(
                sequence.local_selector,
                sequence.request.options.policy,
                sequence.request.token_ids,
                sequence.max_tokens,
            )
            if kv is None:
                self.capacity = max(1, self._unfinished())
                return
            sequence.start(kv)
            sequence.started_at = self._clock()
            self._running.append(self._waiting.popleft())
        self.capacity = self._max_num_seqs

    def _unfinished(self) -> int:
        return sum(s.finish_reason is None for s in self._running)

    def _deliver_replies(self) -> None:
        if self._llm is None:
            return
        for s in self._running:
            while (call := s.take_finished_call()) is not None:
                try:
                    reply = self._llm.result(call)
                except SelectorUnavailableError as error:
                    s.on_llm_failure(call, str(error))
                else:
                    s.on_llm_reply(call, reply)

    def _run_slm(self) -> None:
        ready = [s for s in self._running if s.is_ready]
        outputs = self.proposer.run([s.next_input() for s in ready])
        for s, output in zip(ready, outputs, strict=True):
            if output is None:  # the prompt is not read to its end yet
                continue
            if isinstance(output, Proposal):
                s.on_proposal(output)
            else:
                s.on_local_scores(output)

    def _ask_llm(self) -> None:
        """Send the LLM what sequences wait for. When one draft is full, half-full ones go along."""
        if self._llm is None:
            return
        asking = [s for s in self._running if s.wants_llm]
        drafts = {s: s.draft_fill for s in self._running}
        if any(fill >= 1.0 for fill in drafts.values()):
            asking += [s for s, fill in drafts.items() if fill >= 0.5]
        calls = self._llm.submit([s.next_query() for s in asking])
        for s, call in zip(asking, calls, strict=True):
            s.on_call(call)

    # -- endings ----------------------------------------------------------------------------------

    def _retire(self) -> list[tuple[LiveSequence, list[Step]]]:
        """Hand out new Steps, and let ended sequences go."""
        self._release_kv()
        now = self._clock()
        for s in self._running:
            if s.finish_reason is not None:
                s.ended_at = now
        new = [(s, s.take_new_steps()) for s in self._running]
        events = [(s, steps) for s, steps in new if steps or s.finish_reason is not None]
        self._running = [s for s in self._running if s.finish_reason is None]
        return events

    def _release_kv(self) -> None:
        for s in self._running:
            if s.finish_reason is not None and s.kv is not None:
                self.proposer.close(s.kv)
                s.kv = None
