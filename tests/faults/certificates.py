"""Certificates for loopback, of an authority that is made up for a test."""

from __future__ import annotations

from pathlib import Path

import trustme

from s2t_shared.config import SecurityConfig


def secured(folder: Path) -> SecurityConfig:
    """TLS for every server and client; its files are written to `folder`."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    security = SecurityConfig(
        certificate=folder / "certificate.pem",
        key=folder / "key.pem",
        authority=folder / "authority.pem",
    )
    authority.cert_pem.write_to_path(security.authority)
    certificate.private_key_pem.write_to_path(security.key)
    certificate.cert_chain_pems[0].write_to_path(security.certificate)
    return security


def settings_of(security: SecurityConfig) -> dict[str, str]:
    """Overrides of the configuration."""
    names = ("certificate", "key", "authority")
    return {f"security.{name}": str(getattr(security, name)) for name in names}
