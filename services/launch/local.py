"""Bringing the whole service up on this machine or an existing Ray cluster, and down again without
leftovers.

Redis (configured, system's or bundled) -> Ray (existing or local) -> selectors, proposers, gateway
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # Serve logs to files in Ray's session folder

import ray  # noqa: E402 - the environment above is read at import
from ray import serve  # noqa: E402
from ray.serve.config import HTTPOptions, ProxyLocation  # noqa: E402

from s2t_shared.config import LOOPBACK, Config, check_exposure  # noqa: E402
from s2t_shared.errors import ConfigError, S2TError  # noqa: E402
from s2t_shared.model.runtime import resolve_model  # noqa: E402
from s2t_shared.model.tokenizer import Tokenizer, check_same_tokenizer  # noqa: E402
from services.app import APPLICATION, build_application  # noqa: E402
from services.launch.redis_server import open_redis  # noqa: E402
from services.rpc import channels  # noqa: E402

logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)
OBJECT_STORE_BYTES = 256 << 20
Say = Callable[[str], None]


@dataclass(frozen=True)
class RunningService:
    """Where the service listens, and the configuration it resolved to (Redis URL and ports filled
    in)."""

    address: str
    config: Config


def check_security(config: Config) -> None:
    """Raises ConfigError: a server would listen beyond loopback unprotected, or the token file
    holds no token."""
    check_exposure(config)
    channels.read_token(config.security.token_file)


def check_models(config: Config) -> None:
    """What can be known before anything is started: both models are there and share a tokenizer.

    Raises:
        ModelLoadError, TokenizerMismatchError.
    """
    slm = Tokenizer.load(resolve_model(config.slm_model), config.slm.chat_template)
    if config.selector.replicas and not config.selector.addresses:
        check_same_tokenizer(slm, Tokenizer.load(resolve_model(config.llm_model)))


def check_port(config: Config) -> None:
    """Raises ConfigError: the gateway's port is taken (better known now than after a minute of
    starting)."""
    if config.gateway.port == 0 or config.gateway.host not in LOOPBACK:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.gateway.host, config.gateway.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.gateway.host}:{config.gateway.port}: the port is taken; "
                "choose another gateway.port, or 0 for any free one"
            ) from error


@contextmanager
def local_ray(num_cpus: float | None = None, reuse: bool = True) -> Iterator[None]:
    """A Ray connection: the one this process has, a running local cluster's (`reuse`), or a fresh
    local cluster that ends with the block."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if reuse:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            pass
        else:
            try:
                yield
            finally:
                ray.shutdown()
            return
    ray.init(
        num_cpus=int(num_cpus or max(2, os.cpu_count() or 2)),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def running_service(
    config: Config, say: Say = lambda line: None, reuse_ray: bool = False
) -> Iterator[RunningService]:
    """The service, until the block ends (also by an exception or Ctrl-C).

    Raises: ConfigError, ModelLoadError, TokenizerMismatchError, StoreError: before anything is left
        running.
    """
    check_security(config)
    check_models(config)
    check_port(config)
    config.data_dir.mkdir(parents=True, exist_ok=True)
    redis = open_redis(config.redis.url, config.data_dir / "redis", config.redis.port or None)
    say(f"Redis ready ({redis.place})")
    try:
        resolved = config.model_copy(
            update={"redis": config.redis.model_copy(update={"url": redis.url})}
        )
        with local_ray(reuse=reuse_ray):
            say("Ray ready")
            with _application(resolved) as address:
                yield RunningService(address, resolved)
    finally:
        redis.stop()


@contextmanager
def _application(config: Config) -> Iterator[str]:
    serve.start(proxy_location=ProxyLocation.Disabled, http_options=HTTPOptions(host="127.0.0.1"))
    try:
        try:
            serve.run(build_application(config), name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"the service did not start: {_reason(error)}") from error
        port = (
            serve.get_deployment_handle("Gateway", APPLICATION).port.remote().result(timeout_s=30)
        )
        yield f"{config.gateway.host}:{port}"
    finally:
        # Not serve.shutdown(): in a cluster of ours Ray's own end follows, in another's Serve may
        # be in use.
        serve.delete(APPLICATION)


def _reason(error: RuntimeError) -> str:
    """The first error of ours in a failed deployment's message, else its last line."""
    names = tuple(f"{kind.__name__}: " for kind in _descendants(S2TError))
    message = (
        serve.status().applications[APPLICATION].message
        if APPLICATION in serve.status().applications
        else ""
    )
    text = message or str(error)
    for deployment in (
        serve.status().applications[APPLICATION].deployments.values() if message else ()
    ):
        text += "\n" + deployment.message
    for line in reversed(text.splitlines()):
        for name in names:
            if name in line:
                return line.split(name, 1)[1].strip()
    return text.strip().splitlines()[-1] if text.strip() else "unknown reason"


def _descendants(kind: type[S2TError]) -> list[type[S2TError]]:
    return [kind, *(d for child in kind.__subclasses__() for d in _descendants(child))]
