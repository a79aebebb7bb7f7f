"""Shows a replica's metrics wherever its configuration says."""

from __future__ import annotations

from s2t_shared.config import Config
from services.metrics.endpoint import MetricsEndpoint
from services.metrics.ray_gauges import RayGauges
from services.metrics.registry import Registry


class MetricsExports:
    """The exporters of one replica's registry, until `close`. url: of its endpoint, "" for none."""

    def __init__(self, registry: Registry, config: Config) -> None:
        """Raises ConfigError: the endpoint cannot listen."""
        metrics = config.metrics
        self._endpoint: MetricsEndpoint | None = None
        if metrics.enabled and metrics.port is not None:
            self._endpoint = MetricsEndpoint(registry, metrics, config.security)
        self._gauges = RayGauges(registry) if metrics.enabled and metrics.ray else None

    @property
    def url(self) -> str:
        return self._endpoint.url if self._endpoint is not None else ""

    def close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        if self._gauges is not None:
            self._gauges.close()
