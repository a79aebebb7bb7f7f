"""Which requests a proposer takes: those that can begin, and be finished, before their deadline.

The estimate is of time, not of slots: how long a token took of late, how much of what was asked
for an answer uses, and what is still to be decoded ahead of a request. What cannot be done in time
is refused at once; what was taken and cannot be done in time any more is not begun (`start_by`).
Clients take turns (start-time fair queueing): who floods the queue waits behind his own requests,
not others behind his. Knows sequences and a clock; no thread, no network. All calls are made on
one asyncio loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappush, heapreplace

from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import RETRY_AFTER_S, OverloadedError
from s2t_shared.types import FinishReason, GenerateRequest, Mode

MEMORY = 0.95  # what the past counts, each time that a sequence ends
MIN_TOKENS = 8  # of a running sequence: before, reading its prompt weighs too much
CAUTION = 1.5  # where a deadline is at stake, an answer may be so many times as long as expected
QUEUE_CAUTION = 1.2  # and what is ahead of it may take so many times as long
OVERDUE = 0.25  # of the expected length: expected of a sequence that is longer than expected
MIN_RETRY_S = 0.1
MAX_RETRY_S = 30.0


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request's place among those that are being answered.

    count: its sequences. max_new_tokens: of each, without those that are decided. deadline,
    start_by, turn: as in `DecodeRequest`. next_turn: of the same client's next request. sequences:
    once they are on the engine. was_begun: whether one of them was seen in the batch.
    """

    client: str
    count: int
    max_new_tokens: int
    deadline: float | None
    turn: float = 0.0
    next_turn: float = 0.0
    start_by: float | None = None
    sequences: Sequence[LiveSequence] = ()
    was_begun: bool = False


@dataclass(frozen=True)
class Forecast:
    """start_s: seconds until a request would begin. service_s: seconds that it may then take."""

    start_s: float
    service_s: float

    @property
    def end_s(self) -> float:
        """Seconds until it is finished, with caution."""
        return QUEUE_CAUTION * self.start_s + self.service_s


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
        self._present_turn = 0.0
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
        decided = len(request.progress.token_ids) if request.progress is not None else 0
        ticket = Ticket(
            client=request.client,
            count=request.samples if request.options.policy.mode is Mode.MAJORITY else 1,
            max_new_tokens=max(1, request.options.max_new_tokens - decided),
            deadline=self._clock() + left if left < math.inf else None,
        )
        if request.progress is not None:
            self._take_over(ticket)
            return ticket
        if len(self._open) >= self._max_ongoing_requests:
            raise _overloaded(f"{len(self._open)} requests are being answered", RETRY_AFTER_S)
        self._see_what_began()
        self._give_turn(ticket)
        forecast = self.forecast(ticket)
        if forecast.start_s > 0:
            self._check(forecast, left)
            if ticket.deadline is not None:
                ticket.start_by = ticket.deadline - forecast.service_s
        self._open[ticket] = None
        return ticket

    def _take_over(self, ticket: Ticket) -> None:
        """A place for an answer that has begun: its client reads it already, so it is refused
        nothing and waits behind nobody."""
        self._give_turn(ticket)
        ticket.turn = 0.0
        self._open[ticket] = None

    def _see_what_began(self) -> None:
        for ticket in self._open:
            if not ticket.was_begun and any(s.was_begun for s in ticket.sequences):
                ticket.was_begun = True
                self._present_turn = max(self._present_turn, ticket.turn)

    def _give_turn(self, ticket: Ticket) -> None:
        """Behind the client's own requests, and beside what began last. A turn is in tokens."""
        own = [other.next_turn for other in self._open if other.client == ticket.client]
        ticket.turn = max(self._present_turn, *own) if own else self._present_turn
        expected = self._expected(ticket.max_new_tokens)
        ticket.next_turn = ticket.turn + ticket.count * expected

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
        waiting = [t for t in self._open if not t.was_begun and t.turn <= ticket.turn]
        waiting.sort(key=lambda t: t.turn)
        for other in (*self._begun(), *waiting):
            for tokens in self._remaining(other):
                _occupy(lanes, slots, tokens)
        start = lanes[0] if len(lanes) >= slots else 0.0
        expected = self._expected(ticket.max_new_tokens)
        service = max(_occupy(lanes, slots, expected) for _ in range(ticket.count)) - start
        caution = min(CAUTION, ticket.max_new_tokens / expected)
        return Forecast(start * seconds_per_token, caution * service * seconds_per_token)

    def _seconds_per_token(self) -> float:
        """Of one sequence in the batch: of late and now. 0: not known."""
        now = self._clock()
        seconds, tokens = self._seconds, self._tokens
        for ticket in self._begun():
            for s in ticket.sequences:
                if s.started_at is not None and s.ended_at is None and s.decoded >= MIN_TOKENS:
                    seconds += now - s.started_at
                    tokens += s.decoded
        return seconds / tokens if tokens else 0.0

    def _begun(self) -> list[Ticket]:
        return [ticket for ticket in self._open if ticket.was_begun]

    def _expected(self, max_new_tokens: int) -> float:
        """How long an answer of so many tokens at most will be."""
        return max(1.0, max_new_tokens * (self._used / self._asked if self._asked else 1.0))

    def _remaining(self, ticket: Ticket) -> list[float]:
        """Tokens that are still to be decoded, of each sequence."""
        expected = self._expected(ticket.max_new_tokens)
        if not ticket.was_begun:
            return [expected] * ticket.count
        remaining = []
        for s in ticket.sequences:
            if s.finish_reason is None:
                left = max(expected - s.decoded, OVERDUE * expected)
                remaining.append(min(s.max_new_tokens - len(s.steps), left))
        return remaining

    def _learn(self, ticket: Ticket) -> None:
        for s in ticket.sequences:
            if s.started_at is None or s.ended_at is None or not s.decoded:
                continue
            self._seconds = MEMORY * self._seconds + s.ended_at - s.started_at
            self._tokens = MEMORY * self._tokens + s.decoded
            if s.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._asked = MEMORY * self._asked + ticket.max_new_tokens
                self._used = MEMORY * self._used + s.decoded


def _occupy(lanes: list[float], slots: int, tokens: float) -> float:
    """Give the slot that is free first to a sequence; returns when it is free again."""
    if len(lanes) < slots:
        heappush(lanes, tokens)
        return tokens
    end = lanes[0] + tokens
    heapreplace(lanes, end)
    return end


def _overloaded(text: str, wait_s: float) -> OverloadedError:
    retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s))
    return OverloadedError(
        f"{text}; try again in {retry_after_s:.1f} s", retry_after_s=retry_after_s
    )
