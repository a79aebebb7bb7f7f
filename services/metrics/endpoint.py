"""A process's metrics over HTTP, at `/metrics`: what Prometheus scrapes.

On a port of its own and a thread of its own, so that a scrape holds up no request. With the
service's certificate it speaks TLS; with a token file it asks for a token of role metrics or admin.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CONTENT_TYPE_LATEST

from s2t_shared.config import MetricsConfig, SecurityConfig
from s2t_shared.errors import ConfigError, PermissionDeniedError, UnauthenticatedError
from services.metrics.registry import Registry
from services.metrics.table import Role
from services.rpc import tokens
from services.rpc.tokens import Tokens

log = logging.getLogger(__name__)
PATH = "/metrics"
OFFSETS = {Role.GATEWAY: 0, Role.SELECTOR: 1, Role.PROPOSER: 2}  # from metrics.port
ATTEMPTS = 64  # ports that are tried: as many processes on one node
MAY_READ = frozenset({tokens.Role.METRICS, tokens.Role.ADMIN})
IDLE_S = 10.0  # a connection that says nothing for so long is closed

Start = Callable[[str, list[tuple[str, str]]], Any]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # not HTTPServer's, which looks up the host's name for seconds
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class MetricsEndpoint:
    """Serves a registry until `close`. url: where."""

    def __init__(self, registry: Registry, config: MetricsConfig, security: SecurityConfig) -> None:
        """Listen and answer.

        Raises:
            ConfigError: no port is free, the address is not ours, or a security file cannot be
                used.
        """
        assert config.port is not None
        self._registry = registry
        file = security.token_file
        self._tokens = Tokens(file) if file is not None else None
        context = _tls(security)
        self._server = _listen(config, OFFSETS[registry.role], self._answer)
        if context is not None:
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port: int = self._server.server_port
        scheme = "http" if context is None else "https"
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"{scheme}://{host}:{self.port}{PATH}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        status, body = self._reply(environ)
        kind = CONTENT_TYPE_LATEST if status == "200 OK" else "text/plain"
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def _reply(self, environ: dict[str, Any]) -> tuple[str, bytes]:
        if environ["PATH_INFO"] != PATH:
            return "404 Not Found", b"metrics are at /metrics\n"
        if environ["REQUEST_METHOD"] != "GET":
            return "405 Method Not Allowed", b"only GET\n"
        if self._tokens is not None:
            try:
                self._tokens.check(environ.get("HTTP_AUTHORIZATION", ""), MAY_READ)
            except UnauthenticatedError:
                return "401 Unauthorized", b"send 'authorization: Bearer TOKEN'\n"
            except PermissionDeniedError:
                return "403 Forbidden", b"the token needs the role metrics or admin\n"
        return "200 OK", self._registry.text()


def _listen(config: MetricsConfig, offset: int, app: Any) -> _Server:
    """On the role's port, or the first free one behind it: a node may run several of a role."""
    assert config.port is not None
    first = config.port + offset if config.port else 0
    reason: OSError | None = None
    for port in range(first, first + ATTEMPTS) if first else (0,):
        try:
            return make_server(config.host, port, app, _Server, _Handler)
        except OSError as error:
            reason = error
    assert reason is not None
    raise ConfigError(
        f"cannot listen on {config.host}:{first} or the ports behind it for metrics: "
        f"{reason.strerror}; choose another metrics.host or metrics.port (0: any free one)"
    )


def _tls(security: SecurityConfig) -> ssl.SSLContext | None:
    if security.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(security.certificate, security.key)
        if security.client_authority is not None:
            context.load_verify_locations(security.client_authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError(f"security.certificate or security.key: {error}") from error
    return context
