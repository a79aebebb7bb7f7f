"""The HTTP server beside a gateway's gRPC server: uvicorn on the gateway's own loop."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError
from services.http.app import Api, new_app
from services.http.door import Door
from services.http.protocol import KEEP_ALIVE_S, BoundedProtocol, Connections
from services.rpc.tls import server_context

BACKLOG = 512
HANDSHAKE_S = 10.0  # for TLS, before a connection is one


class _Server(uvicorn.Server):
    """On one socket. Signals are for the process that it is in, not for it."""

    def __init__(
        self, settings: uvicorn.Config, tls: ssl.SSLContext | None, connections: Connections
    ) -> None:
        super().__init__(settings)
        self._tls = tls
        self._open = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        self.servers = [
            await asyncio.get_running_loop().create_server(
                self._protocol,
                sock=own,
                ssl=self._tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=HANDSHAKE_S if self._tls is not None else None,
            )
            for own in sockets
        ]
        self.started = True

    def _protocol(self) -> BoundedProtocol:
        return BoundedProtocol(self.config, self.server_state, {}, self._open)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """One server on `gateway.host` and the HTTP port."""

    def __init__(self, config: Config, door: Door) -> None:
        """Listen, but answer nothing yet.

        Raises:
            ConfigError: the port is taken, or a security file cannot be used.
        """
        self._api = Api(config, door)
        settings = uvicorn.Config(
            new_app(config, self._api),
            http="httptools",
            ws="none",
            lifespan="off",
            loop="none",
            proxy_headers=False,  # a client could name itself as any other
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        settings.load()
        gateway = config.gateway
        tls = server_context(config.security)
        limits = (gateway.max_http_connections, gateway.max_http_connections_per_host)
        self._settings = settings
        self._server = _Server(settings, tls, Connections(*limits))
        self._socket = _listening(gateway.host, config.http_port)
        self._serving: asyncio.Task[None] | None = None
        scheme = "http" if tls is None else "https"
        self.port: int = self._socket.getsockname()[1]
        self.url = f"{scheme}://{gateway.host}:{self.port}"

    async def start(self) -> None:
        """Answer calls."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)
        if self._serving.done():
            self._serving.result()
        self._api.ready = True

    def end_readiness(self) -> None:
        """Send who asks /readyz elsewhere; calls are still answered."""
        self._api.ready = False

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and let those under way finish for `grace_s` seconds."""
        self.end_readiness()
        if self._serving is None:
            self._socket.close()
            return
        self._settings.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._serving


def _listening(host: str, port: int) -> socket.socket:
    """Raises ConfigError: the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} for HTTP: {error.strerror}; choose another "
            "gateway.http_port (0: any free one), or gateway.http: false"
        ) from error
