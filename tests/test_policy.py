"""The pure numbers: signals against direct formulas, the trigger rule, candidates, calibration,
refusals."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from s2t_shared import policy
from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import CandidateRule, Mode, Policy, Support, Trigger

probabilities = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=64).map(
    lambda p: np.array(sorted(p)[::-1])
)
pairs = st.integers(2, 64).flatmap(
    lambda n: st.tuples(
        *[st.lists(st.floats(1e-6, 1.0), min_size=n, max_size=n).map(np.array) for _ in range(2)]
    )
)


@given(probabilities)
def test_entropy_is_of_the_renormalised_support(p: np.ndarray) -> None:
    """If the support were not renormalised (it never sums to 1), thresholds would depend on the
    tail's mass."""
    q = p / p.sum()
    assert policy.entropy(np.log(p)) == pytest.approx(-(q * np.log(q)).sum(), abs=1e-9)
    assert policy.entropy(np.log(p) - 3.0) == pytest.approx(policy.entropy(np.log(p)), abs=1e-9)


@given(probabilities)
def test_margin_is_one_minus_the_gap_of_the_best_two(p: np.ndarray) -> None:
    """A margin not renormalised, or of the wrong sign, would trigger where the SLM is sure."""
    q = p / p.sum()
    assert policy.margin(np.log(p)) == pytest.approx(1 - (q[0] - q[1]), abs=1e-9)


@given(pairs)
def test_kl_follows_its_definition_in_both_directions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """The paper's code is D(p_S || p_L); swapping the directions picks other steps."""
    s, ll = (x / x.sum() for x in pair)
    forward, reverse = (s * np.log(s / ll)).sum(), (ll * np.log(ll / s)).sum()
    assert policy.kl(*map(np.log, pair)) == pytest.approx(forward, abs=1e-9)
    assert policy.kl(*map(np.log, pair), reverse=True) == pytest.approx(reverse, abs=1e-9)


def test_kl_leaves_out_ids_the_llm_calls_impossible() -> None:
    """Without the floor one id with p_L = 1e-13 adds 0.3 * 29 nats, and every such step
    triggers."""
    s = np.array([0.5, 0.3, 0.2])
    ll = np.array([0.6, 1e-13, 0.4])
    renormalised = ll / ll.sum()
    expected = sum(s[i] * np.log(s[i] / renormalised[i]) for i in (0, 2))
    assert policy.kl(np.log(s), np.log(ll)) == pytest.approx(expected, abs=1e-9)
    assert policy.kl(np.log(s), [np.log(0.6), -1e4, np.log(0.4)]) == pytest.approx(
        expected, abs=1e-9
    )
    just_above = np.array([0.6, 2e-12, 0.4])
    assert policy.kl(np.log(s), np.log(just_above)) > 5.0


def test_single_id_supports_have_no_divergence() -> None:
    """A vocabulary of one id must not divide by nothing or index past the end."""
    assert policy.entropy([-2.0]) == 0.0
    assert policy.margin([-2.0]) == 0.0
    assert policy.kl([-2.0], [-5.0]) == 0.0


def test_slm_signal_by_trigger() -> None:
    """A trigger wired to another's signal would be calibrated in the wrong unit; KL has none
    without the LLM."""
    support = Support((4, 2, 9), tuple(np.log([0.5, 0.3, 0.1])))
    assert policy.slm_signal(Trigger.ENTROPY, support, 0, 5) == policy.entropy(support.log_probs)
    assert policy.slm_signal(Trigger.MARGIN, support, 0, 5) == policy.margin(support.log_probs)
    assert policy.slm_signal(Trigger.RANDOM, support, 7, 5) == policy.random_signal(7, 5)
    for trigger in (Trigger.KL, Trigger.KL_REVERSE, Trigger.NEVER, Trigger.ALWAYS):
        assert policy.slm_signal(trigger, support, 0, 5) is None


def test_random_signal_is_uniform_and_its_own_per_seed_and_step() -> None:
    """A signal that repeats over steps or seeds triggers in lockstep; one off [0, 1) misses its
    budget."""
    draws = np.array(
        [policy.random_signal(seed, step) for seed in range(20) for step in range(100)]
    )
    assert len(set(draws)) == len(draws)
    assert ((draws >= 0) & (draws < 1)).all()
    assert (draws > 0.9).mean() == pytest.approx(0.1, abs=0.03)
    assert policy.random_signal(-3, 4) == policy.random_signal(-3, 4)


@pytest.mark.parametrize("trigger", [t for t in Trigger if t.needs_threshold])
def test_a_step_triggers_only_strictly_above_its_threshold(trigger: Trigger) -> None:
    """With >= a threshold of 0 would trigger at every sure step (entropy 0), far over budget."""
    rule = Policy(mode=Mode.S2T, trigger=trigger, threshold=0.5)
    assert not policy.triggers(rule, 0.5, 10)
    assert policy.triggers(rule, np.nextafter(0.5, 1), 10)


def test_warm_up_never_and_always() -> None:
    """The first 3 steps never trigger, except under `always`, which law 1 needs from the first
    token on."""
    rule = Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.0)
    assert [policy.triggers(rule, 9.0, i) for i in range(5)] == [False, False, False, True, True]
    assert [policy.may_trigger(rule, i) for i in range(5)] == [False, False, False, True, True]
    assert policy.triggers(replace(rule, warmup_steps=0), 9.0, 0)
    always, never = replace(rule, trigger=Trigger.ALWAYS), replace(rule, trigger=Trigger.NEVER)
    assert policy.triggers(always, None, 0) and policy.may_trigger(always, 0)
    assert not policy.triggers(never, None, 99) and not policy.may_trigger(never, 99)


@given(probabilities, st.integers(1, 64), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_candidate_count(p: np.ndarray, k: int, ratio: float) -> None:
    """Candidates are p >= ratio * p_max, at most K, at least 1; 0 means the fixed rule, not
    "all"."""
    p = p / p.sum()
    expected = (
        min(k, len(p))
        if ratio == 0
        else min(k, len(p), int((p >= ratio * p[0] * (1 - 1e-12)).sum()))
    )
    count = policy.candidate_count(CandidateRule(k, ratio), np.log(p))
    near_border = bool(np.any(np.abs(p / (max(ratio, 1e-9) * p[0]) - 1) < 1e-9))
    assert count == expected or (near_border and 1 <= count <= k)


def test_adaptive_candidates_by_hand() -> None:
    """0.05 is below a tenth of 0.6, 0.07 is not; K still limits."""
    log_probs = np.log([0.6, 0.2, 0.07, 0.05, 0.04])
    assert policy.candidate_count(CandidateRule(8, 0.1), log_probs) == 3
    assert policy.candidate_count(CandidateRule(2, 0.1), log_probs) == 2
    assert policy.candidate_count(CandidateRule(8, 0.0), log_probs) == 5


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=300, unique=True), st.integers(1, 1000))
@example(list(range(100)), 290)
def test_threshold_spends_the_budget(values: list[int], permille: int) -> None:
    """One step too many and the LLM is asked above what the operator pays for; one less and it
    idles. In floats 0.29 * 100 is 28.999999999999996: a budget of 29 % of 100 steps is 29 steps all
    the same, not 28."""
    signals = [v / 1e8 for v in values]
    above = sum(s > policy.threshold_for(permille / 1000, signals) for s in signals)
    assert above == int(Fraction(permille, 1000) * len(signals))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0.01, 1.0), st.integers(0, 40)
)
def test_threshold_never_overspends(values: list[int], budget: float, warm_up: int) -> None:
    """Tied signals cannot be split, so the rate may fall short; it must never exceed. Warm-up steps
    count as steps."""
    steps = len(values) + warm_up
    assert (
        sum(v > policy.threshold_for(budget, values, steps) for v in values)
        <= budget * steps + 1e-6
    )


def test_threshold_counts_warm_up_steps_in_the_share() -> None:
    """Short answers are mostly warm-up: a share of the remaining steps would halve the trigger rate
    asked for."""
    signals = list(range(20))
    assert sum(s > policy.threshold_for(0.1, signals, 40) for s in signals) == 4
    assert sum(s > policy.threshold_for(1.0, signals, 40) for s in signals) == 20


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_impossible_budgets_are_refused(budget: float) -> None:
    """A budget of 0 or NaN silently became a threshold once calibrated, and nobody knew why nothing
    triggered."""
    with pytest.raises(InvalidRequestError, match="budget"):
        policy.threshold_for(budget, [1.0, 2.0])


def test_calibration_without_signals_is_refused() -> None:
    """An empty calibration would store an arbitrary threshold with the version."""
    with pytest.raises(InvalidRequestError, match="no signals"):
        policy.threshold_for(0.1, [])


@pytest.mark.parametrize(
    "bad, word",
    [
        (Policy(candidates=CandidateRule(0)), "candidates=0"),
        (Policy(candidates=CandidateRule(65)), "candidates=65"),
        (Policy(candidates=CandidateRule(8, -0.1)), "candidate_ratio"),
        (Policy(candidates=CandidateRule(8, 1.1)), "candidate_ratio"),
        (Policy(candidates=CandidateRule(8, float("nan"))), "candidate_ratio"),
        (Policy(threshold=float("nan")), "threshold=nan"),
        (Policy(threshold=float("inf")), "threshold=inf"),
    ],
)
def test_impossible_policies_are_refused(bad: Policy, word: str) -> None:
    """K = 0 leaves nothing to choose, NaN never triggers: each names its field instead of failing
    mid-answer."""
    with pytest.raises(InvalidRequestError, match=word):
        policy.check_policy(bad)


def test_possible_policies_pass() -> None:
    """The accepted range must include its ends, K = 1 and K = 64 (law 1 needs both)."""
    for k in (1, 64):
        policy.check_policy(Policy(candidates=CandidateRule(k, 1.0), threshold=-1.0))
