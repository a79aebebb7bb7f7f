"""Decides what happens to one next token. Pure functions on Steps; runs no model and keeps no
state."""

from __future__ import annotations

from enum import Enum

import numpy as np

from s2t_shared import policy as policies
from s2t_shared.decode.interfaces import Proposal
from s2t_shared.types import (
    ChosenBy,
    DecodeOptions,
    Mode,
    PositionScores,
    Step,
    Trigger,
)


class Next(Enum):
    """What a proposed token needs before it is decided."""

    EMIT = "emit"  # nothing
    DRAFT = "draft"  # the LLM verifies it later (KL triggers)
    ASK_LLM = "ask_llm"
    SELECT_LOCALLY = "select_locally"


def after_proposal(options: DecodeOptions, index: int, proposal: Proposal) -> tuple[Step, Next]:
    """The Step that the SLM's proposal makes, and what it needs."""
    policy = options.policy
    signal, triggered = divergence(options, index, proposal)
    then = Next.EMIT
    if triggered:
        then = Next.SELECT_LOCALLY if policy.mode is Mode.S2T_LOCAL else Next.ASK_LLM
    elif policy.trigger.needs_llm and policies.may_trigger(policy, index):
        then = Next.DRAFT
    drawn_id = proposal.drawn_id
    keeps_support = options.keep_support or options.score_rollout
    wants_support = keeps_support or then is not Next.EMIT
    step = Step(
        index=index,
        token_id=proposal.top_id if drawn_id is None else drawn_id,
        chosen_by=ChosenBy.SLM if drawn_id is None else ChosenBy.SAMPLER,
        triggered=triggered,
        signal=signal,
        slm_top_id=proposal.top_id,
        support=proposal.support if wants_support else None,
    )
    return step, then


def divergence(options: DecodeOptions, index: int, proposal: Proposal) -> tuple[float | None, bool]:
    """The signal of a trigger that needs no LLM, and whether the proposed token is at a divergence
    point by it."""
    policy = options.policy
    if proposal.drawn_id is not None or not policies.may_trigger(policy, index):
        return None, False
    if policy.trigger.needs_llm:
        return None, False
    signal = _signal(options, index, proposal)
    return signal, policies.exceeds(policy, signal)


def _signal(options: DecodeOptions, index: int, proposal: Proposal) -> float | None:
    """The signal of a trigger that needs no LLM, by the proposer or from the support."""
    if proposal.signal is not None:
        return proposal.signal
    support = proposal.support
    assert support is not None
    return policies.slm_signal(options.policy.trigger, support, options.sampling.seed, index)


def after_llm_scores(
    options: DecodeOptions, step: Step, scores: PositionScores
) -> tuple[Step, Next]:
    """The Step with the LLM's view of its position: EMIT, or SELECT_LOCALLY at a KL trigger."""
    policy = options.policy
    step = step.changed(llm=scores, llm_top_id=scores.top_id)
    if step.support is None:  # Mode.LLM: the SLM has proposed nothing
        return step.changed(token_id=scores.top_id, chosen_by=ChosenBy.LLM), Next.EMIT
    if policy.trigger.needs_llm:
        reverse = policy.trigger is Trigger.KL_REVERSE
        signal = policies.kl(step.support.log_probs, scores.log_probs, reverse=reverse)
        triggered = policies.triggers(policy, signal, step.index)
        step = step.changed(signal=signal, triggered=triggered)
        if not triggered:
            return step, Next.EMIT
        if policy.mode is Mode.S2T_LOCAL:
            return step, Next.SELECT_LOCALLY
    selected = _select(step, scores.log_probs[: candidate_count(options, step)], ChosenBy.LLM)
    if policy.mode is Mode.TAKEOVER:
        selected = selected.changed(token_id=scores.top_id)
    return selected, Next.EMIT


def after_local_scores(step: Step, scores: tuple[float, ...]) -> Step:
    """The Step with the local selector's choice."""
    return _select(step, scores, ChosenBy.LOCAL)


def candidate_count(options: DecodeOptions, step: Step) -> int:
    """How many of the support's ids are candidates."""
    assert step.support is not None
    return policies.candidate_count(options.policy.candidates, step.support.log_probs)


def finished(options: DecodeOptions, step: Step) -> Step:
    """The Step as it is handed out: support only where it is kept, with the figures over it."""
    if step.support is None:
        return step
    if not (step.triggered or options.score_rollout or options.keep_support):
        return step.changed(support=None)
    return with_figures(step)


def with_figures(step: Step) -> Step:
    """The Step with entropy and, where the LLM was asked, KL and the LLM's rank."""
    support = step.support
    assert support is not None
    if step.entropy is None:
        step = step.changed(entropy=policies.entropy(support.log_probs))
    if step.llm is None:
        return step
    return step.changed(
        kl=policies.kl(support.log_probs, step.llm.log_probs),
        llm_top_id=step.llm.top_id,
        llm_top_rank=policies.rank(step.llm.top_id, support.ids),
    )


def _select(step: Step, scores: tuple[float, ...], chosen_by: ChosenBy) -> Step:
    """The Step with its best-scored candidate; ties go to the SLM's order."""
    assert step.support is not None
    return step.changed(
        token_id=step.support.ids[int(np.argmax(scores))],
        chosen_by=chosen_by,
        candidate_ids=step.support.ids[: len(scores)] if step.triggered else (),
        scores=scores,
    )
