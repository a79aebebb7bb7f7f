"""Opens gRPC servers and channels with credentials, token and limits.

Every server and client of the project uses these. Imports grpcio and the wire only.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from s2t_shared.errors import ConfigError, UnauthenticatedError
from services.rpc import wire
from services.rpc.undecodable import DecodingInterceptor

if TYPE_CHECKING:
    from s2t_shared.config import SecurityConfig

MAX_MESSAGE_BYTES = 4 << 20
MIN_TOKEN_BYTES = 16
# Both sides ask a silent peer whether it lives. A server takes pings twice as often as ours come:
# at gRPC's own minimum of five minutes it would end our clients' connections (too_many_pings).
KEEPALIVE_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0
OPEN_METHODS = ("/grpc.health.v1.Health/",)  # what a load balancer may ask without a token


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What a server lets a connection do; 0: no limit.

    max_streams: calls at once. max_idle_s: without a call, then it is closed. max_age_s: then it
    takes no new calls, and its client opens another. max_age_grace_s: for calls under way then.
    """

    max_streams: int = 0
    max_idle_s: float = 0.0
    max_age_s: float = 0.0
    max_age_grace_s: float = 0.0

    @property
    def options(self) -> list[tuple[str, int]]:
        """As gRPC names them."""
        given = [
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.max_connection_idle_ms", _ms(self.max_idle_s)),
            ("grpc.max_connection_age_ms", _ms(self.max_age_s)),
            ("grpc.max_connection_age_grace_ms", _ms(self.max_age_grace_s)),
        ]
        return [(name, value) for name, value in given if value]


NO_LIMITS = ConnectionLimits()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the token, compared in constant time; health checks excepted."""

    def __init__(self, token: str) -> None:
        assert token
        self._expected = f"Bearer {token}".encode()

        async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
            text = "no valid token: send metadata 'authorization: Bearer TOKEN'"
            await wire.abort(context, UnauthenticatedError(text))

        self._refuse_unary = grpc.unary_unary_rpc_method_handler(refuse)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        given = dict(details.invocation_metadata).get("authorization", "")
        given = given if isinstance(given, bytes) else str(given).encode()
        if details.method.startswith(OPEN_METHODS) or hmac.compare_digest(given, self._expected):
            return await continuation(details)
        return self._refuse_unary


def read_token(file: Path | None) -> str | None:
    """The token in `file`; None only where no file is configured.

    Raises:
        ConfigError: the file cannot be read, or what is in it is no token.
    """
    if file is None:
        return None
    token = _read(file).strip()
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"token file {str(file)!r}: its token has {len(token)} bytes, at least "
            f"{MIN_TOKEN_BYTES} are needed; make one: openssl rand -hex 32 > {file}"
        )
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise ConfigError(
            f"token file {str(file)!r}: a token is one word of printable ASCII; make one: "
            f"openssl rand -hex 32 > {file}"
        )
    return token.decode("ascii")


def new_server(
    security: SecurityConfig,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    connections: ConnectionLimits = NO_LIMITS,
) -> grpc.aio.Server:
    """A server with our limits; it demands the token if, and only if, a token file is configured.

    Raises:
        ConfigError: as `read_token`.
    """
    token = read_token(security.token_file)
    return grpc.aio.server(
        interceptors=[
            *([] if token is None else [TokenInterceptor(token)]),
            DecodingInterceptor(),
        ],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.max_metadata_size", 8 << 10),
            *_keepalive(),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _ms(KEEPALIVE_S / 2)),
            *connections.options,
        ],
    )


def bind(
    server: grpc.aio.Server, host: str, port: int, security: SecurityConfig, setting: str
) -> int:
    """Listen on host:port (0: any free port); returns the port.

    Raises:
        ConfigError: the port is taken or the address is not ours.
    """
    address = f"{host}:{port}"
    try:
        if security.certificate and security.key:
            credentials = grpc.ssl_server_credentials(
                [(_read(security.key), _read(security.certificate))]
            )
            bound = server.add_secure_port(address, credentials)
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; "
            f"choose another {setting}"
        )
    return int(bound)


def open_channel(address: str, authority: Path | None, asynchronous: bool = True) -> Any:
    """A channel with our limits; TLS when an authority is given."""
    options = [
        ("grpc.max_receive_message_length", 64 << 20),
        *_keepalive(),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    library = grpc.aio if asynchronous else grpc
    if authority:
        return library.secure_channel(
            address, grpc.ssl_channel_credentials(_read(authority)), options=options
        )
    return library.insecure_channel(address, options=options)


def _keepalive() -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_S)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
        ("grpc.http2.ping_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),  # its default is a minute
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
    ]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: the bearer token, if there is one."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"security file {path.name!r} cannot be read: {error.strerror}"
        ) from error
