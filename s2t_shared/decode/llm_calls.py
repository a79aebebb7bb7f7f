"""Calls to the LLM selector that an engine has in flight, and when to give up on one.

Knows queries and the selector client; no sequences, no models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from enum import Enum

from s2t_shared.decode.interfaces import LLMInfo, SelectorClient
from s2t_shared.errors import S2TError, SelectorUnavailableError
from s2t_shared.types import ScoreQuery, ScoreReply

log = logging.getLogger(__name__)
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
    positions: int
    future: Future[ScoreReply]
    give_up_at: float

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
            positions = len(asked.query.positions)
            calls.append(LLMCall(asked.purpose, positions, future, now + wait_s))
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
            return call.future.result()
        except (S2TError, CancelledError) as error:
            reason = str(error) or "the LLM could not be asked"
            raise SelectorUnavailableError(reason) from error
        except Exception as error:
            log.exception("a selector's reply could not be read")
            raise SelectorUnavailableError("the LLM's reply could not be read") from error
