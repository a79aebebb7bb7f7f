"""Opens gRPC servers and channels with credentials, token and limits.

Every server and client of the project uses these. Imports grpcio and the wire only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from s2t_shared.errors import ConfigError
from services.rpc.authorization import TokenInterceptor
from services.rpc.border import BorderInterceptor, OnRefusal
from services.rpc.tls import ClientTLS, FollowedTLS, server_credentials
from services.rpc.tokens import Role, Tokens

if TYPE_CHECKING:
    from s2t_shared.config import SecurityConfig

MAX_MESSAGE_BYTES = 4 << 20
# Both sides ask a silent peer whether it lives. A server takes pings twice as often as ours come:
# at gRPC's own minimum of five minutes it would end our clients' connections (too_many_pings).
KEEPALIVE_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0


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


def new_server(
    security: SecurityConfig,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    connections: ConnectionLimits = NO_LIMITS,
    on_refusal: OnRefusal = lambda error: None,
) -> grpc.aio.Server:
    """A server with our limits; it demands a token if, and only if, a token file is configured.

    on_refusal: called with each error that no handler has seen: a token that does not do, a message
    that cannot be decoded, a bug.

    Raises:
        ConfigError: the token file cannot be used.
    """
    file = security.token_file
    authorization = [] if file is None else [TokenInterceptor(Tokens(file), on_refusal)]
    return grpc.aio.server(
        interceptors=[BorderInterceptor(on_refusal), *authorization],
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
        ConfigError: the port is taken, the address is not ours, or a certificate cannot be used.
    """
    address = f"{host}:{port}"
    credentials = server_credentials(security)
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken or the address is not this machine's; "
            f"choose another {setting}"
        )
    return int(bound)


def open_channel(
    address: str,
    tls: ClientTLS | FollowedTLS | None,
    asynchronous: bool = True,
    more_options: Sequence[tuple[str, int | str]] = (),
) -> Any:
    """A channel with our limits; plain text where `tls` is None.

    Raises:
        ConfigError: a security file cannot be used.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", 64 << 20),
        *_keepalive(),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        *more_options,
    ]
    library = grpc.aio if asynchronous else grpc
    if tls is None:
        return library.insecure_channel(address, options=options)
    options += tls.options
    return library.secure_channel(address, tls.credentials(), options=options)


def _keepalive() -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_S)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),
        ("grpc.http2.ping_timeout_ms", _ms(KEEPALIVE_TIMEOUT_S)),  # its default is a minute
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
    ]


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def read_token(file: Path | None, role: Role) -> str | None:
    """The token with which calls in a role are made; None only where no file is configured.

    Raises:
        ConfigError: the file cannot be used, or has no token with the role.
    """
    return None if file is None else Tokens(file).token_for(role)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call: the bearer token, if there is one."""
    return (("authorization", f"Bearer {token}"),) if token else ()
