"""Tier 2: the whole service on one local Ray cluster, with TLS: two proposers, two selectors.
Replicas are killed and versions swapped while answers stream.

The tests run in this order on one service.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import RayError

from s2t_shared.bundled import problems
from s2t_shared.config import load_config
from s2t_shared.errors import S2TError
from services.bench.swap import SIDES, publish_untrained
from services.client import Client
from services.launch.local import RunningService, running_service
from services.launch.redis_server import free_port
from tests.faults import figures
from tests.faults.checker import Request
from tests.faults.clients import Clients, asking
from tests.faults.history import History
from tests.faults.processes import HOST
from tests.faults.stage import RedisPart, Stage, until
from tests.helpers.certificates import Authority, secured, settings_of

pytestmark = [pytest.mark.service, pytest.mark.kill, pytest.mark.faults]
PROBLEMS = problems.problems("test", 12)
CLIENTS = 4
CONTROLLERS = 5
DASHBOARD = 8265
GCS_AWAY_S = 10.0
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
    state = RedisPart(folder / "state", ()).start()
    security = secured(Authority(folder))
    overrides = {
        "data_dir": str(folder / "data"),
        "gateway.port": free_port(),  # the same when it is started again
        "proposer.replicas": 2,
        "proposer.num_cpus": 0.3,
        "selector.replicas": 2,
        "selector.num_cpus": 0.3,
        "proposer.selection_timeout_s": 2.0,
        "calibration.count": 32,
        **settings_of(security),
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as ends:
        ends.callback(state.stop)
        patch.setenv("RAY_REDIS_ADDRESS", f"{HOST}:{state.port}")  # as KubeRay's option does
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


async def ask_s2t(clients: Clients) -> None:
    await clients.ask("s2t", prompt=PROBLEMS[0].prompt, is_scripted=False)


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


def test_what_is_not_ours_is_killed(cluster: Cluster, stage: Stage) -> None:
    """R14. Answers do not go through Serve's controller; and a gateway that dies, the only one
    here, is there again."""

    async def main() -> float:
        clients = cluster.clients(stage.history)
        await undisturbed(clients, stage)

        async with asking(partial(ask_s2t, clients), CLIENTS):
            for _ in range(CONTROLLERS):
                before = pids("ServeController")
                stage.fault("SIGKILL controller")
                os.kill(before[0], signal.SIGKILL)
                assert await until(lambda: has_another("ServeController", before), BACK_S)  # noqa: B023
                await asyncio.sleep(2.0)
        await clients.close()
        assert await until(lambda: is_told_running("Gateway", 1), BACK_S, pause_s=0.2)
        before = pids("Gateway")
        os.kill(before[0], signal.SIGKILL)
        begun = time.monotonic()
        assert await until(lambda: answers(cluster), BACK_S, pause_s=0.1)
        return time.monotonic() - begun

    back_s = asyncio.run(main())
    count = len(stage.requests)
    what = f"Ray: controller SIGKILL x{CONTROLLERS}: failed of {count}"
    figures.at_most("R14", what, stage.failed(), 0)
    figures.at_most("R14", "Ray: the only gateway SIGKILL: answers again", back_s, 10.0, " s")
    stage.check()


def test_the_state_of_ray_dies(cluster: Cluster, stage: Stage) -> None:
    """R14. The GCS is killed, and started again on its state in Redis: answers go on meanwhile, and
    a replica that dies afterwards is replaced."""
    node = ray._private.worker._global_node
    assert node is not None

    async def main() -> float:
        clients = cluster.clients(stage.history)
        await undisturbed(clients, stage)

        async with asking(partial(ask_s2t, clients), CLIENTS):
            stage.fault("SIGKILL GCS")
            await asyncio.to_thread(node.kill_gcs_server)
            await asyncio.sleep(GCS_AWAY_S)
            node.start_gcs_server()  # in this thread: Linux ends it with the one that started it
            begun = time.monotonic()
            assert await until(lambda: is_told_running("ProposerReplica", 2), BACK_S, pause_s=0.2)
            back_s = time.monotonic() - begun
            await asyncio.sleep(2.0)
            before = pids("ProposerReplica")
            os.kill(before[0], signal.SIGKILL)
            assert await until(lambda: has_another("ProposerReplica", before), BACK_S)
            assert await until(lambda: is_told_running("ProposerReplica", 2), BACK_S, pause_s=0.2)
        await clients.close()
        return back_s

    back_s = asyncio.run(main())
    what = f"Ray: GCS SIGKILL, away for {GCS_AWAY_S:g} s: "
    figures.at_most("R14", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    figures.report("R14", f"{what}Serve answers operators again", f"{back_s:.1f} s", "", None)
    stage.check()


def has_another(name: str, before: list[int]) -> bool:
    return bool(set(pids(name)) - set(before))


def is_told_running(deployment: str, count: int) -> bool:
    """As `are_running`, also by a controller that has just come back."""
    try:
        return are_running(deployment, count)
    except (RayError, KeyError, StopIteration):
        return False


def answers(cluster: Cluster) -> bool:
    try:
        with cluster.open() as client:
            client.describe()
    except S2TError:
        return False
    return True


JOIN = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("joined")
"""


@pytest.mark.parametrize("with_token", [True, False])
def test_ray_takes_no_job_without_its_token(
    cluster: Cluster, tmp_path: Path, with_token: bool
) -> None:
    """S9. Whoever reaches Ray's ports runs what he likes, on every node; and nothing of it listens
    for browsers."""
    address = ray.get_runtime_context().gcs_address
    environment = dict(os.environ)
    if not with_token:
        for name in [name for name in environment if name.startswith("RAY_AUTH")]:
            del environment[name]
        environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    else:
        environment |= {"RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-c", JOIN, address]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=90, check=False
        )
        has_joined = "joined" in done.stdout
    except subprocess.TimeoutExpired:
        has_joined = False
    assert has_joined is with_token
    if not with_token:
        figures.at_most("S9", "Ray: drivers without a token that were let in", has_joined, 0)
        assert not pids("DashboardHead") and not listens("127.0.0.1", DASHBOARD)


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


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
