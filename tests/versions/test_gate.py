"""The gate's verdicts and reasons, and an operator's objections."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.statistics import clustered_difference
from s2t_shared.versions.gate import GateSettings, Paired, judge, objection
from s2t_shared.versions.live import NOTHING_LIVE, LiveVersions
from tests.helpers.versions import paired, publish


def test_the_gate_opens_for_a_clear_gain() -> None:
    verdict = judge(paired(200, 6, 0.85, 0.7), 0.01, paired(200, 1, 0.6, 0.6), "v0003")
    assert verdict.passed
    assert len(verdict.reasons) == 3
    assert verdict.figures["difference_low"] > 0.1
    assert verdict.figures["labels"] == 1200
    json.dumps(verdict.as_json())


def test_the_gate_says_why_it_refuses() -> None:
    labels = Paired(
        [True] * 812 + [False] * 189,
        [False] * 196 + [True] * 805,
        [f"p{i % 214}" for i in range(1001)],
    )
    verdict = judge(labels, None, against="v0003")
    assert not verdict.passed
    assert verdict.reasons[0].startswith(
        "held-out Agree@1 .811 against .804 of v0003: difference +.007, 95 % interval"
    )
    assert "(1,001 labels of 214 problems)" in verdict.reasons[0]
    noise = judge(paired(100, 3, 0.72, 0.7, seed=1), None, against="v0003")
    assert not noise.passed
    assert "not above 0" in noise.reasons[0]
    regression = judge(paired(200, 6, 0.6, 0.7), None, against="v0003")
    assert not regression.passed
    assert "difference -." in regression.reasons[0]


def test_few_labels_are_refused_for_being_few() -> None:
    verdict = judge(Paired([True] * 40, [False] * 40, [f"p{i % 5}" for i in range(40)]), None)
    assert not verdict.passed
    assert "more labels are needed: 40 held-out labels of 5 problems" in verdict.reasons[0]
    assert not judge(Paired([], [], []), None).passed


def test_each_bound_refuses_alone() -> None:
    good = paired(200, 6, 0.85, 0.7)
    assert "LM-KL 0.5 nats" in judge(good, 0.5).reasons[0]
    assert not judge(good, 0.5).passed
    assert not judge(good, float("nan")).passed
    worse = judge(good, None, paired(300, 1, 0.4, 0.6), "v0003")
    assert not worse.passed
    assert "a significant loss" in worse.reasons[0]
    assert len(worse.reasons) == 1
    little = Paired(
        [True] * 58 + [False] * 42, [False] * 40 + [True] * 60, [f"p{i}" for i in range(100)]
    )
    assert judge(good, None, little).passed
    strict = judge(good, None, little, settings=GateSettings(max_task_loss=0.01))
    assert not strict.passed
    assert "a loss of .010 is not ruled out" in strict.reasons[0]
    assert not judge(good, None, settings=GateSettings(min_gain=0.3)).passed


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 30)), min_size=25, max_size=200)
)
def test_at_most_one_side_is_significantly_better(items: list[tuple[bool, bool, int]]) -> None:
    a = [x for x, _, _ in items]
    b = [y for _, y, _ in items]
    problems = [str(z) for _, _, z in items]
    _, half = clustered_difference(a, b, problems)
    if half > 0:
        forward = judge(Paired(a, b, problems), None)
        backward = judge(Paired(b, a, problems), None)
        assert not (forward.passed and backward.passed)


def test_a_verdict_is_recorded_beside_the_version(
    versions: LiveVersions, runtime: ModelRuntime
) -> None:
    """A regression is refused, and the verdict can be read again."""
    good = publish(versions.registry, runtime)
    worse = publish(versions.registry, runtime, seed=1)
    versions.promote(good)
    verdict = judge(paired(200, 6, 0.6, 0.7), None, against=good)
    assert not verdict.passed
    versions.record("gate", worse, **verdict.as_json())
    assert versions.live() == good
    event = versions.events(worse)[-1]
    assert event["event"] == "gate"
    assert event["passed"] is False
    assert "not above 0" in event["reasons"][0]
    assert event["figures"]["difference"] < 0


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
