"""Selectors that are killed and frozen under load: no answer fails, and each token is the LLM's or
the SLM's own and says which."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.faults import figures
from tests.faults.checker import Request
from tests.faults.clients import asking
from tests.faults.processes import Part
from tests.faults.stage import Stage, until

pytestmark = pytest.mark.kill
CLIENTS = 8
CONTROL = 1_000_000  # requests of the control group have numbers from here on
RETURN_S = 20.0  # a selector is asked again by then, on however busy a machine


def seconds(requests: list[Request], mode: str, is_degraded: bool | None = None) -> list[float]:
    """Of answers. is_degraded: of those with or without degraded steps only."""
    return [
        r.seconds
        for r in requests
        if r.asked["mode"] == mode and is_degraded in (None, r.is_degraded)
    ]


def steps_s(requests: list[Request], since: float, until_: float) -> list[float]:
    """Seconds that each token of an s2t answer took, of those that came in a span of time."""
    found = []
    for request in requests:
        pieces = request.pieces
        if request.asked["mode"] == "s2t":
            for earlier, piece in zip(pieces, pieces[1:], strict=False):
                if since <= piece["t"] <= until_ and piece["tokens"]:
                    count = len(piece["tokens"])
                    found += [(piece["t"] - earlier["t"]) / count] * count
    return found


def p99_beside(requests: list[Request], since: float, until_: float) -> tuple[float, float]:
    """Of the seconds of a token, in a span of time: of requests, and of the control group's."""
    asked = [r for r in requests if r.number < CONTROL]
    control = [r for r in requests if r.number >= CONTROL]
    of_asked, of_control = (steps_s(group, since, until_) for group in (asked, control))
    return figures.percentile(of_asked, 0.99), figures.percentile(of_control, 0.99)


async def is_asked_again(selector: Part) -> float:
    """Waits until a selector that was started answers for an answer; seconds from its start."""

    def has_scored() -> bool:
        return bool(selector.vitals()["scored"])

    assert await until(has_scored, RETURN_S), "it is not asked again"
    vitals = selector.vitals()
    return float(vitals["first_scored_at"] - vitals["started_at"])


@pytest.mark.parametrize("kills", figures.sizes([3], [100]))
def test_the_only_selector_is_killed(stage: Stage, kills: int) -> None:
    """R1. While it is away the SLM goes on by itself; when it is back it is asked again."""
    drawn = random.Random(1)
    selector = stage.selector()
    proposer = stage.proposer([selector.settings.port])
    returns: list[float] = []

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask()
        stage.look("before", proposer)
        async with asking(lambda: clients.ask("greedy"), CLIENTS):
            await asyncio.sleep(min(10.0, kills / 2))
        async with asking(clients.ask, CLIENTS):
            for _ in range(kills):
                await asyncio.sleep(drawn.uniform(0.0, 0.3))
                stage.fault("SIGKILL selector")
                await asyncio.to_thread(selector.kill)
                await asyncio.sleep(drawn.uniform(0.0, 0.6))
                stage.fault("start selector")
                await asyncio.to_thread(selector.start)
                returns.append(await is_asked_again(selector))
        await stage.calm(proposer, selector)
        await clients.close()

    asyncio.run(main())
    requests = stage.requests
    alone = figures.percentile(seconds(requests, "greedy"), 0.99)
    degraded = seconds(requests, "s2t", is_degraded=True)
    assert degraded and seconds(requests, "s2t", is_degraded=False)
    what = f"selector SIGKILL x{kills}, {CLIENTS} clients, {len(requests)} answers: "
    figures.at_most("R1", f"{what}failed", stage.failed(), 0)
    figures.at_most("R1", f"{what}asked again, longest", max(returns), 2.0, " s")
    ratio = figures.percentile(degraded, 0.99) / alone
    figures.at_most("R1", f"{what}p99 of degraded answers / SLM alone", ratio, 1.5)
    stage.check()


@pytest.mark.parametrize(
    ("which", "frozen_s"),
    figures.sizes([("the only one", 1.0)], [("the only one", 30.0), ("one of two", 30.0)]),
)
def test_a_selector_is_frozen(stage: Stage, which: str, frozen_s: float) -> None:
    """A frozen process keeps its connections and answers nothing: only time tells. The other one
    takes over; without another one the SLM goes on by itself, and waits once, not at each step.

    Beside it, a control group asks a proposer with a selector of its own, so that what the machine
    is late by does not count."""
    frozen = stage.selector()
    others = [stage.selector("other")] if which == "one of two" else []
    proposer = stage.proposer([part.settings.port for part in (frozen, *others)])
    apart = stage.selector("control selector")
    control = stage.proposer([apart.settings.port], name="control")
    span: list[float] = []

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask()
        beside = stage.clients(control, first=CONTROL)
        await beside.ask()
        stage.look("before", proposer, *others)
        async with asking(clients.ask, CLIENTS // 2), asking(beside.ask, CLIENTS // 2):
            await asyncio.sleep(min(3.0, frozen_s))
            span.append(stage.fault("SIGSTOP selector"))
            frozen.freeze()
            await asyncio.sleep(frozen_s)
            span.append(stage.fault("SIGCONT selector"))
            frozen.thaw()
            before = frozen.vitals()["scored"]
            assert await until(lambda: frozen.vitals()["scored"] > before, RETURN_S)
        await stage.calm(proposer, frozen, *others)
        await clients.close()
        await beside.close()

    asyncio.run(main())
    requests = stage.requests
    fault, calm = p99_beside(requests, span[0], span[1])
    what = f"selector SIGSTOP {frozen_s:g} s, {which}: "
    figures.at_most("R1", f"{what}failed", stage.failed(), 0)
    figures.at_most("R1", f"{what}p99 of s2t steps / of the control group", fault / calm, 1.5)
    if others:
        late = [r for r in requests if r.is_degraded]
        figures.report("R1", f"{what}answers with a degraded step", f"{len(late)}", "", None)
    stage.check()
