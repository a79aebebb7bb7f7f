"""Certificates for tests: an authority, and PEM files of what it issues."""

from __future__ import annotations

import datetime
from pathlib import Path

import trustme

from s2t_shared.config import SecurityConfig

NAME = "s2t.internal"  # in servers' certificates, beside 127.0.0.1


class Authority:
    """Issues certificates into a folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._ca = trustme.CA()
        self.folder = folder
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(
        self, name: str, *identities: str, valid_until: datetime.datetime | None = None
    ) -> tuple[Path, Path]:
        """Certificate chain and key as PEM files, in place of those of this name."""
        issued = self._ca.issue_cert(*(identities or (NAME, "127.0.0.1")), not_after=valid_until)
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        key.write_bytes(issued.private_key_pem.bytes())
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return certificate, key


def secured(authority: Authority, mutual: bool = False, **settings: object) -> SecurityConfig:
    """The settings of a deployment whose certificates are of `authority`."""
    certificate, key = authority.issue("server")
    given = {"certificate": certificate, "key": key, "authority": authority.file}
    if mutual:
        own, own_key = authority.issue("client", "client")
        given |= {"client_certificate": own, "client_key": own_key}
        given["client_authority"] = authority.file
    return SecurityConfig.model_validate({**given, **settings})


def settings_of(security: SecurityConfig) -> dict[str, str]:
    """The same as overrides of the configuration."""
    names = ("certificate", "key", "authority")
    return {f"security.{name}": str(getattr(security, name)) for name in names}
