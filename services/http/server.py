"""The HTTP server beside a gateway's gRPC server: uvicorn on the gateway's own loop."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError
from services.http.app import Api, new_app
from services.http.door import Door

MAX_HEAD_BYTES = 64 << 10  # of one request: its line and its headers
BACKLOG = 512
KEEP_ALIVE_S = 75  # longer than load balancers keep theirs


class BoundedProtocol(HttpToolsProtocol):
    """httptools takes any number of headers: a client that never ends them would fill memory."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer of a chunked body: nobody reads them, nothing bounds them
            self.transport.close()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._head_bytes = 0


class _Server(uvicorn.Server):
    """Signals are for the process that it is in, not for it."""

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
        security = config.security
        settings = uvicorn.Config(
            new_app(config, self._api),
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            loop="none",
            proxy_headers=False,  # a client could name itself as any other
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_certfile=security.certificate if security.key else None,
            ssl_keyfile=security.key if security.certificate else None,
            ssl_ca_certs=security.client_authority,
            ssl_cert_reqs=ssl.CERT_REQUIRED if security.client_authority else ssl.CERT_NONE,
        )
        try:
            settings.load()
        except OSError as error:
            raise ConfigError(f"security.certificate or security.key: {error}") from error
        self._settings = settings
        self._server = _Server(settings)
        self._socket = _listening(config.gateway.host, config.http_port)
        self._serving: asyncio.Task[None] | None = None
        scheme = "https" if settings.is_ssl else "http"
        self.port: int = self._socket.getsockname()[1]
        self.url = f"{scheme}://{config.gateway.host}:{self.port}"

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
