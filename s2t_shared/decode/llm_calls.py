"""Asking the LLM on behalf of an engine: queries out, replies or the reason why there is none back.

A late LLM is left alone for a moment: waiting out the timeout at every token would stall answers. Knows sequences
and the selector client; no models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace

from s2t_shared.decode.llm_selector import LLMInfo, SelectorClient
from s2t_shared.decode.sequence import Check, Judgement, LiveSequence, Parked
from s2t_shared.errors import S2TError, SelectorUnavailableError
from s2t_shared.types import Mode, ScoreQuery, ScoreReply

log = logging.getLogger(__name__)
REST_AFTER_LATE_S = 1.0  # after a late reply the LLM is not asked for so long
ROLLOUT_PATIENCE = 10.0  # a whole rollout is scored in one prefill: it may take this many timeouts


class Asker:
    """Sends the sequences' questions to a `SelectorClient` and reads its replies. `wake` is called when one came."""

    def __init__(self, client: SelectorClient, excluded_ids: tuple[int, ...], vocab_rows: int, timeout_s: float,
                 read_ahead_tokens: int, wake: Callable[[], None]) -> None:
        self._client, self._excluded_ids, self._vocab_rows = client, excluded_ids, vocab_rows
        self._timeout_s, self._read_ahead, self._wake = timeout_s, read_ahead_tokens, wake
        self._resting_until = 0.0

    @property
    def info(self) -> LLMInfo:
        return self._client.info

    def select(self, sequences: Sequence[LiveSequence], judgements: Sequence[Judgement]) -> None:
        """Ask for the next token of each sequence; they park."""
        queries = [self._query(s, s.token_ids, (len(s.token_ids) - 1,), (j.support.ids if j.support else (),))
                   for s, j in zip(sequences, judgements, strict=True)]
        for sequence, judgement, future in zip(sequences, judgements, self._submit(queries), strict=True):
            sequence.parked = Parked(judgement, future, time.monotonic() + self._timeout_s)
            sequence.told = len(sequence.token_ids)

    def check_drafts(self, sequences: Sequence[LiveSequence]) -> None:
        """Ask about every drafted token that was not sent yet."""
        queries, counts = [], []
        for s in sequences:
            unsent = s.draft[len(s.draft) - s.unasked:]
            ids = s.drafted_ids[:-1]  # the last drafted token is judged, not read
            positions = tuple(range(len(ids) - len(unsent), len(ids)))
            queries.append(self._query(s, ids, positions, tuple(j.support.ids for j in unsent if j.support)))
            counts.append(len(unsent))
        for s, count, future in zip(sequences, counts, self._submit(queries), strict=True):
            s.checks.append(Check(count, future, time.monotonic() + self._timeout_s))

    def score_rollout(self, sequence: LiveSequence) -> None:
        """Ask for the LLM's view of every step of a finished answer that it has not given; the sequence parks."""
        start = len(sequence.request.token_ids) - 1
        unseen = [s for s in sequence.steps if s.llm is None]
        positions = tuple(start + s.index for s in unseen)
        supports = tuple(s.support.ids for s in unseen if s.support)
        ids = sequence.token_ids[: positions[-1] + 1]  # the last token is judged, not read
        (future,) = self._submit([self._query(sequence, ids, positions, supports)])
        sequence.parked = Parked(None, future, time.monotonic() + self._timeout_s * ROLLOUT_PATIENCE)

    def tell_ahead(self, sequences: Sequence[LiveSequence]) -> None:
        """Let the LLM read contexts before it is needed, so that a divergence point waits for a short gap only."""
        if not self._read_ahead:
            return
        due = [s for s in sequences if len(s.token_ids) - s.told >= self._read_ahead and _selects_rarely(s)
               and (s.telling is None or s.telling.done())]
        # Fresh: it is the reading that is wanted, not a cached answer.
        queries = [replace(self._query(s, s.token_ids, (len(s.token_ids) - 1,), ((),)), fresh=True) for s in due]
        for s, future in zip(due, self._submit(queries), strict=True):
            s.telling = future
            if not future.done() or future.exception() is None:
                s.told = len(s.token_ids)
                s.llm_forwards += 1

    def is_over(self, waiting: Parked | Check) -> bool:
        """Whether the reply is there, or need not be waited for any longer."""
        return waiting.future.done() or time.monotonic() >= waiting.give_up_at

    def reply(self, sequence: LiveSequence, waiting: Parked | Check) -> ScoreReply | str:
        """The reply, or why there is none (for `Step.degraded`)."""
        future = waiting.future
        if not future.done():
            future.cancel()
            self._resting_until = time.monotonic() + REST_AFTER_LATE_S
            return "the LLM was late"
        try:
            reply = future.result()
        except (S2TError, CancelledError) as error:
            return str(error) or "the LLM could not be asked"
        except Exception:
            log.exception("a selector's reply could not be read")
            return "the LLM's reply could not be read"
        sequence.llm_forwards += not reply.cached
        return reply

    def _query(self, sequence: LiveSequence, token_ids: Sequence[int], positions: tuple[int, ...],
               candidates: tuple[tuple[int, ...], ...]) -> ScoreQuery:
        return ScoreQuery(tuple(token_ids), positions, candidates, self._excluded_ids, self._vocab_rows,
                          sequence.request.request_id, sequence.request.fresh_selections)

    def _submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        if not queries:
            return []
        if time.monotonic() >= self._resting_until:
            futures = self._client.submit(queries)
        else:
            futures = [Future() for _ in queries]
            for future in futures:
                future.set_exception(SelectorUnavailableError("the LLM was late a moment ago"))
        for future in futures:
            future.add_done_callback(lambda _: self._wake())
        return futures


def _selects_rarely(sequence: LiveSequence) -> bool:
    """A sequence that asks the LLM now and then; one that asks all the time keeps it up to date anyway."""
    policy = sequence.request.policy
    return policy.needs_llm and policy.mode is not Mode.LLM and not policy.trigger.needs_llm
