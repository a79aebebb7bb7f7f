"""Numbers of the method: trigger signals, candidates, calibration. Runs no model, keeps no state.

Arrays are numpy float64 on the host and at most 64 wide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.types import (
    CALIBRATED,
    MAX_CANDIDATES,
    WARMUP_STEPS,
    CandidateRule,
    Policy,
    Step,
    Support,
    Trigger,
)

Floats = Sequence[float]

LLM_PROBABILITY_FLOOR = 1e-12
BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


# -- signals --------------------------------------------------------------------------------------


def renormalise(log_probs: Floats) -> np.ndarray:
    """Log-probabilities [S], renormalised to sum to one on the support."""
    x = np.asarray(log_probs, dtype=np.float64)
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def entropy(log_probs: Floats) -> float:
    """Entropy in nats of p_S renormalised on the support (S2T paper, entropy trigger)."""
    log_p = renormalise(log_probs)
    return float(-(np.exp(log_p) * np.maximum(log_p, -1e9)).sum())


def margin(log_probs: Floats) -> float:
    """1 - (p_1 - p_2) on the support: 0 when the SLM is sure, 1 when its best two ids tie."""
    p = np.exp(renormalise(log_probs))
    second = p[1] if len(p) > 1 else 0.0
    return float(1.0 - (p[0] - second))


def kl(slm_log_probs: Floats, llm_log_probs: Floats, reverse: bool = False) -> float:
    """D_KL(p_S || p_L) in nats, both renormalised on the SLM's support (S2T paper's code).

    Ids with p_L <= 1e-12 are left out. `reverse` gives D_KL(p_L || p_S), the direction of the
    paper's figure.
    """
    log_s = renormalise(slm_log_probs)
    log_l = renormalise(llm_log_probs)
    keep = np.exp(log_l) > LLM_PROBABILITY_FLOOR
    log_s = log_s[keep]
    log_l = log_l[keep]
    if reverse:
        return float((np.exp(log_l) * (log_l - log_s)).sum())
    return float((np.exp(log_s) * (log_s - log_l)).sum())


def rank(token_id: int, support_ids: Sequence[int]) -> int:
    """Place of an id in the SLM's order, 0 = first, -1 = outside the support."""
    return support_ids.index(token_id) if token_id in support_ids else -1


def random_signal(seed: int, step: int) -> float:
    """A uniform number in [0, 1) that depends on the seed and the step only, never on the batch."""
    return float(np.random.default_rng([seed & 0xFFFFFFFF, step]).random())


def slm_signal(trigger: Trigger, support: Support, seed: int, step: int) -> float | None:
    """The signal of a trigger that needs no LLM; None for the KL triggers, `never` and `always`."""
    if trigger is Trigger.ENTROPY:
        return entropy(support.log_probs)
    if trigger is Trigger.MARGIN:
        return margin(support.log_probs)
    if trigger is Trigger.RANDOM:
        return random_signal(seed, step)
    return None


def step_signal(step: Step, trigger: Trigger) -> float:
    """The value of a trigger at a Step that kept its support (and, for KL, the LLM's scores)."""
    assert step.support is not None
    if trigger is Trigger.ENTROPY and step.entropy is not None:
        return step.entropy
    if trigger is Trigger.KL and step.kl is not None:
        return step.kl
    if trigger.needs_llm:
        assert step.llm is not None
        reverse = trigger is Trigger.KL_REVERSE
        return kl(step.support.log_probs, step.llm.log_probs, reverse=reverse)
    signal = slm_signal(trigger, step.support, 0, step.index)
    assert signal is not None
    return signal


# -- decisions ------------------------------------------------------------------------------------


def may_trigger(policy: Policy, step: int) -> bool:
    """Whether step `step` (0-based) can be a divergence point.

    `always` ignores the warm-up: with K = |V| it must equal the LLM's greedy answer from the first
    token (law 1).
    """
    if not policy.can_trigger:
        return False
    return policy.trigger is Trigger.ALWAYS or step >= policy.warmup_steps


def triggers(policy: Policy, signal: float | None, step: int) -> bool:
    """Whether step `step` (0-based) is a divergence point: its signal lies strictly above the
    threshold."""
    return may_trigger(policy, step) and exceeds(policy, signal)


def exceeds(policy: Policy, signal: float | None) -> bool:
    """Whether the signal of a step that may trigger marks a divergence point."""
    if policy.trigger is Trigger.ALWAYS:
        return True
    assert signal is not None
    return signal > policy.threshold


def candidate_count(rule: CandidateRule, log_probs: Floats) -> int:
    """How many of the SLM's top ids are candidates: K, or those with p >= ratio * p_max, at least
    1."""
    count = min(rule.k, len(log_probs))
    if rule.ratio > 0.0:
        log_p = np.asarray(log_probs[:count])
        count = int((log_p >= log_p[0] + np.log(rule.ratio)).sum())
    return max(count, 1)


def check_policy(policy: Policy) -> None:
    """Refuse impossible policies.

    Raises:
        InvalidRequestError: naming the field, its value and the accepted range.
    """
    rule = policy.candidates
    if not 1 <= rule.k <= MAX_CANDIDATES:
        raise InvalidRequestError(
            f"candidates={rule.k}: must be 1..{MAX_CANDIDATES}", field="candidates"
        )
    if not 0.0 <= rule.ratio <= 1.0:
        raise InvalidRequestError(
            f"candidate_ratio={rule.ratio}: must be 0 (fixed K) or in (0, 1]",
            field="candidate_ratio",
        )
    if not np.isfinite(policy.threshold):
        raise InvalidRequestError(
            f"threshold={policy.threshold}: must be a finite number", field="threshold"
        )


def check_budget(budget: float) -> float:
    """A budget is a share of steps in (0, 1].

    Raises:
        InvalidRequestError: otherwise.
    """
    if not 0.0 < budget <= 1.0:
        raise InvalidRequestError(
            f"budget={budget}: must be above 0 and at most 1 (0.01 means 1 % of the steps)",
            field="budget",
        )
    return budget


# -- calibration ----------------------------------------------------------------------------------


def threshold_for(budget: float, signals: Floats, steps: int | None = None) -> float:
    """The threshold whose trigger rate is `budget`: at most `budget * steps` signals lie above it.

    signals: of the steps after the warm-up. steps: all steps, warm-up included, because the budget
    is a share of all output tokens; default len(signals).
    """
    check_budget(budget)
    if not len(signals):
        raise InvalidRequestError(
            "no signals to calibrate on: the rollouts have no step after the warm-up; use more or "
            "longer training prompts"
        )
    ordered = np.sort(np.asarray(signals, dtype=np.float64))[::-1]
    total = steps if steps is not None else len(ordered)
    allowed = int(budget * total + 1e-9)  # 0.29 * 100 is 28.999... in floats
    if allowed >= len(ordered):
        return float(ordered[-1]) - 1e-6
    return float(ordered[allowed])


@dataclass(frozen=True)
class Calibration:
    """Budget -> threshold, per trigger, measured on rollouts of training prompts.

    >>> Calibration({Trigger.ENTROPY: {0.01: 1.2, 0.1: 0.4}}).threshold(Trigger.ENTROPY, 0.01)
    1.2
    """

    thresholds: Mapping[Trigger, Mapping[float, float]]

    @classmethod
    def measure(cls, rollouts: Iterable[Sequence[Step]]) -> Calibration:
        """From greedy SLM rollouts. Without LLM scores the KL triggers stay uncalibrated.

        Raises:
            InvalidRequestError: no rollout is longer than the warm-up.
        """
        answers = list(rollouts)
        steps = [step for answer in answers for step in answer[WARMUP_STEPS:]]
        total = sum(len(answer) for answer in answers)
        scored = bool(steps) and all(step.llm is not None for step in steps)
        thresholds = {}
        for trigger in CALIBRATED:
            if trigger.needs_llm and not scored:
                continue
            signals = [step_signal(step, trigger) for step in steps]
            thresholds[trigger] = {b: threshold_for(b, signals, total) for b in BUDGETS}
        return cls(thresholds)

    def threshold(self, trigger: Trigger, budget: float) -> float:
        """Interpolated between the measured budgets; 0 where the trigger needs no threshold.

        Raises:
            InvalidRequestError: budget out of range.
            ConfigError: this trigger was not calibrated.
        """
        check_budget(budget)
        if not trigger.needs_threshold:
            return 0.0
        if trigger is Trigger.RANDOM:
            return 1.0 - budget
        if trigger not in self.thresholds:
            raise ConfigError(
                f"trigger {trigger.value!r} has no calibrated thresholds; give a threshold, or "
                "calibrate with an LLM configured"
            )
        table = sorted(self.thresholds[trigger].items())
        log_budgets = [np.log(b) for b, _ in table]
        return float(np.interp(np.log(budget), log_budgets, [value for _, value in table]))

    def or_else(self, other: Calibration) -> Calibration:
        """This calibration, and `other` for the triggers it lacks."""
        return Calibration({**other.thresholds, **self.thresholds})

    def without_llm(self) -> Calibration:
        """The thresholds that say nothing of an LLM."""
        own = {t: table for t, table in self.thresholds.items() if not t.needs_llm}
        return Calibration(own)

    def to_json(self) -> str:
        named = {}
        for trigger, table in self.thresholds.items():
            named[trigger.value] = {str(budget): value for budget, value in table.items()}
        return json.dumps(named)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Raises ValueError: not a calibration."""
        thresholds = {}
        for name, table in json.loads(text).items():
            thresholds[Trigger(name)] = {float(b): float(value) for b, value in table.items()}
        return cls(thresholds)
