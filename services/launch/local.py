"""Starts the whole service on this machine or on a Ray cluster, and ends it without leftovers.

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
from ray.serve.schema import ApplicationStatus  # noqa: E402

from s2t_shared.config import LOOPBACK, Config, check_exposure  # noqa: E402
from s2t_shared.errors import ConfigError, S2TError  # noqa: E402
from s2t_shared.model.loading import resolve_model  # noqa: E402
from s2t_shared.model.tokenizer import Tokenizer  # noqa: E402
from s2t_shared.model.vocabulary import check_same_tokenizer  # noqa: E402
from services.app import APPLICATION, build_application  # noqa: E402
from services.launch.redis_server import open_redis  # noqa: E402
from services.launch.service_record import recorded  # noqa: E402
from services.rpc import channels  # noqa: E402

logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)
OBJECT_STORE_BYTES = 256 << 20
PROBE_TIMEOUT_S = 5.0
OWN_RAY = "give this one a Ray of its own: RAY_ADDRESS=local s2t serve"
CLAIM = "s2t-serve"  # name and namespace of the actor that stands for the running `s2t serve`
Say = Callable[[str], None]


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
        ConfigError: a server would listen beyond loopback unprotected, or the token file holds no
            token.
    """
    check_exposure(config)
    channels.read_token(config.security.token_file)


def check_models(config: Config) -> None:
    """Check that both models are there and share a tokenizer.

    Raises:
        ModelLoadError: a model is missing.
        TokenizerMismatchError: the two tokenize differently.
    """
    slm = Tokenizer.load(resolve_model(config.slm.model), config.slm.chat_template)
    if config.selector.replicas and not config.selector.addresses:
        check_same_tokenizer(slm, Tokenizer.load(resolve_model(config.llm.model, "llm")))


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
def local_ray(num_cpus: float | None = None, reuse: bool = True) -> Iterator[None]:
    """A connection to Ray: this process's own, or a running local cluster's (with `reuse`), or a
    fresh local cluster that ends with the block."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":
        reuse = False
    if reuse and _join(address or "auto", quiet):
        try:
            yield
        finally:
            ray.shutdown()
        return
    ray.init(
        address="local",
        num_cpus=int(num_cpus or max(2, os.cpu_count() or 2)),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, quiet: dict[str, Any]) -> bool:
    """Connect to a running Ray cluster; whether there is one.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that cannot be joined.
    """
    try:
        if address != "auto":
            _probe(address)
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:  # a ConnectionError is an OSError
        if address == "auto":
            return False
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"RAY_ADDRESS={address}: this Ray cluster cannot be joined ({reason}); start it "
            "(ray start --head), correct the address, set RAY_AUTH_MODE=token where the cluster "
            "asks for a token, or unset RAY_ADDRESS for a Ray of this machine's own"
        ) from error
    return True


def _probe(address: str) -> None:
    """Check that something listens at `address`: Ray itself tries for minutes without a word.

    Raises:
        OSError: nothing does.
        ValueError: it is not host:port.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError("not host:port of the head node; a ray:// client cannot run a service")
    socket.create_connection((host, int(port)), PROBE_TIMEOUT_S).close()


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
    config.data_dir.mkdir(parents=True, exist_ok=True)
    redis = open_redis(config.redis.url, config.data_dir / "redis", config.redis.port or None)
    say(f"Redis ready ({redis.place})")
    try:
        resolved = config.model_copy(
            update={"redis": config.redis.model_copy(update={"url": redis.url})}
        )
        with local_ray(reuse=reuse_ray):
            say("Ray ready")
            with _application(resolved) as address, recorded(resolved, address):
                yield RunningService(address, resolved, _url())
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
    removal = f"from ray import serve; serve.delete('{APPLICATION}')"
    raise ConfigError(
        f"a service is in this Ray cluster already ({_where()}, {running.status.value}), of "
        "`serve deploy`, or left behind by an `s2t serve` that was killed; remove it "
        f'(RAY_ADDRESS={cluster} python -c "{removal}"), or {OWN_RAY}'
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
def _application(config: Config) -> Iterator[str]:
    """The service's address, while it runs."""
    serve.start(proxy_location=ProxyLocation.Disabled, http_options=HTTPOptions(host="127.0.0.1"))
    with claimed():
        try:
            try:
                serve.run(build_application(config), name=APPLICATION, route_prefix=None)
            except RuntimeError as error:
                raise ConfigError(f"the service did not start: {_reason(error)}") from error
            gateway = serve.get_deployment_handle("Gateway", APPLICATION)
            yield str(gateway.address.remote().result(timeout_s=30))
        finally:
            # Not serve.shutdown(): in a cluster of ours Ray's own end follows, in another's Serve
            # may be in use.
            serve.delete(APPLICATION)


def _url() -> str:
    """Where the service in this cluster serves HTTP."""
    gateway = serve.get_deployment_handle("Gateway", APPLICATION)
    return str(gateway.url.remote().result(timeout_s=PROBE_TIMEOUT_S))


def _reason(error: RuntimeError) -> str:
    """Why the application did not start: the last error of ours that Serve reports, else the last
    line of all that it says."""
    lines = _reported(error).strip().splitlines()
    for line in reversed(lines):
        for kind in _kinds(S2TError):
            _, found, text = line.partition(f"{kind.__name__}: ")
            if found:
                return text.strip()
    return lines[-1] if lines else "unknown reason"


def _reported(error: RuntimeError) -> str:
    """What Serve says of the application and of each of its deployments, else the error's text."""
    application = serve.status().applications.get(APPLICATION)
    if application is None or not application.message:
        return str(error)
    messages = [deployment.message for deployment in application.deployments.values()]
    return "\n".join([application.message, *messages])


def _kinds(kind: type[S2TError]) -> list[type[S2TError]]:
    """An error class and all its subclasses."""
    kinds = [kind]
    for subclass in kind.__subclasses__():
        kinds += _kinds(subclass)
    return kinds
