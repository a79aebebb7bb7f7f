"""reference.yaml on a Ray cluster of several nodes, all of them on this machine and each with the
custom resource of its role; the bundled pair stands for the models, and TLS is on.

One story, because its cluster takes a minute to start: the LLM's node is awaited, roles land, the
LLM's node dies and comes back, a proposer's node is added, and all of it ends.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

from s2t_shared.bundled import problems
from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError, S2TError
from s2t_shared.types import Answer
from services import nodes
from services.client import Client
from services.launch.down import down
from services.launch.redis_server import RedisServer, open_redis
from services.launch.status import status
from services.launch.up import up
from services.roles import APPLICATION
from services.rpc.channels import read_token
from services.rpc.tokens import Role

pytestmark = [pytest.mark.service, pytest.mark.faults]
FILES = Path(__file__).parent.parent.parent / "cluster"
PATIENCE_S = 180.0
PROMPTS = [problem.prompt for problem in problems.problems("test", 24)]


@dataclass
class Stage:
    """A Ray cluster, a Redis, and settings for both. said: what `up` said, with its time."""

    cluster: Cluster
    redis: RedisServer
    folder: Path
    secrets: Path
    ip: str
    selector_port: int
    said: list[tuple[float, str]] = field(default_factory=list)
    llm_node: Any = None

    def add_node(self, resource: str) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={resource: 1})

    def settings(self, **overrides: object) -> Config:
        """reference.yaml, with models and amounts that fit this machine."""
        values = yaml.safe_load((FILES / "reference.yaml").read_text(encoding="utf-8"))
        for section in ("slm", "llm"):
            values[section] = {}
        small = {"num_cpus": 0.2, "num_gpus": 0}
        for section in ("gateway", "proposer", "selector"):
            values[section] |= small
            values[section].pop("accelerator_type", None)
        values["security"] = {
            "certificate": str(self.secrets / "tls.crt"),
            "key": str(self.secrets / "tls.key"),
            "authority": str(self.secrets / "ca.crt"),
            "token_file": str(self.secrets / "token"),
        }
        values["redis"] = {"url": self.redis.url}
        values["data_dir"] = str(self.folder / "data")
        values["gateway"]["port"] = 0  # all nodes share this machine's address
        values["selector"] |= {"port": self.selector_port, "max_replicas": None}
        values["proposer"] |= {"replicas": 1, "max_replicas": None}
        named = {key.replace("__", "."): value for key, value in overrides.items()}
        return load_config(None, named, environment={}, base=values)

    def say(self, line: str) -> None:
        self.said.append((time.monotonic(), line))

    def ask(self, address: str, prompt: str) -> Answer:
        token = read_token(self.secrets / "token", Role.GENERATE)
        with Client(address, token, self.secrets / "ca.crt", timeout_s=60) as client:
            return client.generate(prompt, mode="s2t", budget=0.2, max_new_tokens=40)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "resources": {"gateway_node": 1},
            "include_dashboard": False,
        },
    )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ip = cluster.address.partition(":")[0]
    secrets = tmp_path / "secrets"
    subprocess.run(["sh", str(FILES / "certificates.sh"), str(secrets), ip], check=True)
    redis = open_redis(None, tmp_path / "redis")
    opened = Stage(cluster, redis, tmp_path, secrets, ip, free_port())
    try:
        yield opened
    finally:
        ray.shutdown()
        cluster.shutdown()
        redis.stop()


def wait_for(what: str, holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Wait until something holds; what it says then."""
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        try:
            if found := holds():
                return found
        except S2TError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{what} was waited for in vain")


def replicas(role: str) -> dict[str, Any]:
    """Living replicas of a deployment in Ray's table of actors, by their names."""
    prefix = f"SERVE_REPLICA::{APPLICATION}#{role}#"
    return {
        actor["Name"]: actor
        for actor in ray._private.state.actors().values()
        if actor["Name"].startswith(prefix) and actor["State"] == "ALIVE"
    }


def homes(role: str) -> list[str]:
    """The custom resource of each node that has a replica of a role."""
    resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    found = []
    for actor in replicas(role).values():
        has = resources[actor["Address"]["NodeID"]]
        found += [name for name in has if name.endswith("_node")]
    return sorted(found)


def test_reference_on_several_nodes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.add_node("gateway_node")
    stage.add_node("slm_node")
    stage.cluster.wait_for_nodes()

    # -- settings of one node are refused
    with pytest.raises(ConfigError, match=r"has 3 nodes.*Set redis\.url"):
        up(stage.settings(), stage.say)
    monkeypatch.setattr(nodes, "LOOPBACK", ())  # here each node does reach this Redis

    # -- the LLM's node is awaited, by name and soon
    addresses = up_when_the_llm_comes(stage)
    config = stage.settings()

    # -- roles are where they should be
    ray.init(address=stage.cluster.address, log_to_driver=False, logging_level="ERROR")
    assert homes("Gateway") == ["gateway_node", "gateway_node"]
    assert homes("ProposerReplica") == ["slm_node"]
    assert homes("SelectorReplica") == ["llm_node"]

    # -- both gateways serve, over TLS, with the LLM's selections
    assert len(set(addresses)) == 2
    assert all(address.startswith(stage.ip) for address in addresses)
    for address in addresses:
        assert selected(stage.ask(address, PROMPTS[0]))

    # -- the LLM's node dies: answers go on without it, and say so
    llm_dies_and_comes_back(stage, addresses)

    # -- a proposer's node is added and gets work; nobody else is started again
    a_proposer_is_added(stage, addresses)

    found = status(config)
    assert found.state == "RUNNING" and set(found.addresses) == set(addresses)
    assert found.description["llm_reachable"]
    wait_for("two proposers told", lambda: status(config).description["proposers"] == 2)
    ray.shutdown()
    down(config.data_dir, stage.say)
    assert status(config).state == "DOWN"


def up_when_the_llm_comes(stage: Stage) -> list[str]:
    found: list[list[str]] = []
    began = time.monotonic()
    starting = threading.Thread(target=lambda: found.append(up(stage.settings(), stage.say)))
    starting.start()

    def awaited() -> float | None:
        spoken = (when for when, line in stage.said if "no node has llm_node (1)" in line)
        return next(spoken, None)

    wait_for("a word on the LLM's node", awaited)
    assert any("calibration" in line for _, line in stage.said) is False  # the bundled pair's own
    stage.llm_node = stage.add_node("llm_node")
    starting.join(PATIENCE_S)
    assert found, stage.said
    print(f"up, with the LLM's node added meanwhile: {time.monotonic() - began:.0f} s")
    return found[0]


def selected(answer: Answer) -> bool:
    """Whether the LLM selected at each trigger, and there was one."""
    return answer.usage.triggers > 0 and answer.usage.degraded_steps == 0


def llm_dies_and_comes_back(stage: Stage, addresses: list[str]) -> None:
    stage.cluster.remove_node(stage.llm_node, allow_graceful=False)
    began = time.monotonic()
    fresh = iter(problems.problems("train", 2000))  # so that no cached selection answers

    def ask() -> Answer:
        return stage.ask(addresses[0], next(fresh).prompt)

    answer = wait_for("a degraded answer", lambda: degraded(ask()))
    assert answer.text
    print(f"degraded {time.monotonic() - began:.1f} s after the LLM's node died")
    stage.add_node("llm_node")
    began = time.monotonic()
    wait_for("the LLM's return", lambda: selected(ask()))
    print(f"selected again {time.monotonic() - began:.1f} s after the node was added")
    assert homes("SelectorReplica") == ["llm_node"]


def degraded(answer: Answer) -> Answer | None:
    return answer if answer.usage.degraded_steps else None


def a_proposer_is_added(stage: Stage, addresses: list[str]) -> None:
    before = {role: set(replicas(role)) for role in ("Gateway", "SelectorReplica")}
    stage.add_node("slm_node")
    ray.shutdown()
    again = up(stage.settings(proposer__replicas=2), stage.say)
    ray.init(address=stage.cluster.address, log_to_driver=False, logging_level="ERROR")
    assert homes("ProposerReplica") == ["slm_node", "slm_node"]
    assert {role: set(replicas(role)) for role in before} == before
    assert set(again) == set(addresses)
    processes = [psutil.Process(actor["Pid"]) for actor in replicas("ProposerReplica").values()]
    used = [process.cpu_times().user for process in processes]

    def busy() -> bool:
        threads = [
            threading.Thread(target=stage.ask, args=(addresses[i % 2], prompt))
            for i, prompt in enumerate(PROMPTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        now = [process.cpu_times().user for process in processes]
        return all(new - old > 0.2 for new, old in zip(now, used, strict=True))

    wait_for("work for both proposers", busy)
    assert serve.status().applications[APPLICATION].status == "RUNNING"
