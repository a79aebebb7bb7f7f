"""Decides; never runs a model. Numbers in, decisions out: trigger signals, candidates, calibration.

All arrays are numpy float64 on the host, at most 64 wide, so nothing here is worth a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import MAX_CANDIDATES, CandidateRule, Policy, Support, Trigger

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
    allowed = int(budget * (steps if steps is not None else len(ordered)))
    if allowed >= len(ordered):
        return float(ordered[-1]) - 1e-6
    return float(ordered[allowed])
