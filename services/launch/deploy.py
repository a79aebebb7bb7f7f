"""Deploys the application on the Ray cluster that this process is connected to.

Checks first what can be known first, says meanwhile what a replica waits for, and afterwards what
an operator should know.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s2t_shared.bundled import BUNDLED
from s2t_shared.config import Config
from s2t_shared.errors import ConfigError, S2TError
from services.app import build_application
from services.launch.running import find_addresses, find_metrics, waits
from services.nodes import Node, check_gateway_host, check_spread, find_nodes, room_for
from services.roles import APPLICATION, SECTIONS, runs_proposers

Say = Callable[[str], None]
WATCH_EVERY_S = 2.0
PATIENCE_S = 4.0  # a replica that Ray has not placed by then waits for something
FOLDER_TIMEOUT_S = 30.0


def start_serve() -> None:
    """Start Serve's controller, if it does not run. Its HTTP proxies stay off: clients talk to our
    gateway."""
    serve.start(proxy_location=ProxyLocation.Disabled, http_options=HTTPOptions(host="127.0.0.1"))


def deploy(config: Config, say: Say) -> list[str]:
    """Deploy the service, or what changed of it; returns `find_addresses`.

    Raises:
        ConfigError: the settings do not do for this cluster, or the service did not start.
    """
    nodes = find_nodes()
    check_spread(config, nodes)
    if runs_proposers(config):
        check_folder(config.data_dir, nodes)
    for word in words_before(config, nodes):
        say(f"warning: {word}")
    with watched(config, say):
        try:
            serve.run(build_application(config), name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"the service did not start: {_reason(error)}") from error
    if word := no_training_room(config, find_nodes()):
        say(f"warning: {word}")
    if config.metrics.enabled and config.metrics.port is not None:
        say(f"metrics: {_metrics_in_words()}")
    return find_addresses()


def _metrics_in_words() -> str:
    found = find_metrics().items()
    return ", ".join(f"{url} ({SECTIONS[name]})" for name, urls in found for url in urls)


# -- before and after -----------------------------------------------------------------------------


def words_before(config: Config, nodes: Sequence[Node]) -> Iterator[str]:
    """What works, but not as one might think."""
    if not runs_proposers(config):
        return
    if config.calibration.prompts is None and config.slm.model != BUNDLED:
        yield (
            "calibration.prompts is not set: thresholds are calibrated on generic questions, and a "
            f"budget of {config.defaults.budget:g} will ask the LLM at another share of your "
            "traffic's tokens; set it to a JSONL file of your own prompts"
        )
    if word := check_gateway_host(config, nodes):
        yield word


def no_training_room(config: Config, nodes: Sequence[Node]) -> str:
    """What `s2t train` would wait for beside this service; "" where it has room."""
    training = config.training
    if not runs_proposers(config):
        return ""
    needs = {"CPU": training.cpus_per_worker, "GPU": training.gpus_per_worker}
    needs = {name: amount for name, amount in needs.items() if amount}
    if room_for(needs, nodes) >= training.workers:
        return ""
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    return (
        f"no room for training: `s2t train` runs {training.workers} workers with {wanted} each, "
        "and the nodes have not so much left beside the service; it would wait. Add a node, or "
        "lower training.workers, training.gpus_per_worker or training.cpus_per_worker"
    )


def check_folder(folder: Path, nodes: Sequence[Node]) -> None:
    """Check that all nodes see this node's `folder`.

    Raises:
        ConfigError: one does not.
    """
    if len(nodes) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-{uuid4().hex}"
    marker.touch()
    path = str(marker)  # the function below travels by value: nodes need nothing of ours for it

    def sees() -> bool:
        import os

        return os.path.exists(path)

    try:
        asked = {node.address: _on_node(sees, node) for node in nodes}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=FOLDER_TIMEOUT_S)
        blind = [address for address, answer in asked.items() if not _answer(answer)]
    finally:
        marker.unlink()
    if blind:
        raise ConfigError(
            f"data_dir={folder}: not the same folder on {', '.join(blind)} as here, and this Ray "
            "cluster has several nodes, which share labels and versions there. Mount one storage "
            "there on all nodes (NFSv4, CephFS, EFS, Filestore), or set data_dir to where it is"
        )


def _on_node(function: Callable[[], bool], node: Node) -> Any:
    affinity = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return (
        ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=affinity)
    ).remote()


def _answer(asked: Any) -> bool:
    try:
        return bool(ray.get(asked, timeout=0))
    except ray.exceptions.RayError:  # the node is gone, or did not answer in time
        return False


# -- meanwhile ------------------------------------------------------------------------------------


@contextmanager
def watched(config: Config, say: Say) -> Iterator[None]:
    """Say, while the block runs, what replicas that Ray cannot place wait for; each thing once."""
    over = threading.Event()

    def watch() -> None:
        said: set[str] = set()
        since: dict[str, float] = {}
        while not over.wait(WATCH_EVERY_S):
            now = time.monotonic()
            waiting = waits(config)
            since = {name: since.get(name, now) for name in waiting}
            for name, word in waiting.items():
                if now - since[name] >= PATIENCE_S and word not in said:
                    said.add(word)
                    say(word)

    thread = threading.Thread(target=watch, daemon=True, name="awaited-resources")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- what went wrong ------------------------------------------------------------------------------


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
