"""Everything at once for a while: a fault every few seconds under mixed requests; nothing grows.

S2T_SOAK_S=1800 python -m pytest -m faults tests/faults/test_soak.py
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from s2t_shared.redis_connection import open_client
from tests.faults import figures
from tests.faults.clients import Clients, asking
from tests.faults.history import Record
from tests.faults.processes import Part
from tests.faults.proxy import NO_FAULT, Fault, FaultProxy
from tests.faults.stage import RedisPart, Stage

pytestmark = [pytest.mark.kill, pytest.mark.faults]
SOAK_S = float(os.environ.get("S2T_SOAK_S", "60"))
EVERY_S = 10.0 if SOAK_S > 300 else 4.0  # from fault to fault
FAULT_S = 2.0
LOOK_S = 2.0
WARM_UP = 0.25  # of the time: pools and caches fill
CLIENTS = 5
NO_LLM = "SELECTOR_UNAVAILABLE"
PROXY_FAULTS = (
    Fault(latency_s=0.1, jitter_s=0.1),
    Fault(bytes_per_s=10_000),
    Fault(is_black_hole=True),
    Fault(slice_bytes=11),
)


@dataclass
class Scene:
    """What faults are done to. links: to the second selector, and to Redis."""

    stage: Stage
    selectors: list[Part]
    redis: RedisPart
    links: list[FaultProxy]
    drawn: random.Random

    async def kill_selector(self) -> None:
        part = self.drawn.choice(self.selectors)
        await asyncio.to_thread(part.kill)
        await asyncio.sleep(self.drawn.uniform(0.0, FAULT_S))
        await asyncio.to_thread(part.start)

    async def freeze_selector(self) -> None:
        part = self.drawn.choice(self.selectors)
        part.freeze()
        await asyncio.sleep(FAULT_S)
        part.thaw()

    async def kill_redis(self) -> None:
        await asyncio.to_thread(self.redis.kill)
        await asyncio.sleep(self.drawn.uniform(0.0, FAULT_S))
        await asyncio.to_thread(self.redis.start)

    async def freeze_redis(self) -> None:
        self.redis.freeze()
        await asyncio.sleep(FAULT_S)
        self.redis.thaw()

    async def fill_redis(self) -> None:
        client = open_client(self.redis.url, 2.0)
        client.config_set("maxmemory", "1mb")
        await asyncio.sleep(FAULT_S)
        client.config_set("maxmemory", "0")
        client.close()

    async def disturb_link(self) -> None:
        link = self.drawn.choice(self.links)
        link.fault = self.drawn.choice(PROXY_FAULTS)
        await asyncio.sleep(FAULT_S)
        link.fault = NO_FAULT
        await asyncio.to_thread(link.reset)

    async def one(self) -> None:
        """Any fault, from its begin to its end."""
        faults: list[Callable[[], Awaitable[None]]] = [
            self.kill_selector,
            self.freeze_selector,
            self.kill_redis,
            self.freeze_redis,
            self.fill_redis,
            self.disturb_link,
        ]
        fault = self.drawn.choice(faults)
        self.stage.fault(fault.__name__)
        await fault()


@pytest.fixture
def scene(stage: Stage) -> Iterator[Scene]:
    redis = stage.redis()
    selectors = [stage.selector(), stage.selector("other")]
    links = [FaultProxy(selectors[1].settings.port), FaultProxy(redis.port)]
    yield Scene(stage, selectors, redis, links, random.Random(5))
    for link in links:
        link.close()


async def some_request(clients: Clients, drawn: random.Random) -> None:
    """As users are: some leave, some do not wait, some want their labels."""
    kind = drawn.randrange(8)
    if kind == 0:
        await clients.ask(max_new_tokens=2000, leaves_after=drawn.randint(1, 20))
    elif kind == 1:
        await clients.ask(max_new_tokens=2000, timeout_s=drawn.uniform(0.1, 0.5))
    elif kind == 2:
        await clients.ask("greedy", max_new_tokens=drawn.randint(1, 200))
    else:
        await clients.ask(labels="durable" if kind < 6 else "stored")


def slope_per_minute(looks: list[Record], name: str) -> float:
    """Of the line that fits best, behind the warm-up."""
    begun = looks[0]["t"]
    points = [((r["t"] - begun) / 60, r[name]) for r in looks if r["t"] > begun + WARM_UP * SOAK_S]
    n = len(points)
    mean_t, mean_v = sum(t for t, _ in points) / n, sum(v for _, v in points) / n
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    return sum((t - mean_t) * (v - mean_v) for t, v in points) / spread


def test_nothing_grows(scene: Scene) -> None:
    """R16. Memory, descriptors, threads and tasks of the proposer and its gateway stay."""
    stage = scene.stage
    ports = [scene.selectors[0].settings.port, scene.links[0].port]
    proposer = stage.proposer(ports, redis_port=scene.links[1].port)

    async def look_again_and_again() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(stage.look, "during", proposer)

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask(labels="durable")
        stage.look("before", proposer)
        looking = asyncio.create_task(look_again_and_again())
        give_up_at = time.monotonic() + SOAK_S
        async with asking(lambda: some_request(clients, scene.drawn), CLIENTS, pause_s=0.05):
            while time.monotonic() < give_up_at:
                fault = asyncio.create_task(scene.one())
                await asyncio.sleep(EVERY_S)
                await fault
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await stage.drain(scene.redis.url, proposer)
        await stage.calm(proposer, *scene.selectors)
        await clients.close()

    asyncio.run(main())
    # An answer that wants its labels durable ends so where no LLM answered.
    unlabelled = [r for r in stage.requests if r.error and r.error["reason"] == NO_LLM]
    assert all(r.asked["labels"] == "durable" for r in unlabelled)
    allowed = {"DEADLINE_EXCEEDED", NO_LLM}
    looks = [r for r in stage.records if r["kind"] == "vitals" and r["when"] == "during"]
    what = f"soak {SOAK_S:g} s, a fault every {EVERY_S:g} s: "
    figures.at_most("R16", f"{what}failed of {len(stage.requests)}", stage.failed(allowed), 0)
    refused = f"{len(unlabelled)}"
    figures.report("R16", f"{what}labels refused, for want of an LLM", refused, "", None)
    figures.at_most("R16", f"{what}labels lost", stage.lost_labels(), 0)
    slope = slope_per_minute(looks, "rss_mb")
    figures.at_most("R16", f"{what}memory", slope, 1.0, " MB/min")
    for name, limit in (("fds", 1.0), ("tasks", 1.0), ("threads", 1.0)):
        figures.at_most("R16", f"{what}{name}", slope_per_minute(looks, name), limit, "/min")
    stage.check(allowed)
