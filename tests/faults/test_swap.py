"""Versions that are swapped while answers stream: none fails, none mixes two, and each is visible
everywhere soon. The bundled SLM, and two untrained versions that select differently."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from s2t_shared.bundled import problems
from s2t_shared.versions.live import LiveVersions
from services.bench.swap import SIDES, publish_untrained
from tests.faults import figures
from tests.faults.clients import Clients, asking
from tests.faults.stage import Stage, until

pytestmark = pytest.mark.kill
PROBLEMS = problems.problems("test", 8)
CLIENTS = 3  # of each proposer
SEEN_S = 30.0  # on however busy a machine


@pytest.mark.parametrize("swaps", figures.sizes([], [50]))
def test_versions_are_swapped_under_streams(stage: Stage, swaps: int) -> None:
    """R8. Each answer is of the version that it names, by a replay that asks for that version."""
    # Kept contexts fill the KV pool up to its bound: a small one, so that a leak would show.
    bound = {"slm.kv_gib": 0.05}
    overrides = {"calibration.count": 16, "calibration.max_new_tokens": 32, **bound}
    proposers = [
        stage.proposer(name=f"proposer{i}", overrides=overrides, is_scripted=False)
        for i in range(2)
    ]
    config = proposers[0].settings.config
    versions = publish_untrained(config, SIDES)
    live = LiveVersions(config.versions)
    turns = itertools.count()
    seen_s: list[float] = []

    async def main() -> None:
        clients = [stage.clients(p, first=i * 1_000_000) for i, p in enumerate(proposers)]
        await promote(versions[0])
        async with asking(lambda: ask(clients[0]), CLIENTS):
            async with asking(lambda: ask(clients[1]), CLIENTS):
                for i in range(swaps):
                    await promote(versions[(i + 1) % 2])
                    stage.look("before" if i == swaps // 5 else "during", *proposers)
                    await asyncio.sleep(0.5)
        for name in versions:
            for problem in PROBLEMS:
                await ask(clients[0], problem.prompt, name)
        await stage.calm(*proposers)
        for opened in clients:
            await opened.close()

    async def ask(clients: Clients, prompt: str = "", version: str | None = None) -> None:
        prompt = prompt or PROBLEMS[next(turns) % len(PROBLEMS)].prompt
        await clients.ask(
            "s2t_local", prompt=prompt, budget=0.2, version=version, is_scripted=False
        )

    async def promote(version: str) -> None:
        stage.fault(f"promote {version}")
        begun = time.monotonic()
        live.promote(version)

        def is_seen() -> bool:
            return all(p.vitals()["live_version"] == version for p in proposers)

        assert await until(is_seen, SEEN_S), "not seen by all"
        seen_s.append(time.monotonic() - begun)

    asyncio.run(main())
    requests = [r for r in stage.requests if r.answer]
    replays = {(r.answer["version"], r.asked["prompt"]): r.answer for r in requests[-16:]}
    assert len(replays) == 2 * len(PROBLEMS)
    for (version, prompt), answer in replays.items():
        stage.history.write(
            "replay",
            mode="s2t_local",
            version=version,
            prompt=prompt,
            token_ids=answer["token_ids"],
        )
    differing = sum(
        replays[versions[0], p.prompt]["token_ids"] != replays[versions[1], p.prompt]["token_ids"]
        for p in PROBLEMS
    )
    assert differing > len(PROBLEMS) / 2, "the versions hardly differ: nothing would show"
    what = f"hot swap x{swaps}, 2 proposers, {len(requests)} answers: "
    figures.at_most("R8", f"{what}failed", stage.failed(), 0)
    figures.at_most("R8", f"{what}mixed", stage.mixed(), 0)
    figures.at_most("R8", f"{what}seen by all, longest", max(seen_s), 5.0, " s")
    stage.check()
