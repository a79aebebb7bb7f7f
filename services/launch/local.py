"""Starts the whole service on this machine or on a Ray cluster, and ends it without leftovers.

Redis (configured, system's or bundled) -> Ray (existing or local) -> selectors, proposers, gateway
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from s2t_shared.config import LOOPBACK, Config, check_exposure
from s2t_shared.errors import ConfigError
from s2t_shared.files import private_folder
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import check_same_tokenizer
from services.launch.deploy import Say, deploy, start_serve
from services.launch.ray_connection import PROBE_TIMEOUT_S, local_ray
from services.launch.redis_server import open_redis
from services.launch.running import end_application, find_url
from services.launch.service_record import recorded
from services.roles import APPLICATION, runs_proposers, runs_selectors
from services.rpc.tls import ClientTLS, server_credentials
from services.rpc.tokens import Tokens

OWN_RAY = "give this one a Ray of its own: RAY_ADDRESS=local s2t serve"
CLAIM = "s2t-serve"  # name and namespace of the actor that stands for the running `s2t serve`


@dataclass(frozen=True)
class RunningService:
    """A service that answers.

    address: host:port of the gateway. config: with the URL of the Redis in use filled in. url: of
    the gateway's HTTP, "" for none.
    """

    address: str
    config: Config
    url: str = ""


def check_security(config: Config) -> None:
    """Check who can reach the servers.

    Raises:
        ConfigError: a server would listen beyond loopback unprotected, or a security file cannot
            be used.
    """
    check_exposure(config)
    security = config.security
    if security.token_file is not None:
        Tokens(security.token_file)
    server_credentials(security)
    tls = ClientTLS.of(security)
    if tls is not None:
        tls.credentials()


def check_models(config: Config) -> None:
    """Check that both models share a tokenizer. Weights are not downloaded: that is the replicas'
    business, on their own nodes.

    Raises:
        ModelLoadError: a model is missing.
        TokenizerMismatchError: the two tokenize differently.
    """
    if not runs_proposers(config):
        return
    folder = resolve_model(config.slm.model, weights=False)
    slm = Tokenizer.load(folder, config.slm.chat_template)
    if runs_selectors(config):
        folder = resolve_model(config.llm.model, "llm", weights=False)
        check_same_tokenizer(slm, Tokenizer.load(folder))


def check_port(config: Config) -> None:
    """Check that the gateway can listen: better known now than after a minute of starting.

    Raises:
        ConfigError: a port of its is taken.
    """
    _check_port(config.gateway.host, config.gateway.port, "gateway.port")
    if config.gateway.http:
        _check_port(config.gateway.host, config.http_port, "gateway.http_port")


def _check_port(host: str, port: int, setting: str) -> None:
    if port == 0 or host not in LOOPBACK:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: the port is taken; choose another {setting}, or "
                "0 for any free one"
            ) from error


@contextmanager
def running_service(
    config: Config, say: Say = lambda line: None, reuse_ray: bool = False
) -> Iterator[RunningService]:
    """The service, until the block ends, be it by an exception or Ctrl-C.

    What is raised leaves nothing running.

    Raises:
        ConfigError: a setting is wrong, or the service did not start.
        ModelLoadError: a model is missing.
        TokenizerMismatchError: SLM and LLM tokenize differently.
        StoreError: Redis cannot be reached or started.
    """
    check_security(config)
    check_models(config)
    check_port(config)
    private_folder(config.data_dir)
    redis = open_redis(
        config.redis.url,
        config.data_dir / "redis",
        config.redis.port or None,
        password_dir=config.redis.password_dir,
        max_memory_mib=config.redis.max_memory_mib,
    )
    say(f"Redis ready ({redis.place})")
    try:
        resolved = config.model_copy(
            update={"redis": config.redis.model_copy(update=redis.settings())}
        )
        with local_ray(reuse=reuse_ray):
            say("Ray ready")
            head = ray.get_runtime_context().gcs_address
            with _application(resolved, say) as address, recorded(resolved, address, head):
                yield RunningService(address, resolved, find_url())
    finally:
        redis.stop()


@contextmanager
def claimed() -> Iterator[None]:
    """The sole right to start a service in this Ray cluster: `serve.run` would replace another's
    application without a word, also that of one who starts at the same moment.

    A named actor is made once, and Ray ends it with the process that made it, however that ends.

    Raises:
        ConfigError: another process has the right, or its service was left behind.
    """

    class Claim:
        pass

    actor: Any = ray.remote(num_cpus=0)(Claim)
    try:
        claim = actor.options(name=CLAIM, namespace=CLAIM).remote()
    except ValueError as error:  # the name is taken
        raise ConfigError(
            f"a service runs or starts in this Ray cluster already ({_where()}), and a second one "
            f"would replace it; stop the first one (Ctrl-C there), or {OWN_RAY}"
        ) from error
    try:
        check_free()
        yield
    finally:
        ray.kill(claim)


def check_free() -> None:
    """Check that the cluster has no application of ours that no `s2t serve` stands behind.

    Raises:
        ConfigError: it has one; with its address, where it says it.
    """
    running = serve.status().applications.get(APPLICATION)
    if running is None or running.status == ApplicationStatus.DELETING:
        return
    cluster = ray.get_runtime_context().gcs_address
    raise ConfigError(
        f"a service is in this Ray cluster already ({_where()}, {running.status.value}), of `s2t "
        "up` or `serve deploy`, or left behind by an `s2t serve` that was killed; end it "
        f"(RAY_ADDRESS={cluster} s2t down), change it (s2t up), or {OWN_RAY}"
    )


def _where() -> str:
    """Where the service in this cluster listens."""
    if APPLICATION not in serve.status().applications:
        return "it is still starting"
    try:
        gateway = serve.get_deployment_handle("Gateway", APPLICATION)
        return f"at {gateway.address.remote().result(timeout_s=PROBE_TIMEOUT_S)}"
    except Exception as error:  # noqa: BLE001 - the border to Serve: it may raise anything here
        return f"it does not say where: {type(error).__name__}"


@contextmanager
def _application(config: Config, say: Say) -> Iterator[str]:
    """The service's address, while it runs."""
    start_serve()
    with claimed():
        try:
            yield deploy(config, say)[0]
        finally:
            # Not serve.shutdown(): in a cluster of ours Ray's own end follows, in another's Serve
            # may be in use.
            end_application(say)
