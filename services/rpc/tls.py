"""TLS of our servers and channels, from PEM files that are read again when they change.

A server takes up a new certificate at the next handshake; connections that stand stay. A channel
keeps what it was opened with: who lives long opens another when `FollowedTLS` has others.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from s2t_shared.errors import ConfigError
from services.rpc.reloading import Reloaded, read_bytes

if TYPE_CHECKING:
    from s2t_shared.config import SecurityConfig

Pems = tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class ClientTLS:
    """How a channel does TLS.

    authority: PEM file that the server's certificate is checked against. certificate, key: PEM
    files of the client's own, where the server asks for one. server_name: the name that must stand
    in the server's certificate; "": its address.
    """

    authority: Path
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""

    @classmethod
    def of(cls, security: SecurityConfig) -> ClientTLS | None:
        """That of the channels which a deployment opens; None: plain text."""
        if security.authority is None:
            return None
        return cls(
            authority=security.authority,
            certificate=security.client_certificate,
            key=security.client_key,
            server_name=security.server_name,
        )

    def credentials(self) -> Any:
        """The channel's credentials, from the files as they are now.

        Raises:
            ConfigError: a file cannot be used.
        """
        roots = _read_authority(self.authority)
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(roots)
        chain, key = _read_pair(self.certificate, self.key)
        return grpc.ssl_channel_credentials(roots, private_key=key, certificate_chain=chain)

    @property
    def options(self) -> list[tuple[str, str]]:
        """Of the channel."""
        if not self.server_name:
            return []
        return [("grpc.ssl_target_name_override", self.server_name)]

    @property
    def files(self) -> list[Path]:
        """What the credentials are read from."""
        own = (self.authority, self.certificate, self.key)
        return [file for file in own if file is not None]


class FollowedTLS:
    """A `ClientTLS` for who lives long: its credentials are those of the files as they are now."""

    def __init__(self, tls: ClientTLS) -> None:
        """Raises ConfigError: a file cannot be used."""
        self.options = tls.options
        self._current = Reloaded(tls.files, tls.credentials)

    def credentials(self) -> Any:
        """The same object until a file changes."""
        return self._current.value


def server_credentials(security: SecurityConfig) -> Any:
    """Credentials of a server that follow their files; None: plain text.

    With `security.client_authority` only clients with a certificate of that authority are heard.

    Raises:
        ConfigError: a file cannot be used.
    """
    certificate, key, clients = security.certificate, security.key, security.client_authority
    if certificate is None or key is None:
        return None

    def read() -> Pems:
        own = _read_pair(certificate, key)
        return own if clients is None else (*own, _read_authority(clients))

    files = [certificate, key] if clients is None else [certificate, key, clients]
    current = Reloaded(files, read)
    used = current.value

    def fetch() -> Any:
        """At each handshake, on a thread of gRPC's: the new files, or None while nothing is new."""
        nonlocal used
        if current.value == used:
            return None
        used = current.value
        return _configuration(used)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(used), fetch, require_client_authentication=clients is not None
    )


def server_context(security: SecurityConfig) -> ssl.SSLContext | None:
    """The same for servers that do TLS with Python's `ssl`.

    Raises:
        ConfigError: a file cannot be used.
    """
    certificate, key, clients = security.certificate, security.key, security.client_authority
    if certificate is None or key is None:
        return None

    def read() -> ssl.SSLContext:
        _read_pair(certificate, key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        if clients is not None:
            context.load_verify_locations(cadata=_read_authority(clients).decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    files = [certificate, key] if clients is None else [certificate, key, clients]
    current = Reloaded(files, read)

    def follow(handshake: ssl.SSLObject, server_name: str | None, _: ssl.SSLContext) -> None:
        """At each handshake, with a name or without: the files as they are now."""
        handshake.context = current.value

    context = read()
    context.sni_callback = follow
    return context


def _configuration(pems: Pems) -> Any:
    chain, key, *clients = pems
    return grpc.ssl_server_certificate_configuration(
        [(key, chain)], root_certificates=clients[0] if clients else None
    )


def _read_pair(certificate: Path, key: Path) -> Pems:
    """A certificate chain and its private key, checked to belong together: gRPC would listen, and
    fail at every handshake.

    Raises:
        ConfigError: they do not, or cannot be read.
    """
    pems = (read_bytes(certificate), read_bytes(key))
    try:
        # An encrypted key would ask for its password on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors
        raise ConfigError(
            f"security files {certificate.name!r} and {key.name!r} are not a PEM certificate chain "
            "and its own private key (without a password); see security.certificate, security.key"
        ) from error
    return pems


def _read_authority(file: Path) -> bytes:
    pem = read_bytes(file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"security file {file.name!r} holds no PEM certificates of an authority"
        ) from error
    return pem
