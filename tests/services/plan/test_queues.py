"""The simulated queues, on costs that are made up: against closed forms, and against themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from s2t_shared.config import load_config
from services.plan.costs import ForwardCost
from services.plan.demand import Traffic
from services.plan.deployment import Assumptions, Deployment, deployment_of
from services.plan.plot import draw
from services.plan.queues import QueuePoint, requests_per_second, simulate, sweep
from services.plan.report import make_plan

TRAFFIC = Traffic(prompt=40, new=60, budget=0.05)
SLM = ForwardCost(per_step=10e-3, per_sequence=0.0, per_token=0.0)
LLM = ForwardCost(per_step=20e-3, per_sequence=0.0, per_token=0.0)
GIVEN = Assumptions(prices={}, measured={"slm": SLM, "llm": LLM})
SLOTS = 8


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    config = load_config(None, {"proposer.max_num_seqs": SLOTS}, {})
    return deployment_of(config, TRAFFIC, GIVEN)


def test_without_load_nothing_waits(deployment: Deployment) -> None:
    """A wait there would be a mistake of the simulation: it would be in every other figure too."""
    found = simulate(deployment, TRAFFIC, 1, 1, requests_per_second=0.05)
    assert found.unfinished < 0.02
    assert found.query_p50 == pytest.approx(0, abs=1e-9)
    assert found.answer_p50 == pytest.approx(0, abs=1e-9)


def test_utilisation_is_work_over_time(deployment: Deployment) -> None:
    """A lone query is a round of 20 ms; an answer takes 60 steps of 10 ms and its queries."""
    rate = 0.5
    found = simulate(deployment, TRAFFIC, 2, 2, requests_per_second=2 * rate)
    queries = TRAFFIC.budget * (TRAFFIC.new - 3)
    assert found.selector_utilisation == pytest.approx(rate * queries * 20e-3, rel=0.15)
    answer = 60 * 10e-3 + queries * 20e-3
    assert found.proposer_utilisation == pytest.approx(rate * answer / SLOTS, rel=0.15)


def test_waits_grow_with_proposers_per_selector(deployment: Deployment) -> None:
    """And a query costs the LLM's time only: with enough selectors, none waits long."""
    slow = replace(LLM, per_token=2e-4)  # 18 ms of arithmetic for each answer
    assert deployment.selector is not None
    bound = replace(deployment, selector=replace(deployment.selector, cost=slow))
    points = list(sweep(bound, TRAFFIC, 16, 0.5, [1, 4, 16]))
    assert [p.selectors for p in points] == [16, 4, 1]
    waits = [p.query_p99 for p in points]
    assert waits == sorted(waits) and waits[-1] > 10 * waits[0]
    assert points[0].unfinished < 0.05 < points[-1].unfinished
    assert points[-1].selector_utilisation > 0.9


def test_the_same_seed_gives_the_same_queues(deployment: Deployment) -> None:
    one, two, other = (simulate(deployment, TRAFFIC, 4, 1, 10.0, seed) for seed in (1, 1, 2))
    assert one == two != other


def test_most_requests_are_places_over_time(deployment: Deployment) -> None:
    assert requests_per_second(deployment, TRAFFIC) == pytest.approx(SLOTS / 0.6, rel=1e-3)


@pytest.mark.parametrize("simulated", [0, 2])
def test_plot_is_drawn(simulated: int, tmp_path: Path) -> None:
    """With queues and without."""
    plan = make_plan(load_config(None, {}, {}), TRAFFIC, GIVEN)
    point = QueuePoint(**dict.fromkeys(QueuePoint.__annotations__, 0.5))
    draw(
        plan,
        [replace(point, proposers_per_selector=n + 1) for n in range(simulated)],
        tmp_path / "plan.svg",
    )
    assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")
