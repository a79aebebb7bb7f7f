"""Tier 2: the whole service on one local Ray cluster, with TLS: two proposers, two selectors.
Replicas are killed and versions swapped while answers stream.

The tests run in this order on one service.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from ray import serve

from s2t_shared.bundled import problems
from s2t_shared.config import load_config
from services.bench.swap import SIDES, publish_untrained
from services.client import Client
from services.launch.local import RunningService, running_service
from tests.faults import figures
from tests.faults.checker import Request
from tests.faults.clients import Clients, asking
from tests.faults.history import History
from tests.faults.stage import Stage, until
from tests.helpers.certificates import Authority, secured, settings_of

pytestmark = [pytest.mark.service, pytest.mark.kill, pytest.mark.faults]
PROBLEMS = problems.problems("test", 12)
CLIENTS = 4
BACK_S = 90.0  # a replica is there again by then


@dataclass
class Cluster:
    service: RunningService
    authority: Path

    def clients(self, history: History) -> Clients:
        credentials = grpc.ssl_channel_credentials(self.authority.read_bytes())
        return Clients(history, [self.service.address], credentials=credentials)

    def open(self) -> Client:
        return Client(self.service.address, authority=self.authority, timeout_s=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    security = secured(Authority(folder))
    overrides = {
        "data_dir": str(folder / "data"),
        "gateway.port": 0,
        "proposer.replicas": 2,
        "proposer.num_cpus": 0.3,
        "selector.replicas": 2,
        "selector.num_cpus": 0.3,
        "proposer.selection_timeout_s": 2.0,
        "calibration.count": 32,
        **settings_of(security),
    }
    with running_service(load_config(overrides=overrides, environment={})) as service:
        assert security.authority is not None
        yield Cluster(service, security.authority)


def pids(name: str) -> list[int]:
    """Of the replicas of a class, as Ray names their processes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        if title.startswith("ray::") and name in title:
            found.append(process.pid)
    return found


def kill_one(name: str, drawn: random.Random) -> None:
    os.kill(drawn.choice(pids(name)), signal.SIGKILL)


def are_running(deployment: str, count: int) -> bool:
    application = next(iter(serve.status().applications.values()))
    states = application.deployments[deployment].replica_states
    return states.get("RUNNING", 0) >= count and sum(states.values()) == count


async def undisturbed(clients: Clients, stage: Stage) -> None:
    """What each mode says to each problem when nothing happens: what it must say under faults."""
    for mode in ("greedy", "s2t"):
        for problem in PROBLEMS:
            await clients.ask(mode, prompt=problem.prompt, is_scripted=False)
    for request in stage.requests:
        answer = request.answer
        assert answer is not None and not answer["degraded"]
        stage.history.write(
            "replay",
            mode=request.asked["mode"],
            prompt=request.asked["prompt"],
            version=answer["version"],
            token_ids=answer["token_ids"],
        )


def seconds(requests: list[Request]) -> float:
    return figures.percentile([r.seconds for r in requests if r.asked["mode"] == "s2t"], 0.99)


@pytest.mark.parametrize(("role", "kills"), [("Selector", 10), ("Proposer", 5)])
def test_replicas_are_killed(cluster: Cluster, stage: Stage, role: str, kills: int) -> None:
    """R1, R2: no answer fails, and each has the tokens that it has when nothing happens, or says
    where it did without the LLM."""
    drawn = random.Random(6)

    async def main() -> None:
        clients = cluster.clients(stage.history)
        await undisturbed(clients, stage)

        async def ask() -> None:
            problem = drawn.choice(PROBLEMS)
            mode = drawn.choice(("greedy", "s2t"))
            await clients.ask(mode, prompt=problem.prompt, is_scripted=False)

        async with asking(ask, CLIENTS):
            for _ in range(kills):
                await asyncio.sleep(drawn.uniform(1.0, 2.0))
                assert await until(lambda: are_running(f"{role}Replica", 2), BACK_S, pause_s=0.2)
                stage.fault(f"SIGKILL {role}")
                await asyncio.to_thread(kill_one, f"{role}Replica", drawn)
            assert await until(lambda: are_running(f"{role}Replica", 2), BACK_S, pause_s=0.2)
        await clients.close()

    asyncio.run(main())
    answers = len(stage.requests)
    goal = "R1" if role == "Selector" else "R2"
    what = f"Ray, 2 and 2 replicas, TLS: {role.lower()} SIGKILL x{kills}: "
    figures.at_most(goal, f"{what}failed of {answers}", stage.failed(), 0)
    figures.at_most(goal, f"{what}answers with other tokens", stage.mixed(), 0)
    degraded = sum(r.is_degraded for r in stage.requests)
    figures.report(goal, f"{what}answers with degraded steps", f"{degraded}", "", None)
    stage.check()


def test_a_version_is_seen_everywhere(cluster: Cluster, stage: Stage) -> None:
    """R8. Both proposers serve it, as their answers say."""
    versions = publish_untrained(cluster.service.config, SIDES)
    seen_s: list[float] = []

    async def main() -> None:
        clients = cluster.clients(stage.history)

        async def ask() -> None:
            await clients.ask("s2t_local", prompt=PROBLEMS[0].prompt, budget=0.2, is_scripted=False)

        with cluster.open() as operator:
            operator.promote(versions[0])
            assert await until(lambda: is_live(operator, versions[0]), 30.0)
            async with asking(ask, CLIENTS):
                for i in range(4):
                    begun = time.monotonic()
                    await asyncio.to_thread(operator.promote, versions[(i + 1) % 2])
                    stage.fault("promote")
                    assert await until(lambda: is_live(operator, versions[(i + 1) % 2]), 30.0)  # noqa: B023
                    seen_s.append(time.monotonic() - begun)
        await clients.close()

    asyncio.run(main())
    what = f"Ray, 2 proposers: hot swap x4, {len(stage.requests)} answers: "
    figures.at_most("R8", f"{what}failed", stage.failed(), 0)
    figures.at_most("R8", f"{what}seen by all, longest", max(seen_s), 5.0, " s")
    stage.check()


def is_live(operator: Client, version: str) -> bool:
    """Whether a dozen descriptions say so: Serve gives them to the proposers in turns."""
    return all(operator.describe().live_version == version for _ in range(12))
