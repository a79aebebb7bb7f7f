"""The plan's arithmetic, on costs that are made up. No time is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s2t_shared import policy
from s2t_shared.config import load_config
from s2t_shared.errors import ConfigError
from services.cli import app
from services.plan.capacity import ModePlan, plan_mode
from services.plan.costs import ForwardCost, Point, Step, fitted_cost
from services.plan.demand import Traffic, demand_of, read_to_last_trigger
from services.plan.deployment import Assumptions, Deployment, deployment_of
from services.plan.devices import parse_prices
from services.plan.measured import Measured, read_measured
from services.plan.report import make_plan

CLUSTER = Path(__file__).parent.parent.parent.parent / "cluster"
TRAFFIC = Traffic(prompt=100, new=200, budget=0.05)
SLM = ForwardCost(per_step=2e-3, per_sequence=1e-4, per_token=1e-5)
LLM = ForwardCost(per_step=20e-3, per_sequence=1e-4, per_token=1e-4)


def deployment(slm: ForwardCost = SLM, llm: ForwardCost = LLM, **settings: object) -> Deployment:
    config = load_config(None, {key.replace("__", "."): v for key, v in settings.items()}, {})
    return deployment_of(config, TRAFFIC, Assumptions(prices={}, measured={"slm": slm, "llm": llm}))


def planned(mode: str, made: Deployment, traffic: Traffic = TRAFFIC) -> ModePlan:
    found = plan_mode(mode, made, traffic)
    assert found is not None
    return found


# -- demand ---------------------------------------------------------------------------------------


def test_tokens_read_are_those_of_random_triggers() -> None:
    """The closed form against the triggers that the service itself would draw."""
    traffic = Traffic(prompt=40, new=63, budget=0.03)
    answers, read = 1000, 0.0
    for seed in range(answers):
        signals = [policy.random_signal(seed, step) > 1 - traffic.budget for step in range(3, 63)]
        last = max((i for i, fired in enumerate(signals) if fired), default=None)
        read += 0 if last is None else traffic.prompt + 3 + last + 1
    assert read_to_last_trigger(traffic) == pytest.approx(read / answers, rel=0.05)


def test_demand_at_the_limits() -> None:
    """Always asking reads everything; never asking, nothing: the capacity law's two ends."""
    always = demand_of("s2t entropy", replace(TRAFFIC, budget=1.0))
    assert always.llm_tokens == pytest.approx(TRAFFIC.prompt + TRAFFIC.new)
    rarely = demand_of("s2t entropy", replace(TRAFFIC, budget=1e-9))
    assert rarely.llm_tokens == pytest.approx(0.0, abs=1e-3)
    assert demand_of("llm", TRAFFIC).queries == TRAFFIC.new
    drafting = demand_of("s2t kl", replace(TRAFFIC, budget=1e-9))
    assert drafting.slm_steps == pytest.approx(TRAFFIC.new, rel=1e-3)
    assert drafting.queries == pytest.approx(TRAFFIC.new / TRAFFIC.max_draft, rel=1e-3)


# -- costs ----------------------------------------------------------------------------------------


def test_measured_steps_give_back_their_cost() -> None:
    """A fit that mixed up columns would still look plausible."""
    true = ForwardCost(
        per_step=3e-3, per_sequence=2e-4, per_token=5e-6, per_request=4e-3, per_mixed_step=1e-3
    )
    points = []
    for sequences, prompt, new, mixed in [
        (1, 50, 40, 0.0),
        (32, 50, 40, 0.0),
        (32, 200, 4, 0.0),
        (32, 20, 4, 0.0),
        (32, 50, 40, 0.8),
    ]:
        step = Step(
            sequences=sequences,
            tokens=sequences * (1 + prompt / new),
            requests=sequences / new,
            mixed=mixed,
        )
        points.append(Point(step, true.seconds(step)))
    found = fitted_cost(points)
    for name in ("per_step", "per_sequence", "per_token", "per_request", "per_mixed_step"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6), name


def test_a_fit_has_no_negative_numbers() -> None:
    """Noise must not plan a batch that pays for itself."""
    points = [Point(Step(sequences=n, tokens=n), s) for s, n in [(5, 1), (4, 32)]]
    found = fitted_cost(points)
    assert min(found.per_step, found.per_sequence, found.per_token) >= 0


def test_roofline_has_its_knee() -> None:
    cost = ForwardCost(per_step=0, per_sequence=0, per_token=1e-4, weights=1e-2)

    def of(tokens: float) -> float:
        return cost.seconds(Step(sequences=1, tokens=tokens))

    assert of(1) == of(99) == 1e-2
    assert of(200) == pytest.approx(2e-2)


# -- capacity -------------------------------------------------------------------------------------


def test_greedy_is_batch_over_step_time() -> None:
    """By hand: 32 sequences; each reads 1 + 100/200 tokens a step."""
    found = planned("greedy", deployment())
    step = 2e-3 + 32 * 1e-4 + 32 * 1.5 * 1e-5
    assert found.total == pytest.approx(32 / step, rel=1e-3)
    assert found.alone == pytest.approx(1 / (2e-3 + 1e-4 + 1.5e-5), rel=1e-3)
    assert found.saturates == "proposer decode" and found.selector_busy is None


def test_llm_alone_is_batch_over_step_time() -> None:
    found = planned("llm", deployment())
    step = 20e-3 + 32 * 1e-4 + 32 * 1.5 * 1e-4
    assert found.total == pytest.approx(32 / step, rel=1e-3)


def test_the_capacity_law() -> None:
    """Where one LLM is asked by many proposers, s2t is bound by what the LLM reads; s2t_local
    is not."""
    many = deployment(proposer__replicas=50, selector__max_queries=0)
    s2t, local = planned("s2t entropy", many), planned("s2t_local entropy", many)
    read_per_second = s2t.total * s2t.llm_read
    assert s2t.saturates.startswith("selector") and s2t.selector_busy is not None
    assert read_per_second < 1 / LLM.per_token
    assert local.total > 3 * s2t.total
    assert s2t.feeds is not None and s2t.feeds < 50
    alone, llm = planned("s2t entropy", many).alone, planned("llm", many).alone
    assert alone > 3 * llm, "at low load it saves much"


def test_more_never_makes_less() -> None:
    """Another replica, or a cheaper LLM, may not lower the plan."""
    totals = [planned("s2t entropy", deployment(proposer__replicas=n)).total for n in (1, 2, 4, 8)]
    assert totals == sorted(totals)
    cheap = planned("s2t entropy", deployment(llm=replace(LLM, per_token=1e-6))).total
    assert cheap >= planned("s2t entropy", deployment()).total


def test_contexts_that_the_llm_cannot_keep_are_read_anew() -> None:
    """The LLM's KV, not its speed, may be what is missing."""
    small = deployment(
        proposer__replicas=20, llm__kv_gib=0.02, proposer__max_num_seqs=64, slm__kv_gib=4
    )
    large = deployment(
        proposer__replicas=20, llm__kv_gib=30.0, proposer__max_num_seqs=64, slm__kv_gib=4
    )
    few, many = planned("s2t entropy", small), planned("s2t entropy", large)
    assert few.saturates == "selector KV" and few.at_once < many.at_once
    assert few.total <= many.total


def test_cost_is_price_over_tokens() -> None:
    given = Assumptions(prices={"CPU core": 3.6}, measured={"slm": SLM, "llm": LLM})
    made = deployment_of(load_config(None, {}, {}), TRAFFIC, given)
    greedy, s2t = planned("greedy", made), planned("s2t entropy", made)
    assert greedy.cost == pytest.approx(1e6 * 1e-3 / greedy.total)
    assert s2t.cost == pytest.approx(1e6 * 2e-3 / s2t.total)
    assert s2t.balanced <= s2t.cost


def test_without_an_llm_only_modes_without_one() -> None:
    plan = make_plan(
        load_config(None, {"selector.replicas": 0}, {}),
        TRAFFIC,
        Assumptions(prices={}, measured={}),
    )
    assert [m.mode for m in plan.modes] == ["greedy", "s2t_local entropy"]


# -- devices, files, the command ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["H100", "H100=x", "X9=1", "L4=-1", "L4=inf"])
def test_wrong_prices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="H100"):
        parse_prices(text)


def test_measured_file_survives_the_way_through_a_file(tmp_path: Path) -> None:
    points = [Point(Step(sequences=1, tokens=1.5, requests=0.1), 1e-3)]
    found = Measured(
        machine="m", conditions="c", slm="bundled", llm=None, points={"slm": points, "llm": []}
    )
    found.write(tmp_path / "measured.json")
    assert read_measured(tmp_path / "measured.json") == found
    assert set(found.costs()) == {"slm"}
    for text in ("", "[]", '{"format": 9}', '{"format": 1, "points": {"slm": [1]}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="s2t bench capacity"):
            read_measured(tmp_path / "bad.json")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app.app, ["plan", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("*.yaml")), ids=lambda file: file.name)
def test_every_settings_file_can_be_planned(file: Path) -> None:
    """Without a GPU, weights or network; each fits what it names."""
    if file.name == "serve.yaml":
        return
    status, out = run("--config", str(file), "--json", "--new", "100")
    plan = json.loads(out)
    assert status == 0
    modes = {mode["mode"] for mode in plan["modes"]}
    assert not modes if file.name == "split-llm.yaml" else modes >= {"greedy", "s2t_local entropy"}
    sources = {row["source"].partition(" ")[0] for row in plan["inputs"]}
    assert sources & {"assumed", "assumed;"}, "a plan must say what it assumes"


def test_an_llm_elsewhere_is_named_on_the_command_line() -> None:
    """The half with the proposers knows only the selectors' addresses."""
    half = ("--config", str(CLUSTER / "split-slm.yaml"))
    assert "left out" in run(*half)[1]
    status, out = run(*half, "--llm", "32B", "--llm-device", "H100", "--json")
    plan = json.loads(out)
    assert status == 0 and len(plan["modes"]) == 6
    assert plan["deployment"]["selector"]["memory"]["weights"] == pytest.approx(61, abs=0.5)


def test_what_does_not_fit_is_said() -> None:
    status, out = run("--config", str(CLUSTER / "reference.yaml"), "--llm-device", "L4")
    assert status == 1 and "does not fit" in out and "NO" in out
