"""A process's registry: what is counted here, and what is read when someone looks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Histogram

from services.metrics.registry import Distribution, Reading, Registry
from services.metrics.table import TABLE, Role


def test_a_distribution_counts_as_the_library_does() -> None:
    """Ours is there because it is fast; its buckets must be the same, the bounds included."""
    row = TABLE["s2t_inter_token_latency_seconds"]
    values = [0.0, 0.0005, 0.00051, 0.001, 0.3, 5.0, 5.1, 100.0]
    ours = Distribution(row.buckets)
    library = Histogram("h", "h", registry=CollectorRegistry(), buckets=row.buckets)
    for value in values:
        ours.observe(value)
        library.observe(value)
    (family,) = library.collect()
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name == "h_bucket"}
    assert dict(ours.cumulative()) == buckets
    assert ours.sum == sum(values)


def test_tokens_that_come_together_count_each() -> None:
    ours = Distribution((1.0, 2.0))
    ours.observe(1.5, times=4)
    assert ours.cumulative() == [("1.0", 0.0), ("2.0", 4.0), ("+Inf", 4.0)] and ours.sum == 6.0


def test_a_source_that_fails_hides_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Redis away, a bug: the rest of the scrape is what one looks for then."""
    registry = Registry(Role.SELECTOR)

    def fails() -> Iterator[Reading]:
        raise RuntimeError("a bug")
        yield

    registry.add(fails)
    registry.add(lambda: [Reading("s2t_selector_draining", 1)])
    text = registry.text().decode()
    assert "s2t_selector_draining 1.0" in text and "s2t_build_info" in text
    assert "cannot be read" in caplog.text


def test_there_are_no_created_series() -> None:
    """The library's second series for each counter would double what Prometheus keeps."""
    registry = Registry(Role.GATEWAY)
    registry.counter("s2t_requests_total").labels("greedy", "OK").inc()
    assert b"_created" not in registry.text()
