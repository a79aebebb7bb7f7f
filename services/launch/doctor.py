"""`s2t doctor`: what is installed, what the configuration needs, and how to mend what is
missing."""

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
from s2t_shared.versions.manifest import verify_files
from s2t_shared.versions.registry import Registry
from services.client import Client
from services.launch.local import check_models, check_port, check_security
from services.launch.redis_server import open_redis

PACKAGES = ("ray", "torch", "transformers", "grpcio", "protobuf", "redis", "pyarrow")


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it is well, and the detail or the fix."""

    what: str
    ok: bool
    detail: str


def examine(config: Config, address: str | None = None) -> list[Finding]:
    """All checks; with `address` also a running service's."""
    findings = [
        Finding(
            "packages", True, ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
        ),
        Finding(
            "hardware",
            True,
            f"{os.cpu_count()} CPUs, {torch.cuda.device_count()} GPUs visible to torch",
        ),
        _check("models", lambda: _models(config)),
        _check("exposure", lambda: _exposure(config)),
        _check("redis", lambda: _redis(config)),
        _check("versions", lambda: _versions(config)),
    ]
    if address:
        findings.append(_check("service", lambda: _service(address)))
    else:
        findings.append(_check("gateway port", lambda: _port(config)))
    return findings


def _check(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except S2TError as error:
        return Finding(what, False, str(error))


def _models(config: Config) -> str:
    check_models(config)
    return f"{config.slm_model} and {config.llm_model} share a tokenizer"


def _exposure(config: Config) -> str:
    check_security(config)
    return f"gateway on {config.gateway.host}, selectors on {config.selector.host}"


def _port(config: Config) -> str:
    check_port(config)
    return f"{config.gateway.port} is free"


def _redis(config: Config) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        server = open_redis(config.redis.url, Path(scratch), None)
        try:
            LabelStream(server.url).counts()
            return f"{server.place} answers"
        finally:
            server.stop()


def _versions(config: Config) -> str:
    registry = Registry(config.versions)
    for name in registry.names():
        verify_files(registry.root / name, registry.manifest(name))
    return f"{len(registry.names())} complete, live: {registry.live() or 'none'}"


def _service(address: str) -> str:
    with Client(address, timeout_s=5.0) as client:
        d = client.describe()
        return f"SLM {d.slm_digest}, LLM {d.llm_digest or 'not reachable'}, live selector {d.live_version or 'none'}"
