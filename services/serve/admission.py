"""Which requests a proposer takes: those that can begin, and be finished, before their deadline.

The estimate is of time, not of slots: how long a token took of late, how much of what was asked
for an answer uses, and what is still to be decoded ahead of a request. What cannot be done in time
is refused at once; what was taken and cannot be done in time any more is not begun (`start_by`).
Knows sequences and a clock; no thread, no network. All calls are made on one asyncio loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush

from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import OverloadedError
from s2t_shared.types import FinishReason, GenerateRequest, Mode

MEMORY = 0.95  # what the past counts, each time that a sequence ends
MIN_TOKENS = 8  # of a running sequence: before, reading its prompt weighs too much
CAUTION = 1.5  # an answer may be so much longer than expected, where its deadline is at stake
OVERDUE = 0.25  # of the expected length: expected of a sequence that is longer than expected
MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request's place among those that are being answered.

    count: its sequences. max_new_tokens: of each. deadline, start_by: as in `DecodeRequest`.
    sequences: once they are on the engine.
    """

    count: int
    max_new_tokens: int
    deadline: float | None
    start_by: float | None = None
    sequences: Sequence[LiveSequence] = ()


@dataclass(frozen=True)
class Forecast:
    """When a request would begin, and be finished though it took `CAUTION` times as long as
    expected, in seconds from now."""

    start_s: float
    end_s: float


class Admission:
    """Takes or refuses requests, and learns from those that end.

    capacity: how many sequences can run at once now. max_ongoing_requests: more are refused
    whatever their deadlines. max_queue_s: who would wait longer for a place in the batch is
    refused; 0: only the deadline counts. clock: as the engine's.
    """

    def __init__(
        self,
        capacity: Callable[[], int],
        *,
        max_ongoing_requests: int = 256,
        max_queue_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._max_ongoing_requests = max_ongoing_requests
        self._max_queue_s = max_queue_s
        self._clock = clock
        self._open: dict[Ticket, None] = {}  # in the order they came
        # Of the sequences of late, each counting less as others end:
        self._seconds = 0.0  # in the batch
        self._tokens = 0.0  # decoded in these seconds
        self._asked = 0.0  # max_new_tokens of those that came to their end
        self._used = 0.0  # of these, tokens that they had

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def admit(self, request: GenerateRequest) -> Iterator[Ticket]:
        """A place for the request, until the block ends.

        Raises:
            OverloadedError: there is none, or not in time; it says when to try again.
        """
        ticket = self._take(request)
        try:
            yield ticket
        finally:
            del self._open[ticket]
            self._learn(ticket)

    def _take(self, request: GenerateRequest) -> Ticket:
        """Check and take without a pause between, so that a burst finds the places taken."""
        left = request.timeout_s if request.timeout_s > 0 else math.inf
        ticket = Ticket(
            count=request.samples if request.options.policy.mode is Mode.MAJORITY else 1,
            max_new_tokens=request.options.max_new_tokens,
            deadline=self._clock() + left if left < math.inf else None,
        )
        forecast = self.forecast(ticket)
        if len(self._open) >= self._max_ongoing_requests:
            raise _overloaded(f"{len(self._open)} requests are being answered", forecast.start_s)
        if forecast.start_s > 0:
            self._check(forecast, left)
            if ticket.deadline is not None:
                ticket.start_by = ticket.deadline - (forecast.end_s - forecast.start_s)
        self._open[ticket] = None
        return ticket

    def _check(self, forecast: Forecast, left: float) -> None:
        if 0 < self._max_queue_s < forecast.start_s:
            raise _overloaded(
                f"a place in the batch is free in about {forecast.start_s:.1f} s, and a request "
                f"waits {self._max_queue_s:g} s at most",
                forecast.start_s - self._max_queue_s,
            )
        if forecast.end_s > left:
            raise _overloaded(
                f"the answer may take {forecast.end_s:.1f} s, and its deadline is in {left:.1f} s",
                forecast.end_s - left,
            )

    # -- the estimate -----------------------------------------------------------------------------

    def forecast(self, ticket: Ticket) -> Forecast:
        """What would become of a request that came now. Begins at once where nothing is known."""
        seconds_per_token = self._seconds_per_token()
        slots = self._capacity()
        lanes: list[float] = []  # a heap: after so many tokens each slot is free
        for other in self._open:
            for tokens in self._remaining(other):
                _occupy(lanes, slots, tokens)
        start = lanes[0] if len(lanes) >= slots else 0.0
        expected = min(ticket.max_new_tokens, CAUTION * self._expected(ticket.max_new_tokens))
        end = max(_occupy(lanes, slots, expected) for _ in range(ticket.count))
        return Forecast(start * seconds_per_token, end * seconds_per_token)

    def _seconds_per_token(self) -> float:
        """Of one sequence in the batch: of late and now. 0: not known."""
        now = self._clock()
        seconds, tokens = self._seconds, self._tokens
        for ticket in self._open:
            for s in ticket.sequences:
                if s.started_at is not None and s.ended_at is None and len(s.steps) >= MIN_TOKENS:
                    seconds += now - s.started_at
                    tokens += len(s.steps)
        return seconds / tokens if tokens else 0.0

    def _expected(self, max_new_tokens: int) -> float:
        """How long an answer of so many tokens at most will be."""
        return max_new_tokens * (self._used / self._asked if self._asked else 1.0)

    def _remaining(self, ticket: Ticket) -> Iterator[float]:
        """Tokens that are still to be decoded, of each sequence."""
        expected = self._expected(ticket.max_new_tokens)
        if not ticket.sequences:
            yield from [expected] * ticket.count
        for s in ticket.sequences:
            if s.finish_reason is None:
                done = len(s.steps)
                yield min(s.max_new_tokens - done, max(expected - done, OVERDUE * expected))

    def _learn(self, ticket: Ticket) -> None:
        for s in ticket.sequences:
            if s.started_at is None or s.ended_at is None or not s.steps:
                continue
            self._seconds = MEMORY * self._seconds + s.ended_at - s.started_at
            self._tokens = MEMORY * self._tokens + len(s.steps)
            if s.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._asked = MEMORY * self._asked + ticket.max_new_tokens
                self._used = MEMORY * self._used + len(s.steps)


def _occupy(lanes: list[float], slots: int, tokens: float) -> float:
    """Give the slot that is free first to a sequence; returns when it is free again."""
    begin = heappop(lanes) if len(lanes) >= slots else 0.0
    heappush(lanes, begin + tokens)
    return begin + tokens


def _overloaded(text: str, wait_s: float) -> OverloadedError:
    retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s))
    return OverloadedError(
        f"{text}; try again in {retry_after_s:.1f} s", retry_after_s=retry_after_s
    )
