"""The Serve deployment of the selector: the LLM. Serve places it, restarts it, and says where it
is; queries go directly to its own server."""

from __future__ import annotations

import logging

import ray

from s2t_shared.config import LOOPBACK, Config
from services.metrics.exports import MetricsExports
from services.rpc import logs, tracing
from services.serve import build, scaling
from services.serve.selector_server import SelectorServer

log = logging.getLogger(__name__)


class SelectorReplica:
    """A `SelectorServer` that Serve runs."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.begin(config.log, "selector")
        tracing.begin(config.traces, "selector")
        self._server = build.selector_server(config)
        await self._server.start()
        self._exports = MetricsExports(self._server.registry, config)
        host = config.selector.host
        if host not in LOOPBACK:
            host = ray.util.get_node_ip_address()
        self._address = f"{host}:{self._server.port}"
        log.info("selector ready: llm %s", self._server.llm_digest)

    async def address(self) -> str:
        """host:port for proposers."""
        return self._address

    async def metrics_url(self) -> str:
        """Where Prometheus reads its metrics; "" for nowhere."""
        return self._exports.url

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve scales by."""
        return {scaling.QUERIES: self._server.queries}

    def check_health(self) -> None:
        self._server.check_health()

    async def __del__(self) -> None:
        server: SelectorServer | None = getattr(self, "_server", None)
        if server is not None:  # None after a failed start
            await server.stop()
        exports: MetricsExports | None = getattr(self, "_exports", None)
        if exports is not None:  # last: that it drains can be seen
            exports.close()
