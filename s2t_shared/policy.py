"""Decides; never runs a model. Numbers in, decisions out: trigger signals, candidates, calibration.

All arrays are numpy float64 on the host, at most 64 wide, so nothing here is worth a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.types import MAX_CANDIDATES, WARMUP_STEPS, CandidateRule, Policy, Step, Support, Trigger

Floats = Sequence[float]

LLM_PROBABILITY_FLOOR = 1e-12


def renormalise(log_probs: Floats) -> np.ndarray:
    """Log-probabilities [S] renormalised to sum to one on the support, in nats."""
    x = np.asarray(log_probs, dtype=np.float64)
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def entropy(log_probs: Floats) -> float:
    """Entropy in nats of p_S renormalised on the support (S2T paper, entropy trigger)."""
    log_p = renormalise(log_probs)
    return float(-(np.exp(log_p) * np.maximum(log_p, -1e9)).sum())


def margin(log_probs: Floats) -> float:
    """1 - (p_1 - p_2) of p_S renormalised on the support: 0 when sure, 1 when the best two tie."""
    p = np.exp(renormalise(log_probs))
    return float(1.0 - (p[0] - (p[1] if len(p) > 1 else 0.0)))


def kl(slm_log_probs: Floats, llm_log_probs: Floats, reverse: bool = False) -> float:
    """D_KL(p_S || p_L) in nats, both renormalised on the SLM's support; ids with p_L <= 1e-12 are left out
    (S2T paper's code). `reverse` gives D_KL(p_L || p_S) (the direction of the paper's figure)."""
    log_s, log_l = renormalise(slm_log_probs), renormalise(llm_log_probs)
    keep = np.exp(log_l) > LLM_PROBABILITY_FLOOR
    log_s, log_l = log_s[keep], log_l[keep]
    p, difference = (np.exp(log_l), log_l - log_s) if reverse else (np.exp(log_s), log_s - log_l)
    return float((p * difference).sum())


def random_signal(seed: int, step: int) -> float:
    """A uniform number in [0, 1) that depends on the sequence's seed and the step only, never on the batch."""
    return float(np.random.default_rng([seed & 0xFFFFFFFF, step]).random())


def slm_signal(trigger: Trigger, support: Support, seed: int, step: int) -> float | None:
    """The signal of a trigger that needs no LLM; None for the KL triggers (and `never`/`always`)."""
    if trigger is Trigger.ENTROPY:
        return entropy(support.log_probs)
    if trigger is Trigger.MARGIN:
        return margin(support.log_probs)
    if trigger is Trigger.RANDOM:
        return random_signal(seed, step)
    return None


def step_signal(step: Step, trigger: Trigger) -> float:
    """The value of a trigger at a finished Step that kept its support (and, for KL, the LLM's scores)."""
    assert step.support is not None
    if trigger.needs_llm:
        assert step.llm is not None
        return kl(step.support.log_probs, step.llm.log_probs, reverse=trigger is Trigger.KL_REVERSE)
    signal = slm_signal(trigger, step.support, 0, step.index)
    assert signal is not None
    return signal


def triggers(policy: Policy, signal: float | None, step: int) -> bool:
    """Whether step `step` (0-based) is a divergence point: signal strictly above the threshold, after warm-up.

    `always` has no signal that could be unreliable early on, so it ignores the warm-up: with K = |V| it must
    equal the LLM's greedy answer from the first token (DESIGN law 1).
    """
    if policy.trigger is Trigger.ALWAYS:
        return True
    if policy.trigger is Trigger.NEVER or step < policy.warmup_steps:
        return False
    assert signal is not None
    return signal > policy.threshold


def may_trigger(policy: Policy, step: int) -> bool:
    """Whether the signal of this step matters at all (outside warm-up)."""
    if policy.trigger is Trigger.ALWAYS:
        return True
    return policy.trigger is not Trigger.NEVER and step >= policy.warmup_steps


def candidate_count(rule: CandidateRule, log_probs: Floats) -> int:
    """How many of the SLM's top ids are candidates: K, or those with p >= ratio * p_max (at most K, at least 1)."""
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
        raise InvalidRequestError(f"candidates={rule.k}: must be 1..{MAX_CANDIDATES}")
    if not 0.0 <= rule.ratio <= 1.0:
        raise InvalidRequestError(f"candidate_ratio={rule.ratio}: must be 0 (fixed K) or in (0, 1]")
    if not np.isfinite(policy.threshold):
        raise InvalidRequestError(f"threshold={policy.threshold}: must be a finite number")


def check_budget(budget: float) -> float:
    """A budget is a share of steps in (0, 1].

    Raises:
        InvalidRequestError: otherwise.
    """
    if not 0.0 < budget <= 1.0:
        raise InvalidRequestError(f"budget={budget}: must be above 0 and at most 1 (0.01 means 1 % of the steps)")
    return budget


def threshold_for(budget: float, signals: Floats, steps: int | None = None) -> float:
    """The threshold whose trigger rate is `budget`: at most `budget * steps` of `signals` lie strictly above it.

    `signals`: of the steps after warm-up; `steps`: all steps, warm-up included (default: len(signals)), since the
    budget is a share of all output tokens.
    """
    check_budget(budget)
    if not len(signals):
        raise InvalidRequestError("no signals to calibrate on: the rollouts have no step after the warm-up; "
                                  "use more or longer training prompts")
    ordered = np.sort(np.asarray(signals, dtype=np.float64))[::-1]
    allowed = int(budget * (steps if steps is not None else len(ordered)) + 1e-9)  # 0.29 * 100 is 28.999... in floats
    if allowed >= len(ordered):
        return float(ordered[-1]) - 1e-6
    return float(ordered[allowed])


BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
CALIBRATED = (Trigger.ENTROPY, Trigger.MARGIN, Trigger.KL, Trigger.KL_REVERSE)


@dataclass(frozen=True)
class Calibration:
    """Budget -> threshold, per trigger, measured on rollouts of training prompts. Stored with a model version.

    >>> Calibration({Trigger.ENTROPY: {0.01: 1.2, 0.1: 0.4}}).threshold(Trigger.ENTROPY, 0.01)
    1.2
    """

    thresholds: Mapping[Trigger, Mapping[float, float]]

    @classmethod
    def measure(cls, rollouts: Iterable[Sequence[Step]]) -> Calibration:
        """From greedy SLM rollouts scored by the LLM (without LLM scores the KL triggers stay uncalibrated).

        Raises:
            InvalidRequestError: no rollout is longer than the warm-up.
        """
        answers = list(rollouts)
        steps = [step for answer in answers for step in answer[WARMUP_STEPS:]]
        total = sum(len(answer) for answer in answers)
        with_llm = bool(steps) and all(step.llm is not None for step in steps)
        return cls({trigger: {budget: threshold_for(budget, signals, total) for budget in BUDGETS}
                    for trigger in CALIBRATED if with_llm or not trigger.needs_llm
                    for signals in [[step_signal(step, trigger) for step in steps]]})

    def threshold(self, trigger: Trigger, budget: float) -> float:
        """Interpolated between the measured budgets (0 where the trigger needs none).

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
            raise ConfigError(f"trigger {trigger.value!r} has no calibrated thresholds; give a threshold, or calibrate "
                              "with an LLM configured")
        table = sorted(self.thresholds[trigger].items())
        return float(np.interp(np.log(budget), [np.log(b) for b, _ in table], [t for _, t in table]))

    def or_else(self, other: Calibration) -> Calibration:
        """This calibration, and `other` for the triggers it lacks."""
        return Calibration({**other.thresholds, **self.thresholds})

    def to_json(self) -> str:
        return json.dumps({t.value: {str(b): x for b, x in table.items()} for t, table in self.thresholds.items()})

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Raises ValueError: not a calibration."""
        return cls({Trigger(t): {float(b): float(x) for b, x in table.items()}
                    for t, table in json.loads(text).items()})
