"""`s2t doctor`: checks what is installed, what the configuration needs and the service that runs.

A check yields findings, or raises an S2TError whose text says how to mend what is wrong. Where a
service runs on the data folder, its own Redis, port and configuration are looked at.
"""

from __future__ import annotations

import importlib.metadata
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.manifest import verify_files
from services.client import Client
from services.launch.findings import Finding, fail, ok, warn
from services.launch.local import check_models, check_port, check_security
from services.launch.redis_checks import ask_server, check_redis
from services.launch.redis_server import open_redis
from services.launch.service_record import ServiceRecord, find_service
from services.launch.storage_checks import check_storage
from services.rpc import channels
from services.rpc.tls import ClientTLS
from services.rpc.tokens import Role

PACKAGES = ("ray", "torch", "transformers", "grpcio", "protobuf", "redis", "pyarrow")
TIMEOUT_S = 5.0


def examine(
    config: Config, address: str | None = None, token_file: Path | None = None
) -> Iterator[Finding]:
    """Run all checks.

    address: of a service; None: the one that runs on the data folder. token_file: None: that of the
    configuration.
    """
    record = find_service(config.data_dir)
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("packages", check_packages),
        ("hardware", check_hardware),
        ("models", lambda: check_pair(config)),
        ("exposure", lambda: check_servers(config)),
        ("storage", lambda: check_storage(config)),
        ("redis", lambda: check_any_redis(config, record)),
        ("versions", lambda: check_versions(config)),
    ]
    address = address or (record.address if record is not None else None)
    if address is None:
        checks.append(("gateway port", lambda: check_gateway_port(config)))
    else:
        where = address
        checks.append(("service", lambda: check_service(config, where, token_file)))
    if record is not None:
        checks.append(("settings", lambda: check_settings(config, record)))
    for what, check in checks:
        try:
            yield from check()
        except S2TError as error:
            yield fail(what, str(error))


# -- checks ---------------------------------------------------------------------------------------


def check_packages() -> Iterator[Finding]:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    yield ok("packages", ", ".join(versions))


def check_hardware() -> Iterator[Finding]:
    yield ok("hardware", f"{os.cpu_count()} CPUs, {torch.cuda.device_count()} GPUs for torch")


def check_pair(config: Config) -> Iterator[Finding]:
    check_models(config)
    yield ok("models", f"{config.slm.model} and {config.llm.model} share a tokenizer")


def check_servers(config: Config) -> Iterator[Finding]:
    check_security(config)
    detail = f"gateway on {config.gateway.host}, selectors on {config.selector.host}"
    secrets = (config.security.token_file, config.security.key)
    readable = [str(file) for file in secrets if file is not None and _others_can_read(file)]
    if readable:
        files = " ".join(readable)
        yield warn("exposure", f"{detail}; others may read {files}", f"chmod o-r {files}")
    else:
        yield ok("exposure", detail)


def _others_can_read(file: Path) -> bool:
    return file.exists() and bool(file.stat().st_mode & stat.S_IROTH)


def check_gateway_port(config: Config) -> Iterator[Finding]:
    check_port(config)
    yield ok("gateway port", f"{config.gateway.port} is free; no service runs on the data folder")


def check_any_redis(config: Config, record: ServiceRecord | None) -> Iterator[Finding]:
    """The configured Redis, else that of the running service, else one that is tried out."""
    if record is not None:
        config = record.with_redis(config)
    if config.redis.url:
        yield from check_redis(config)
        return
    if record is not None:
        yield warn("redis", "the service has none: it stores no labels", "set redis.url")
        return
    with tempfile.TemporaryDirectory() as folder, open_redis(None, Path(folder)) as server:
        program = ask_server(server.url).program
    yield ok("redis", f"{program} starts here; s2t serve starts one, as redis.url is not set")


def check_versions(config: Config) -> Iterator[Finding]:
    versions = LiveVersions(config.versions)
    registry = versions.registry
    names = registry.names()
    for name in names:
        verify_files(registry.root / name, registry.manifest(name))
    yield ok("versions", f"{len(names)} complete, live: {versions.live() or 'none'}")


def check_service(
    config: Config, address: str, token_file: Path | None = None
) -> Iterator[Finding]:
    """What a service says of itself, over TLS and with a token where the configuration has them."""
    security = config.security
    token = channels.read_token(token_file or security.token_file, Role.GENERATE)
    tls = ClientTLS.of(security)
    with Client(address, token, timeout_s=TIMEOUT_S, tls=tls) as client:
        service = client.describe()
        live = service.live_version or "none"
        detail = (
            f"{address}: SLM {service.slm_digest}, LLM {service.llm_digest or 'none'}, "
            f"live local selector {live}"
        )
        if service.llm_reachable:
            yield ok("service", detail)
        else:
            yield warn(
                "service",
                f"{detail}; the LLM is not reachable: answers degrade",
                "see the selectors' logs and selector.addresses",
            )
        yield _administration(client)


def _administration(client: Client) -> Finding:
    what = "administration"
    try:
        counts = client.count_labels()
    except S2TError as error:
        return warn(what, str(error), "a token with the role admin (--token-file), and a Redis")
    if counts.dropped:
        mend = "see that Redis answers and the spool has room (labels.spool_mib)"
        return warn(what, f"{counts.dropped} labels were lost since the proposer started", mend)
    return ok(what, f"allowed; {counts.in_lake} labels in the lake, none lost")


def check_settings(config: Config, record: ServiceRecord) -> Iterator[Finding]:
    differences = record.differences(config)
    if differences:
        mend = "give doctor the service's --config, or leave it out"
        yield warn("settings", "; ".join(differences), mend)
