"""Networks that are slow, narrow, torn and silent, between a proposer and its selector, and between
it and Redis: nothing waits past its deadline, nothing fails, no acknowledged label is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest

from tests.faults import figures
from tests.faults.clients import asking
from tests.faults.proxy import NO_FAULT, Fault, FaultProxy
from tests.faults.stage import Stage, until
from tests.faults.test_redis import PATIENT
from tests.helpers.certificates import Authority, secured, settings_of

pytestmark = pytest.mark.kill
CLIENTS = 6
RESETS_S = 0.5  # between two resets
RETURN_S = 20.0
FAULTS = {
    "500 ms": Fault(latency_s=0.25, jitter_s=0.05),  # there and back
    "10 kB/s": Fault(bytes_per_s=10_000),
    "reset": NO_FAULT,  # again and again
    "black hole": Fault(is_black_hole=True),
    "slices of 7 bytes": Fault(slice_bytes=7),
}


@pytest.fixture
def proxies() -> Iterator[list[FaultProxy]]:
    opened: list[FaultProxy] = []
    yield opened
    for proxy in opened:
        proxy.close()


async def disturb(
    stage: Stage, proxy: FaultProxy, name: str, seconds: float
) -> tuple[float, float]:
    """Returns from when to when."""
    begun = stage.fault(name)
    proxy.fault = FAULTS[name]
    while time.monotonic() < begun + seconds:
        if name == "reset":
            await asyncio.to_thread(proxy.reset)
        await asyncio.sleep(min(RESETS_S, seconds))
    proxy.fault = NO_FAULT
    return begun, stage.fault("none")


@pytest.mark.parametrize(("fault", "seconds"), figures.sizes([], [(name, 30.0) for name in FAULTS]))
def test_the_way_to_the_only_selector(
    stage: Stage, proxies: list[FaultProxy], fault: str, seconds: float
) -> None:
    """R12. An answer goes on without the LLM as soon as it is clear that no reply comes."""
    selector = stage.selector()
    proxy = FaultProxy(selector.settings.port)
    proxies.append(proxy)
    proposer = stage.proposer([proxy.port])

    async def main() -> tuple[float, float]:
        clients = stage.clients(proposer)
        await clients.ask()
        stage.look("before", proposer)
        async with asking(clients.ask, CLIENTS):
            await asyncio.sleep(min(3.0, seconds))
            span = await disturb(stage, proxy, fault, seconds)
            scored = selector.vitals()["scored"]
            assert await until(lambda: selector.vitals()["scored"] > scored, RETURN_S)
        await stage.calm(proposer)
        await clients.close()
        return span

    begun, ended = asyncio.run(main())
    during = [r for r in stage.requests if r.overlaps(begun, ended)]
    what = f"selector link, {fault} for {seconds:g} s: "
    degraded = [r for r in during if r.is_degraded]
    figures.at_most("R12", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    figures.at_most("R12", f"{what}longest answer", max(r.seconds for r in during), 15.0, " s")
    share = f"{len(degraded)} of {len(during)}"
    figures.report("R12", f"{what}answers with degraded steps", share, "", None)
    stage.check()


@pytest.mark.parametrize(("fault", "seconds"), figures.sizes([], [(name, 15.0) for name in FAULTS]))
def test_the_way_to_redis(
    stage: Stage, proxies: list[FaultProxy], fault: str, seconds: float
) -> None:
    """R12. Labels wait in the spool; answers that want them durable wait for the spool."""
    redis = stage.redis()
    proxy = FaultProxy(redis.port)
    proxies.append(proxy)
    selector = stage.selector()
    proposer = stage.proposer([selector.settings.port], redis_port=proxy.port, overrides=PATIENT)

    async def main() -> tuple[float, float]:
        clients = stage.clients(proposer)
        await clients.ask(labels="durable")
        stage.look("before", proposer)
        async with asking(lambda: clients.ask(labels="durable"), CLIENTS):
            await asyncio.sleep(min(3.0, seconds))
            span = await disturb(stage, proxy, fault, seconds)
            await asyncio.sleep(min(3.0, seconds))
        await stage.drain(redis.url, proposer)
        await stage.calm(proposer)
        await clients.close()
        return span

    begun, ended = asyncio.run(main())
    during = [r for r in stage.requests if r.overlaps(begun, ended)]
    what = f"Redis link, {fault} for {seconds:g} s, durable labels: "
    figures.at_most("R12", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    figures.at_most("R12", f"{what}longest answer", max(r.seconds for r in during), 15.0, " s")
    figures.at_most("R12", f"{what}acknowledged labels lost", stage.lost_labels(), 0)
    stage.check()


@pytest.mark.parametrize("seconds", figures.sizes([], [15.0]))
def test_bytes_are_changed_on_the_way_to_the_only_selector(
    stage: Stage, proxies: list[FaultProxy], seconds: float
) -> None:
    """R12. With TLS a changed byte ends the connection: never does another token come of it."""
    security = secured(Authority(stage.folder))
    assert security.authority is not None
    selector = stage.selector(security=security)
    proxy = FaultProxy(selector.settings.port)
    proxies.append(proxy)
    proposer = stage.proposer([proxy.port], overrides=settings_of(security))
    credentials = grpc.ssl_channel_credentials(security.authority.read_bytes())

    async def main() -> None:
        clients = stage.clients(proposer, credentials=credentials)
        await clients.ask()
        stage.look("before", proposer)
        async with asking(clients.ask, CLIENTS):
            stage.fault("flips")
            proxy.fault = Fault(flip_share=0.05)
            await asyncio.sleep(seconds)
            proxy.fault = NO_FAULT
            scored = selector.vitals()["scored"]
            assert await until(lambda: selector.vitals()["scored"] > scored, RETURN_S)
        await stage.calm(proposer)
        await clients.close()

    asyncio.run(main())
    what = f"selector link with TLS, bytes changed for {seconds:g} s: "
    figures.at_most("R12", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    figures.at_most("R12", f"{what}wrong tokens", stage.wrong_tokens(), 0)
    degraded = f"{sum(r.is_degraded for r in stage.requests)}"
    figures.report("R12", f"{what}answers with degraded steps", degraded, "", None)
    stage.check()
