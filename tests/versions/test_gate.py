"""The gate's verdicts and reasons, and an operator's objections."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.statistics import clustered_difference
from s2t_shared.versions.gate import (
    Evidence,
    GateSettings,
    Paired,
    detectable,
    judge,
    objection,
)
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions
from tests.helpers.versions import paired, publish


def labels_only(paired: Paired) -> Evidence:
    return Evidence(labels=paired)


SAME_LABELS = paired(200, 6, 0.7, 0.7)
BETTER = paired(200, 6, 0.85, 0.7)
WORSE = paired(200, 6, 0.6, 0.7)


def test_a_gain_in_answers_opens_the_gate() -> None:
    """In either measure; agreement need not rise."""
    better_answers = paired(300, 1, 0.7, 0.5)
    for measure in ("tasks", "likelihood"):
        evidence = Evidence(labels=SAME_LABELS, lm_kl=0.01, **{measure: better_answers})
        verdict = judge(evidence, "v0003")
        assert verdict.passed, verdict.reasons
        assert len(verdict.reasons) == 1
        assert "a gain" in verdict.reasons[0]
        json.dumps(verdict.as_json())
    assert verdict.figures["likelihood_low"] > 0
    assert verdict.figures["agree_at_1_items"] == 1200


def test_two_measures_share_the_risk() -> None:
    """A gain that opens the gate alone does not where another measure had the chance as well."""
    gain = Paired(
        [True] * 9 + [False] * 91, [False] * 98 + [True] * 2, [str(n) for n in range(100)]
    )
    alone = Evidence(labels=SAME_LABELS, tasks=gain)
    assert judge(alone, "v0003").passed
    other = replace(alone, likelihood=paired(300, 1, 0.5, 0.5), lm_kl=0.01)
    assert not judge(other, "v0003").passed


def test_agreement_alone_does_not_open_it_where_answers_are_known() -> None:
    same_answers = paired(300, 1, 0.5, 0.5)
    verdict = judge(Evidence(labels=BETTER, tasks=same_answers), "v0003")
    assert not verdict.passed
    assert verdict.reasons[0].startswith("task accuracy .")
    assert "no significant gain; one of +." in verdict.reasons[0]
    assert judge(labels_only(BETTER), "v0003").passed


def test_the_gate_says_why_it_refuses() -> None:
    labels = Paired(
        [True] * 812 + [False] * 189,
        [False] * 196 + [True] * 805,
        [f"p{i % 214}" for i in range(1001)],
    )
    verdict = judge(labels_only(labels), against="v0003")
    assert not verdict.passed
    assert verdict.reasons[0].startswith(
        "held-out Agree@1 .811 against .804 of v0003: difference +.007, 95 % interval"
    )
    assert "(1,001 items of 214 groups)" in verdict.reasons[0]
    noise = judge(labels_only(paired(100, 3, 0.72, 0.7, seed=1)), against="v0003")
    assert not noise.passed
    assert "no significant gain" in noise.reasons[0]
    regression = judge(labels_only(WORSE), against="v0003")
    assert not regression.passed
    assert "difference -." in regression.reasons[0]


def test_what_is_said_to_be_detectable_is_detected() -> None:
    """A version that is better by just that much passes in about four of five trials."""
    half = clustered_difference([1.0, -1.0] * 50, [0.0] * 100, [str(i) for i in range(100)])[1]
    size = detectable(half)
    random = np.random.default_rng(0)
    passed = 0
    for _ in range(200):
        outcomes = random.normal(size, 1.0, 100)
        items = Paired(outcomes.tolist(), [0.0] * 100, [str(i) for i in range(100)])
        passed += judge(Evidence(labels=SAME_LABELS, likelihood=items)).passed
    assert 0.7 < passed / 200 < 0.9


def test_a_version_that_is_no_better_seldom_passes() -> None:
    """200 rounds in which both sides answer equally well, by two measures: at most 10 pass."""
    passed = 0
    for seed in range(200):
        evidence = Evidence(
            labels=paired(60, 6, 0.7, 0.7, seed=seed),
            tasks=paired(100, 1, 0.5, 0.5, seed=1000 + seed),
            likelihood=paired(60, 3, 0.5, 0.5, seed=2000 + seed),
        )
        passed += judge(evidence).passed
    assert passed <= 10


def test_few_labels_are_refused_for_being_few() -> None:
    few = Paired([True] * 40, [False] * 40, [f"p{i % 4}" for i in range(40)])
    verdict = judge(labels_only(few))
    assert not verdict.passed
    assert "more labels are needed: 40 held-out labels of 4 groups" in verdict.reasons[0]
    assert not judge(labels_only(Paired([], [], []))).passed


def test_each_bound_refuses_alone() -> None:
    better = paired(300, 1, 0.7, 0.5)

    def refusal(**measures: Any) -> str:
        evidence = Evidence(**{"labels": BETTER, "tasks": better} | measures)
        verdict = judge(evidence, "v0003")
        assert not verdict.passed
        assert len(verdict.reasons) == 1
        return verdict.reasons[0]

    assert "LM-KL 0.5 nats" in refusal(lm_kl=0.5)
    assert "above the bound" in refusal(lm_kl=float("nan"))
    loss = paired(300, 1, 0.4, 0.6)
    assert "a significant loss" in refusal(tasks=loss)
    assert "log-probability" in refusal(likelihood=loss)
    assert "held-out Agree@1" in refusal(labels=WORSE)
    assert "share of finished answers" in refusal(finished=loss)


def test_a_loss_of_accuracy_can_be_bounded() -> None:
    little = Paired(
        [True] * 58 + [False] * 42, [False] * 40 + [True] * 60, [f"p{i}" for i in range(100)]
    )
    evidence = Evidence(labels=SAME_LABELS, tasks=little, likelihood=paired(300, 1, 0.7, 0.5))
    assert judge(evidence).passed
    strict = judge(evidence, settings=GateSettings(max_task_loss=0.01))
    assert not strict.passed
    assert "a loss of .010 is not ruled out" in strict.reasons[0]


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 30)), min_size=25, max_size=200)
)
def test_at_most_one_side_is_significantly_better(items: list[tuple[bool, bool, int]]) -> None:
    a = [x for x, _, _ in items]
    b = [y for _, y, _ in items]
    problems = [str(z) for _, _, z in items]
    _, half = clustered_difference(a, b, problems)
    if half > 0:
        forward = judge(labels_only(Paired(a, b, problems)))
        backward = judge(labels_only(Paired(b, a, problems)))
        assert not (forward.passed and backward.passed)


def test_a_verdict_is_recorded_beside_the_version(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    """A regression is refused, and the verdict can be read again."""
    good = publish(versions.registry, runtime)
    worse = publish(versions.registry, runtime, seed=1)
    versions.promote(good)
    verdict = judge(labels_only(WORSE), against=good)
    assert not verdict.passed
    versions.record("gate", worse, **verdict.as_json())
    assert versions.live() == good
    event = versions.events(worse)[-1]
    assert event["event"] == "gate"
    assert event["passed"] is False
    assert "a significant loss" in event["reasons"][0]
    assert event["figures"]["agree_at_1_difference"] < 0


def test_only_an_operator_undoes_an_operators_decision(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    """A version that was taken back stays back, and a canary on trial stays alone; verdicts in
    between change nothing."""
    a = publish(versions.registry, runtime)
    b = publish(versions.registry, runtime, seed=1)

    def objected(version: str) -> str:
        state = versions.state(if_damaged=NOTHING_LIVE)
        return objection(state, versions.events(version), version)

    assert objected(a) == ""
    versions.promote(a)
    versions.promote(b)
    versions.rollback()
    versions.record("gate", b, passed=True)
    assert objected(a) == ""
    assert objected(b).startswith("it was rolled back")
    assert f"s2t versions promote {b}" in objected(b)
    versions.promote(b, 0.1)
    for version in (a, b):
        assert f"the canary {b} is on trial" in objected(version)
    versions.rollback()
    assert objected(a) == ""
    assert objected(b).startswith("it was rolled back")
    versions.promote(b)
    versions.promote(a)
    assert objected(b) == ""
    (versions.root / "LIVE").write_text("garbage", encoding="utf-8")
    assert objected(b) == ""  # a promotion mends the pointer
