"""Proposers and gateways that end under load, at once or in order: no stream fails, and its client
sees one answer."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.faults import figures
from tests.faults.clients import asking
from tests.faults.stage import Stage

pytestmark = pytest.mark.kill
CLIENTS = 8
MODES = ("greedy", "s2t", "sample")
TOKENS = 120


@pytest.mark.parametrize("kills", figures.sizes([2], [20]))
def test_one_of_two_proposers_is_killed(stage: Stage, kills: int) -> None:
    """R2. The other one goes on behind the last token that the client has."""
    drawn = random.Random(3)
    selector = stage.selector()
    replicas = [stage.replica(f"proposer{i}", [selector.settings.port]) for i in range(2)]
    gateway = stage.gateway(replicas)

    async def main() -> None:
        clients = stage.clients(gateway)
        await clients.ask()
        stage.look("before", gateway)

        async def ask() -> None:
            await clients.ask(drawn.choice(MODES), max_new_tokens=TOKENS)

        async with asking(ask, CLIENTS):
            for i in range(kills):
                await asyncio.sleep(drawn.uniform(0.2, 0.6))
                stage.fault(f"SIGKILL {replicas[i % 2].name}")
                await asyncio.to_thread(replicas[i % 2].kill)
                await asyncio.sleep(drawn.uniform(0.0, 0.2))
                await asyncio.to_thread(replicas[i % 2].start)
        await stage.calm(gateway, *replicas)
        await clients.close()

    asyncio.run(main())
    what = f"proposer SIGKILL x{kills}, one of two, {CLIENTS} streams of {TOKENS} tokens: "
    figures.at_most("R2", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    figures.at_most("R2", f"{what}tokens lost or doubled", stage.wrong_tokens(), 0)
    stage.check()


@pytest.mark.parametrize(("rounds", "ending"), figures.sizes([(1, 1)], [(5, 2)]))
def test_every_part_is_restarted_in_its_turn(stage: Stage, rounds: int, ending: int) -> None:
    """R13. As an update does it: one part after the other is told to end, ends, and is there again;
    the short form ends one of each kind.
    No stream fails, whoever it was that answered it."""
    selectors = [stage.selector(f"selector{i}") for i in range(2)]
    ports = [part.settings.port for part in selectors]
    replicas = [stage.replica(f"proposer{i}", ports) for i in range(2)]
    gateways = [stage.gateway(replicas, f"gateway{i}") for i in range(2)]
    parts = [*selectors, *replicas, *gateways]
    ended = [*selectors[:ending], *replicas[:ending], *gateways[:ending]]
    codes: list[int | None] = []

    async def main() -> None:
        clients = stage.clients(*gateways)
        await clients.ask()

        async with asking(lambda: clients.ask(max_new_tokens=TOKENS), CLIENTS // 2):
            for part in ended * rounds:
                await asyncio.sleep(0.3)
                stage.fault(f"SIGTERM {part.name}")
                part.terminate()
                codes.append(await asyncio.to_thread(part.wait))
                await asyncio.to_thread(part.start)
                await asyncio.sleep(1.2)  # until it is connected to again, a second at most
        await stage.calm(*parts)
        await clients.close()

    asyncio.run(main())
    what = f"rolling restart of selectors, proposers, gateways, x{rounds}, {CLIENTS // 2} streams: "
    figures.at_most("R13", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    figures.at_most("R13", f"{what}tokens lost or doubled", stage.wrong_tokens(), 0)
    degraded = sum(request.is_degraded for request in stage.requests)
    figures.report("R13", f"{what}answers with a degraded step", f"{degraded}", "", None)
    assert codes == [0] * len(codes)
    stage.check()


@pytest.mark.parametrize("ends", figures.sizes([1], [20]))
def test_one_of_two_gateways_is_terminated(stage: Stage, ends: int) -> None:
    """R13. SIGTERM: streams under way are finished, new ones go to the other gateway."""
    drawn = random.Random(4)
    gateways = [stage.proposer(name=f"gateway{i}") for i in range(2)]
    codes: list[int | None] = []

    async def main() -> None:
        clients = stage.clients(*gateways)
        await clients.ask("greedy")

        async with asking(lambda: clients.ask("greedy", max_new_tokens=TOKENS), CLIENTS):
            for i in range(ends):
                await asyncio.sleep(drawn.uniform(0.3, 0.6))
                ending = gateways[i % 2]
                stage.fault(f"SIGTERM {ending.name}")
                ending.terminate()
                codes.append(await asyncio.to_thread(ending.wait))
                await asyncio.to_thread(ending.start)
                await asyncio.sleep(1.2)  # clients connect again after a second at most
        await stage.calm(*gateways)
        await clients.close()

    asyncio.run(main())
    what = f"gateway and proposer SIGTERM x{ends}, one of two, {CLIENTS} streams: "
    figures.at_most("R13", f"{what}failed of {len(stage.requests)}", stage.failed(), 0)
    dropped = f"{sum(r['kind'] == 'dropped' for r in stage.records)}"
    figures.report("R13", f"{what}dropped on arrival, and sent again", dropped, "", None)
    assert codes == [0] * ends
    stage.check()
