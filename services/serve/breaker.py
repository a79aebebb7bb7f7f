"""Whether one address is worth asking: a circuit breaker.

Closed, the address is asked. A failure opens it: nobody is sent there for a while, which grows with
every failure. Then, half open, one probe is sent that no answer waits for. It closes the breaker,
or opens it for longer. Knows no network and runs no tasks; its owner sends the probes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Backoff:
    """How long a breaker stays open, in seconds: twice as long after each failure, up to the
    longest."""

    first_s: float = 0.25
    longest_s: float = 1.5

    def delay_s(self, failures: int, draw: float) -> float:
        """draw: 0..1, drawn anew for each delay, so that proposers do not probe in step."""
        grown_s: float = self.first_s * 2 ** min(failures - 1, 16)
        return min(grown_s, self.longest_s) * (0.5 + 0.5 * draw)


class BreakerState(str, Enum):
    """What may be sent to an address."""

    CLOSED = "closed"  # queries
    OPEN = "open"  # nothing
    HALF_OPEN = "half_open"  # one probe


class CircuitBreaker:
    """The breaker of one address. It starts open: an address is unknown until a probe came back.

    draw: a random number in 0..1.
    """

    def __init__(self, backoff: Backoff, draw: Callable[[], float] = random.random) -> None:
        self._backoff = backoff
        self._draw = draw
        self._failures = 0
        self.state = BreakerState.OPEN

    @property
    def is_closed(self) -> bool:
        return self.state is BreakerState.CLOSED

    def query_succeeded(self) -> None:
        """A query was answered."""
        if self.is_closed:
            self._failures = 0

    def query_failed(self) -> bool:
        """A query was not answered. Returns whether that has opened the breaker.

        Queries that were under way when it opened fail together: they count as one failure.
        """
        if not self.is_closed:
            return False
        self._failures += 1
        self.state = BreakerState.OPEN
        return True

    def next_probe_s(self) -> float:
        """Seconds from now until a probe is due."""
        assert self.state is BreakerState.OPEN
        return self._backoff.delay_s(self._failures, self._draw()) if self._failures else 0.0

    def begin_probe(self) -> None:
        """Half open: the probe's outcome decides."""
        assert self.state is BreakerState.OPEN
        self.state = BreakerState.HALF_OPEN

    def end_probe(self, succeeded: bool) -> None:
        """Close, or stay open for longer.

        Failures are forgotten only when a query succeeds: an address that answers probes and
        fails queries is asked less and less often.
        """
        assert self.state is BreakerState.HALF_OPEN
        self._failures += not succeeded
        self.state = BreakerState.CLOSED if succeeded else BreakerState.OPEN
