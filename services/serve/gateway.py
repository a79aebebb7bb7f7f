"""The Serve deployment of the gateway, the only door for clients."""

from __future__ import annotations

from typing import Any

from s2t_shared.config import Config, check_exposure
from services.serve import build
from services.serve.serve_proposers import ServeProposers


class Gateway:
    """A `GatewayServer` before the proposers."""

    async def __init__(self, config: Config, proposers: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """proposers: Serve's handle of the proposer deployment."""
        check_exposure(config)
        self._host = config.gateway.host
        self._server = build.gateway_server(config, ServeProposers(proposers))
        await self._server.start()

    async def port(self) -> int:
        return self._server.port

    async def address(self) -> str:
        """host:port, as clients are told."""
        return f"{self._host}:{self._server.port}"

    async def url(self) -> str:
        """Where HTTP is served, as people are told; "" for nowhere."""
        return self._server.url

    async def __del__(self) -> None:
        await self._server.stop()
