"""The circuit breaker of one address, without network or clock."""

from __future__ import annotations

from services.serve.breaker import Backoff, BreakerState, CircuitBreaker


def closed_breaker(draw: float = 1.0) -> CircuitBreaker:
    breaker = CircuitBreaker(Backoff(first_s=1.0, longest_s=5.0), lambda: draw)
    assert breaker.state is BreakerState.OPEN and breaker.next_probe_s() == 0.0
    probe(breaker, succeeded=True)
    return breaker


def probe(breaker: CircuitBreaker, succeeded: bool) -> None:
    breaker.begin_probe()
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.end_probe(succeeded)


def test_it_opens_at_the_first_failure_and_longer_after_each_probe() -> None:
    """An address that stays dead is probed less and less often, but never given up."""
    breaker = closed_breaker()
    assert breaker.query_failed() and not breaker.is_closed
    delays = []
    for _ in range(5):
        delays.append(breaker.next_probe_s())
        probe(breaker, succeeded=False)
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_queries_that_fail_together_are_one_failure() -> None:
    """Thirty sequences that waited for one hung selector say once that it hangs."""
    breaker = closed_breaker()
    assert [breaker.query_failed() for _ in range(30)] == [True] + [False] * 29
    assert breaker.next_probe_s() == 1.0


def test_only_the_probe_decides_while_it_is_half_open() -> None:
    """Queries sent before the breaker opened end whenever they like."""
    breaker = closed_breaker()
    breaker.query_failed()
    breaker.begin_probe()
    breaker.query_succeeded()
    assert not breaker.query_failed()
    assert breaker.state is BreakerState.HALF_OPEN
    breaker.end_probe(True)
    assert breaker.is_closed


def test_only_a_query_wipes_the_slate() -> None:
    """A selector that answers probes and fails queries must not be asked again and again."""
    breaker = closed_breaker()
    breaker.query_failed()
    probe(breaker, succeeded=True)
    breaker.query_failed()
    assert breaker.next_probe_s() == 2.0
    probe(breaker, succeeded=True)
    breaker.query_succeeded()
    breaker.query_failed()
    assert breaker.next_probe_s() == 1.0


def test_proposers_do_not_probe_in_step() -> None:
    delays = []
    for draw in (0.0, 0.5, 1.0):
        breaker = closed_breaker(draw)
        breaker.query_failed()
        delays.append(breaker.next_probe_s())
    assert delays == [0.5, 0.75, 1.0]


def test_after_very_many_failures_the_delay_is_still_a_number() -> None:
    assert Backoff().delay_s(100_000, 1.0) == Backoff().longest_s
