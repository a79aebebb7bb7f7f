"""More load than can be answered, and clients that hold connections or read slowly: what can be
answered is, in time, and the others are told at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import grpc.aio
import pytest

from tests.faults import figures
from tests.faults.checker import Request
from tests.faults.clients import Clients, asking
from tests.faults.script import WORDS
from tests.faults.stage import Stage, address_of
from tests.helpers.open_load import arrivals

pytestmark = pytest.mark.kill
SLOTS, STEP_S = 4, 0.025
LENGTHS = (10, 30)  # tokens of an answer, evenly spread; its request allows MAX_NEW_TOKENS
MAX_NEW_TOKENS = 50
OTHERS = 1_000_000  # requests of others have numbers from here on
CAPACITY = SLOTS / (sum(LENGTHS) / 2 * STEP_S)  # requests per second, were there no overhead


async def offer(clients: Clients, times: float, seconds: float, deadline_s: float) -> float:
    """So many times the capacity for so long; returns how long it took until all had ended."""
    drawn = random.Random(2)
    begun = time.monotonic()
    calls = []
    for at in arrivals(times * CAPACITY, seconds):
        await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
        calls.append(
            asyncio.create_task(
                clients.ask(
                    "greedy",
                    stop=[WORDS[drawn.randint(*LENGTHS)]],
                    max_new_tokens=MAX_NEW_TOKENS,
                    timeout_s=deadline_s,
                )
            )
        )
    await asyncio.gather(*calls)
    return time.monotonic() - begun


def of(requests: list[Request], begun: float, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of those that were answered, and of those that were refused."""
    found = [r for r in requests if begun <= r.asked["t"] < begun + seconds]
    answered = [r.seconds for r in found if r.answer]
    refused = [r.seconds for r in found if r.error and r.error["reason"] == "OVERLOADED"]
    return answered, refused


@pytest.mark.parametrize(("seconds", "deadline_s"), figures.sizes([], [(60.0, 10.0)]))
def test_five_times_the_capacity(stage: Stage, seconds: float, deadline_s: float) -> None:
    """R10. Goodput stays, and a refusal is no work."""
    overrides = {
        "proposer.max_num_seqs": SLOTS,
        "proposer.max_queue_s": 0.0,
        "gateway.max_requests_per_client": 0,
    }
    proposer = stage.proposer(step_s=STEP_S, overrides=overrides)
    took: dict[float, tuple[float, float]] = {}
    lags_s: list[float] = []

    async def watch() -> None:
        """How late the machine itself is: this process waits for nobody."""
        while True:
            begun = time.monotonic()
            await asyncio.sleep(0.01)
            lags_s.append(time.monotonic() - begun - 0.01)

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask("greedy")
        stage.look("before", proposer)
        watching = asyncio.create_task(watch())
        for times in (1.0, 5.0):
            begun = time.monotonic()
            took[times] = begun, await offer(clients, times, seconds, deadline_s)
        watching.cancel()
        await stage.calm(proposer)
        await clients.close()

    asyncio.run(main())
    answered, _ = of(stage.requests, *took[1.0])
    answered_5x, refused = of(stage.requests, *took[5.0])
    peak, goodput = len(answered) / took[1.0][1], len(answered_5x) / took[5.0][1]
    what = f"load 5x for {seconds:g} s, deadlines {deadline_s:g} s: "
    figures.at_least("R10", f"{what}goodput / peak", goodput / peak, 0.9)
    p99 = [figures.percentile(found, 0.99) for found in (answered, answered_5x)]
    figures.at_most("R10", f"{what}p99 of accepted / at capacity", p99[1] / p99[0], 2.0)
    late_ms = 1000 * figures.percentile(refused, 0.99)
    figures.at_most("R10", f"{what}p99 of {len(refused)} refusals", late_ms, 100, " ms")
    in_time = sum(s <= 0.1 for s in refused) / len(refused)
    figures.report("R10", f"{what}refusals within 100 ms", f"{in_time:.1%}", "", None)
    lag = f"{1000 * figures.percentile(lags_s, 0.99):.0f} ms"
    figures.report("R10", f"{what}how late the machine itself was, p99", lag, "", None)
    allowed = {"OVERLOADED", "DEADLINE_EXCEEDED"}
    expired = len([r for r in stage.requests if r.error and r.error["reason"] != "OVERLOADED"])
    figures.report("R10", f"{what}accepted and expired", f"{expired}", "", None)
    assert refused, "nothing was refused at five times the capacity"
    stage.check(allowed)


@pytest.mark.parametrize(
    ("idle", "slow", "seconds"), figures.sizes([(40, 8, 1.0)], [(500, 50, 30.0)])
)
def test_idle_and_slow_reading_clients(stage: Stage, idle: int, slow: int, seconds: float) -> None:
    """S12. Who holds a connection, or does not read what he asked for, holds up no other."""
    overrides = {"gateway.max_requests_per_client": 0, "proposer.max_num_seqs": 64}
    proposer = stage.proposer(step_s=0.01, overrides=overrides)
    spans: list[tuple[float, float]] = []

    async def main() -> None:
        others = stage.clients(proposer, first=OTHERS)
        clients = stage.clients(proposer)
        await others.ask("greedy")
        stage.look("before", proposer)
        await measure(others)
        channels = [idle_channel(address_of(proposer)) for _ in range(idle)]
        for channel in channels:
            await channel.channel_ready()
        reading = [asyncio.create_task(read(clients)) for _ in range(slow)]
        await measure(others)
        await asyncio.gather(*reading)
        for channel in channels:
            await channel.close()
        await stage.calm(proposer)
        await clients.close()
        await others.close()

    async def read(clients: Clients) -> None:
        """A piece each second, until the measurement is over."""
        pieces = round(seconds) + 1
        await clients.ask("greedy", max_new_tokens=4000, pause_s=1.0, leaves_after=pieces)

    async def measure(others: Clients) -> None:
        begun = time.monotonic()
        async with asking(lambda: others.ask("greedy"), 4):
            await asyncio.sleep(seconds)
        spans.append((begun, time.monotonic()))

    asyncio.run(main())
    p99 = [figures.percentile(list(short_answers(stage.requests, *span)), 0.99) for span in spans]
    what = f"{idle} idle and {slow} slow-reading clients, {seconds:g} s: "
    figures.at_most("S12", f"{what}p99 of others / without", p99[1] / p99[0], 1.5)
    figures.at_most("S12", f"{what}failed", stage.failed(), 0)
    stage.check()


def idle_channel(address: str) -> grpc.aio.Channel:
    """With a connection of its own."""
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def short_answers(requests: list[Request], begun: float, ended: float) -> Iterator[float]:
    """Seconds of the answers that others asked for meanwhile."""
    for request in requests:
        if begun <= request.asked["t"] < ended and request.number >= OTHERS:
            yield request.seconds
