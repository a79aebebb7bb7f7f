"""Answers that end early: whoever leaves or whose deadline passes holds nothing a moment later."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults import figures
from tests.faults.clients import Clients
from tests.faults.processes import Part
from tests.faults.stage import Stage, until

pytestmark = pytest.mark.kill
BATCH = 20  # sequences at once, all of them
FREE_S = 20.0  # on however busy a machine


async def leave(clients: Clients) -> None:
    """All leave in the middle of their answers, in various ways asked."""
    await asyncio.gather(
        *(
            clients.ask("s2t" if i % 2 else "greedy", max_new_tokens=4000, leaves_after=2 + i % 3)
            for i in range(BATCH)
        )
    )


async def expire(clients: Clients) -> None:
    """The deadline of all passes in the middle of their answers."""
    await asyncio.gather(
        *(
            clients.ask("s2t" if i % 2 else "greedy", max_new_tokens=4000, timeout_s=0.4)
            for i in range(BATCH)
        )
    )


async def seconds_until_free(part: Part, *others: Part) -> float:
    """From now."""
    begun = time.monotonic()

    def is_free() -> bool:
        held = [p.vitals() for p in (part, *others)]
        return not any(v.get(n) for v in held for n in ("kv_slots", "running", "waiting", "open"))

    assert await until(is_free, FREE_S, pause_s=0.002), "still held"
    return time.monotonic() - begun


WAYS = {"cancelled": leave, "expired": expire}


@pytest.mark.parametrize(
    ("ended", "rounds"),
    figures.sizes([("cancelled", 2)], [(name, 1000 // BATCH) for name in WAYS]),
)
def test_answers_that_end_early_hold_nothing(stage: Stage, ended: str, rounds: int) -> None:
    """R11. KV and the LLM's work are free at once; no task and no descriptor is left."""
    selector = stage.selector(step_s=0.02)
    overrides = {"proposer.max_num_seqs": BATCH}
    proposer = stage.proposer([selector.settings.port], overrides=overrides)
    free_s: list[float] = []

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask()
        await WAYS[ended](clients)
        await seconds_until_free(proposer, selector)
        stage.look("before", proposer, selector)
        for _ in range(rounds):
            await WAYS[ended](clients)
            free_s.append(await seconds_until_free(proposer, selector))
        await stage.calm(proposer, selector)
        await clients.close()

    asyncio.run(main())
    what = f"{rounds * BATCH} answers {ended}, {BATCH} at once: "
    figures.at_most("R11", f"{what}KV and LLM calls free, p50", ms(free_s, 0.5), 250, " ms")
    figures.at_most("R11", f"{what}KV and LLM calls free, longest", ms(free_s, 1.0), 250, " ms")
    errors = [r.error for r in stage.requests if r.error]
    assert ended == "cancelled" or len(errors) >= rounds * BATCH
    stage.check(allowed={"DEADLINE_EXCEEDED"})


def ms(seconds: list[float], share: float) -> float:
    return 1000 * figures.percentile(seconds, share)
