"""A Redis that is killed, frozen and full: answers neither fail nor wait for it, and what was
acknowledged is in the lake."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from s2t_shared.redis_connection import open_client
from tests.faults import figures
from tests.faults.clients import asking
from tests.faults.stage import RedisPart, Stage
from tests.faults.test_selector import CONTROL, p99_beside

pytestmark = pytest.mark.kill
# The LLM is well here: that a busy machine makes it late is no failure of what is tested.
PATIENT = {"proposer.selection_timeout_s": 10.0}
CLIENTS = 3  # that want their labels durable, as many that do not, as many in the control group


async def killed(redis: RedisPart, stage: Stage, seconds: float) -> None:
    drawn = random.Random(1)
    for _ in range(max(1, round(seconds / 1.5))):
        stage.fault("SIGKILL Redis")
        await asyncio.to_thread(redis.kill)
        await asyncio.sleep(drawn.uniform(0.0, 1.0))
        await asyncio.to_thread(redis.start)
        await asyncio.sleep(drawn.uniform(0.3, 1.0))


async def frozen(redis: RedisPart, stage: Stage, seconds: float) -> None:
    stage.fault("SIGSTOP Redis")
    redis.freeze()
    await asyncio.sleep(seconds)
    redis.thaw()


async def full(redis: RedisPart, stage: Stage, seconds: float) -> None:
    client = open_client(redis.url, 2.0)
    stage.fault("maxmemory of Redis is reached")
    client.config_set("maxmemory", "1mb")
    await asyncio.sleep(seconds)
    client.config_set("maxmemory", "0")
    client.close()


FAULTS: dict[str, Callable[[RedisPart, Stage, float], Awaitable[None]]] = {
    "killed": killed,
    "frozen": frozen,
    "full": full,
}


@pytest.mark.parametrize(
    ("fault", "seconds"),
    figures.sizes([("killed", 1.5)], [("killed", 20.0), ("frozen", 30.0), ("full", 10.0)]),
)
def test_redis_fails_under_load(stage: Stage, fault: str, seconds: float) -> None:
    """R3, R4, R6. Decoding never waits for Redis: neither for a label nor for the cache of
    selections. Beside it, a control group asks a proposer that has no Redis."""
    redis = stage.redis()
    selector = stage.selector()
    proposer = stage.proposer([selector.settings.port], redis_port=redis.port, overrides=PATIENT)
    control = stage.proposer([selector.settings.port], name="control", overrides=PATIENT)
    span: list[float] = []

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask(labels="durable")
        stage.look("before", proposer)
        beside = stage.clients(control, first=CONTROL)
        async with (
            asking(lambda: clients.ask(labels="durable"), CLIENTS),
            asking(lambda: clients.ask(labels="stored"), CLIENTS),
            asking(beside.ask, CLIENTS),
        ):
            span.append(stage.fault("none yet"))
            await asyncio.sleep(min(10.0, seconds))
            span.append(stage.fault(fault))
            await FAULTS[fault](redis, stage, seconds)
            span.append(stage.fault("none any more"))
            await asyncio.sleep(1.0)
        await stage.drain(redis.url, proposer)
        await stage.calm(proposer)
        await clients.close()
        await beside.close()

    asyncio.run(main())
    requests = stage.requests
    what = f"Redis {fault}, {seconds:g} s: "
    figures.at_most("R3", f"{what}failed of {len(requests)}", stage.failed(), 0)
    stored = [r for r in requests if r.asked["labels"] != "durable"]
    added_ms = []
    for begun, ended in zip(span, span[1:], strict=False):
        of_stored, of_control = p99_beside(stored, begun, ended)
        added_ms.append(1000 * (of_stored - of_control))
    added = added_ms[1] - added_ms[0]
    figures.at_most("R3", f"{what}added to the p99 of a token", added, 5.0, " ms")
    durable = sum(r.asked["labels"] == "durable" for r in requests)
    figures.at_most("R4", f"{what}labels lost of {durable} answers", stage.lost_labels(), 0)
    stage.check()
