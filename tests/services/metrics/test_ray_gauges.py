"""The way through Ray: each sample under its own name and labels."""

from __future__ import annotations

from typing import Any

import pytest

from services.metrics import ray_gauges
from services.metrics.ray_gauges import RayGauges
from services.metrics.registry import Distribution, Reading, Registry
from services.metrics.table import TABLE, Role


class FakeGauge:
    """As `ray.util.metrics.Gauge`, which refuses tags that it was not made with."""

    told: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name = name
        self._keys = set(tag_keys)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags.keys() == self._keys
        self.told[self._name, frozenset(tags.items())] = value


def test_ray_hears_what_the_endpoint_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One set of queries serves both ways: histograms keep their buckets, counters their names."""
    monkeypatch.setattr(ray_gauges, "ray_metrics", type("R", (), {"Gauge": FakeGauge}))
    FakeGauge.told = {}
    registry = Registry(Role.PROPOSER)
    latency = Distribution(TABLE["s2t_selection_latency_seconds"].buckets)
    latency.observe(0.02)
    registry.add(lambda: [Reading("s2t_selection_latency_seconds", latency)])
    registry.add(lambda: [Reading("s2t_triggers_total", 3, ("s2t",))])
    gauges = RayGauges(registry, period_s=60.0)
    gauges.report()
    gauges.close()
    shown: dict[Any, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            shown[sample.name, frozenset(sample.labels.items())] = sample.value
    assert FakeGauge.told == shown
    assert shown["s2t_triggers_total", frozenset({("mode", "s2t")})] == 3
    assert ("s2t_selection_latency_seconds_bucket", frozenset({("le", "0.025")})) in shown


def test_a_report_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(self: RayGauges) -> None:
        calls.append(1)
        raise RuntimeError("Ray is away")

    monkeypatch.setattr(RayGauges, "report", fails)
    gauges = RayGauges(Registry(Role.GATEWAY), period_s=0.005)
    while len(calls) < 3:
        pass
    gauges.close()
