"""`s2t doctor`: checks what is installed and what the configuration needs.

A failed check says how to mend what is missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.manifest import verify_files
from services.client import Client
from services.launch.local import check_models, check_port, check_security
from services.launch.redis_server import open_redis

PACKAGES = ("ray", "torch", "transformers", "grpcio", "protobuf", "redis", "pyarrow")


@dataclass(frozen=True)
class Finding:
    """Result of one check. detail: what was found, or how to mend it."""

    what: str
    ok: bool
    detail: str


def examine(config: Config, address: str | None = None) -> list[Finding]:
    """Run all checks; with `address` also those of the service that runs there."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("packages", check_packages),
        ("hardware", check_hardware),
        ("models", lambda: check_pair(config)),
        ("exposure", lambda: check_servers(config)),
        ("redis", lambda: check_redis(config)),
        ("versions", lambda: check_versions(config)),
    ]
    if address is not None:
        checks.append(("service", lambda: check_service(address)))
    else:
        checks.append(("gateway port", lambda: check_gateway_port(config)))
    return [_finding(what, check) for what, check in checks]


def _finding(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except S2TError as error:
        return Finding(what, False, str(error))


# -- checks: each returns what it found, or raises S2TError ---------------------------------------


def check_packages() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join(versions)


def check_hardware() -> str:
    return f"{os.cpu_count()} CPUs, {torch.cuda.device_count()} GPUs visible to torch"


def check_pair(config: Config) -> str:
    check_models(config)
    return f"{config.slm.model} and {config.llm.model} share a tokenizer"


def check_servers(config: Config) -> str:
    check_security(config)
    return f"gateway on {config.gateway.host}, selectors on {config.selector.host}"


def check_gateway_port(config: Config) -> str:
    check_port(config)
    return f"{config.gateway.port} is free"


def check_redis(config: Config) -> str:
    with tempfile.TemporaryDirectory() as folder:
        server = open_redis(config.redis.url, Path(folder), None)
        try:
            LabelStream(server.url).counts()
            return f"{server.place} answers"
        finally:
            server.stop()


def check_versions(config: Config) -> str:
    versions = LiveVersions(config.versions)
    registry = versions.registry
    names = registry.names()
    for name in names:
        verify_files(registry.root / name, registry.manifest(name))
    return f"{len(names)} complete, live: {versions.live() or 'none'}"


def check_service(address: str) -> str:
    with Client(address, timeout_s=5.0) as client:
        service = client.describe()
    llm = service.llm_digest or "none"
    if not service.llm_reachable:
        llm += " (not reachable)"
    live = service.live_version or "none"
    return f"SLM {service.slm_digest}, LLM {llm}, live local selector {live}"
