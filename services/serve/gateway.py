"""The Serve deployment of the gateway, the only door for clients."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve

from s2t_shared.config import EVERYWHERE, Config, check_exposure
from services.metrics.exports import MetricsExports
from services.rpc import logs, tracing
from services.serve import build_gateway
from services.serve.garbage import spare_what_is_loaded
from services.serve.gateway_server import GatewayServer
from services.serve.serve_proposers import ServeProposers


class Gateway:
    """A `GatewayServer` before the proposers."""

    async def __init__(self, config: Config, proposers: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """proposers: Serve's handle of the proposer deployment."""
        check_exposure(config)
        logs.begin(config.log, "gateway")
        tracing.begin(config.traces, "gateway")
        self._config = config
        counted = ServeProposers(proposers, lambda: running_replicas(proposers.deployment_id))
        self._server = build_gateway.gateway_server(config, counted)
        spare_what_is_loaded()
        await self._server.start()
        self._exports = MetricsExports(self._server.registry, config)

    async def port(self) -> int:
        return self._server.port

    async def address(self) -> str:
        """host:port, as clients are told: where it listens everywhere, its node's address."""
        host = self._config.gateway.host
        if host in EVERYWHERE:
            host = ray.util.get_node_ip_address()
        return f"{host}:{self._server.port}"

    async def url(self) -> str:
        """Where HTTP is served, as people are told; "" for nowhere."""
        return self._server.url

    async def metrics_url(self) -> str:
        """Where Prometheus reads its metrics; "" for nowhere."""
        return self._exports.url

    async def __del__(self) -> None:
        server: GatewayServer | None = getattr(self, "_server", None)
        if server is not None:  # None after a failed start
            await server.stop()
        exports: MetricsExports | None = getattr(self, "_exports", None)
        if exports is not None:  # last: that it drains can be seen
            exports.close()


def running_replicas(deployment: Any) -> int:
    """Replicas of a deployment that run now. deployment: its Serve `DeploymentID`."""
    applications = serve.status().applications
    states = applications[deployment.app_name].deployments[deployment.name].replica_states
    return int(states.get("RUNNING", 0))
