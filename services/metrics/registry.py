"""The metrics of one process, in a registry of its own. Names come from the table."""

from __future__ import annotations

import importlib.metadata
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family

from services.metrics.table import BY_ROLE, TABLE, Kind, Metric, Role

log = logging.getLogger(__name__)
disable_created_metrics()  # a series more for each counter, which no query here reads
INFINITY = "+Inf"


class Distribution:
    """A histogram that one thread counts in: ten times as fast as the library's, which locks."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(self._buckets, seconds)] += times
        self._sum += seconds * times

    @property
    def sum(self) -> float:
        return self._sum

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many are not above it), as Prometheus counts."""
        total = 0
        bounds = [*map(str, self._buckets), INFINITY]
        found: list[tuple[str, float]] = []
        for bound, count in zip(bounds, list(self._counts), strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass(frozen=True)
class Reading:
    """A value that something else counts, as it is now. labels: in the table's order."""

    name: str
    value: float | Distribution = 1.0
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Reading]]


class Registry:
    """One process's metrics. Those that `counter`, `gauge` and `histogram` give are counted where
    things happen; sources are read whenever someone looks."""

    def __init__(self, role: Role) -> None:
        self.role = role
        release = importlib.metadata.version("s2t")
        self._library = CollectorRegistry(auto_describe=False)
        self._sources: list[Source] = []
        self._library.register(_Sources(self._sources))
        self.add(lambda: [Reading("s2t_build_info", labels=(release, role.value))])

    def add(self, source: Source) -> None:
        """Read this too. A source may block for a moment, and may be read from any thread."""
        self._sources.append(source)

    def counter(self, name: str) -> Counter:
        row = self._row(name, Kind.COUNTER)
        return Counter(name, row.help, row.labels, registry=self._library)

    def gauge(self, name: str) -> Gauge:
        row = self._row(name, Kind.GAUGE)
        return Gauge(name, row.help, row.labels, registry=self._library)

    def histogram(self, name: str) -> Histogram:
        row = self._row(name, Kind.HISTOGRAM)
        return Histogram(name, row.help, row.labels, registry=self._library, buckets=row.buckets)

    def _row(self, name: str, kind: Kind) -> Metric:
        row = TABLE[name]
        assert row.kind is kind and row in BY_ROLE[self.role], name
        return row

    def collect(self) -> Iterable[Family]:
        """Every metric as it is now."""
        return self._library.collect()

    def text(self) -> bytes:
        """The same in Prometheus' text format."""
        return generate_latest(self._library)


class _Sources:
    """What the library asks for values that are counted elsewhere."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Family]:
        readings: dict[str, list[Reading]] = {}
        for source in self._sources:
            try:
                found = list(source())
            except Exception:  # one source that fails must not hide the others
                log.exception("some metrics cannot be read")
                continue
            for reading in found:
                readings.setdefault(reading.name, []).append(reading)
        for name, found in readings.items():
            yield _family(TABLE[name], found)


def _family(row: Metric, readings: Sequence[Reading]) -> Family:
    if row.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(row.name, row.help, labels=row.labels)
        for reading in readings:
            value = reading.value
            assert isinstance(value, Distribution), row.name
            histogram.add_metric(reading.labels, value.cumulative(), value.sum)
        return histogram
    if row.kind is Kind.INFO:
        info = InfoMetricFamily(row.name.removesuffix("_info"), row.help)
        for reading in readings:
            info.add_metric((), dict(zip(row.labels, reading.labels, strict=True)))
        return info
    kinds = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily}
    family = kinds[row.kind](row.name, row.help, labels=row.labels)
    for reading in readings:
        assert not isinstance(reading.value, Distribution), row.name
        family.add_metric(reading.labels, float(reading.value))
    return family
