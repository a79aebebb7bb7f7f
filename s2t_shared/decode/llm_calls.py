"""Calls to the LLM selector that an engine has in flight, and when to give up on one.

Knows queries and the selector client; no sequences, no models.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from enum import Enum

from s2t_shared.decode.interfaces import LLMInfo, SelectorClient
from s2t_shared.errors import S2TError, SelectorUnavailableError
from s2t_shared.types import ScoreQuery, ScoreReply

log = logging.getLogger(__name__)
LOG_ZERO = -10_000.0  # what selectors send for probability zero
ROUNDING = 1e-2  # a log-probability may be above zero by so much
ROLLOUT_PATIENCE = 10.0  # a whole rollout is scored in one prefill: it may take this many timeouts


class Purpose(Enum):
    """What a call to the LLM is for."""

    SELECT = "select"  # choose the next token
    VERIFY = "verify"  # check drafted tokens
    SCORE_ROLLOUT = "score_rollout"  # see every position of a finished answer


@dataclass(frozen=True)
class LLMQuery:
    """A query and what it is for."""

    purpose: Purpose
    query: ScoreQuery


@dataclass(frozen=True, eq=False)
class LLMCall:
    """A query in flight. give_up_at: a `time.monotonic()` value in seconds."""

    purpose: Purpose
    query: ScoreQuery
    future: Future[ScoreReply]
    give_up_at: float

    @property
    def positions(self) -> int:
        """How many positions the LLM was asked about."""
        return len(self.query.positions)

    @property
    def is_over(self) -> bool:
        """Whether the reply is there, or need not be waited for any longer."""
        return self.future.done() or time.monotonic() >= self.give_up_at

    @property
    def was_answered(self) -> bool:
        """Whether the LLM has done the work."""
        done = self.future.done() and not self.future.cancelled()
        return done and self.future.exception() is None

    def cancel(self) -> None:
        self.future.cancel()


class LLMCalls:
    """Sends queries to a `SelectorClient` and reads its replies. `wake` is called when a reply has
    come."""

    def __init__(self, client: SelectorClient, timeout_s: float, wake: Callable[[], None]) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._wake = wake

    @property
    def info(self) -> LLMInfo:
        return self._client.info

    def submit(self, queries: Sequence[LLMQuery]) -> list[LLMCall]:
        """Send queries as one batch. Returns at once."""
        if not queries:
            return []
        patience_s = [self._patience_s(asked.purpose) for asked in queries]
        futures = self._client.submit(
            [
                replace(asked.query, patience_s=wait_s)
                for asked, wait_s in zip(queries, patience_s, strict=True)
            ]
        )
        now = time.monotonic()
        calls = []
        for asked, future, wait_s in zip(queries, futures, patience_s, strict=True):
            future.add_done_callback(lambda _: self._wake())
            calls.append(LLMCall(asked.purpose, asked.query, future, now + wait_s))
        return calls

    def _patience_s(self, purpose: Purpose) -> float:
        patience = ROLLOUT_PATIENCE if purpose is Purpose.SCORE_ROLLOUT else 1.0
        return patience * self._timeout_s

    def result(self, call: LLMCall) -> ScoreReply:
        """The reply of a call that is over.

        Raises:
            SelectorUnavailableError: there is none; the text says why (for `Step.degraded`).
        """
        if not call.future.done():
            call.cancel()
            raise SelectorUnavailableError("the LLM was late")
        try:
            reply = call.future.result()
            check_reply(call.query, reply)
            return reply
        except (S2TError, CancelledError) as error:
            reason = str(error) or "the LLM could not be asked"
            raise SelectorUnavailableError(reason) from error
        except Exception as error:
            log.exception("a selector's reply could not be read")
            raise SelectorUnavailableError("the LLM's reply could not be read") from error


def check_reply(query: ScoreQuery, reply: ScoreReply) -> None:
    """Check that a reply can be true: an id from it may become a token, a score a label.

    Raises:
        SelectorUnavailableError: counts that are not the query's, a log-probability that is none,
            or a first choice that the query excludes.
    """
    if len(reply.positions) != len(query.positions):
        raise SelectorUnavailableError("the LLM's reply has other positions than its query")
    for scores, candidate_ids in zip(reply.positions, query.candidate_ids, strict=True):
        log_probs = scores.log_probs
        if len(log_probs) != len(candidate_ids):
            raise SelectorUnavailableError("the LLM's reply has other candidates than its query")
        # A sum is finite only if all its terms are; min and max alone can miss a NaN.
        if log_probs and not (
            math.isfinite(sum(log_probs))
            and min(log_probs) >= LOG_ZERO
            and max(log_probs) <= ROUNDING
        ):
            raise SelectorUnavailableError("the LLM's reply holds an impossible log-probability")
        in_range = scores.top_id >= 0 and (not query.vocab_size or scores.top_id < query.vocab_size)
        if not in_range or scores.top_id in query.excluded_ids:
            raise SelectorUnavailableError("the LLM's reply holds an impossible token id")
