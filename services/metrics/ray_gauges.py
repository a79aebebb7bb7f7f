"""The same metrics through Ray's exporter, one port for all processes of a node.

Every few seconds each sample of the registry is set as a gauge of Ray's, with the sample's own name
and labels; Ray exports it as `ray_` and that name. Ray's counters and histograms would not do: they
take one event at a time, and here events are counted already. A replica that ends stops reporting,
and Ray drops its samples.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from ray.util import metrics as ray_metrics

from services.metrics.registry import Registry

log = logging.getLogger(__name__)
PERIOD_S = 5.0  # Ray's agent hears of it every ten seconds


class RayGauges:
    """Reports a registry to Ray until `close`."""

    def __init__(self, registry: Registry, period_s: float = PERIOD_S) -> None:
        self._registry = registry
        self._period_s = period_s
        self._gauges: dict[str, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(self._period_s)

    def report(self) -> None:
        """Tell Ray how it is now."""
        for family in self._registry.collect():
            for sample in family.samples:
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    keys = tuple(sample.labels)
                    gauge = ray_metrics.Gauge(sample.name, family.documentation, keys)
                    self._gauges[sample.name] = gauge
                gauge.set(sample.value, tags=dict(sample.labels))

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self.report()
            except Exception:  # the thread's own border: it must go on
                log.exception("metrics could not be reported to Ray")
            self._closed.wait(self._period_s)
