"""What one answer asks of both models, by mode. Counts only: no seconds, no devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2t_shared.decode.sequence import VERIFICATION_COST

WARMUP_STEPS = 3  # never trigger


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The answers that a plan is for.

    prompt, new: mean tokens of a prompt, and of an answer. budget: share of steps that trigger.
    max_draft: drafted tokens per LLM call, at most (KL triggers). chunk: prompt tokens read per
    step.
    """

    prompt: float
    new: float
    budget: float
    max_draft: int = 32
    chunk: int = 4096

    @property
    def context(self) -> float:
        """Mean tokens that a token attends to."""
        return self.prompt + self.new / 2


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Of one answer, on average.

    slm_steps: forwards of the SLM that hold a token of it. slm_tokens: tokens that the SLM reads.
    watched: whether its steps may trigger. scorings: forwards that score candidates locally.
    queries: to the LLM. llm_tokens: that the LLM reads, if it keeps the context between queries.
    waits: share of the time of a query in which the answer stands still.
    """

    slm_steps: float
    slm_tokens: float
    watched: bool = False
    scorings: float = 0.0
    queries: float = 0.0
    llm_tokens: float = 0.0
    waits: float = 1.0


MODES = ("greedy", "s2t entropy", "s2t kl", "takeover entropy", "s2t_local entropy", "llm")


def demand_of(mode: str, traffic: Traffic) -> Demand:
    """The demand of one answer of P prompt and N new tokens at budget b.

    greedy     N steps; P + N tokens.
    s2t_local  b N triggers, each scored in one more step: N (1 + b) steps.
    s2t, takeover by entropy
               b N queries. The LLM reads everything up to the last trigger, and nothing where
               nothing triggers: P (1 - (1 - b)^N) + N - (1 - b) (1 - (1 - b)^N) / b tokens.
    s2t by KL  The SLM drafts n = sqrt(2 V / b) tokens, of which (1 - (1 - b)^n) / b stand; the LLM
               reads all that are drafted.
    llm        N queries; P + N tokens, none by the SLM.
    """
    kind, _, trigger = mode.partition(" ")
    prompt, new = traffic.prompt, traffic.new
    if kind == "llm":
        return Demand(slm_steps=0.0, slm_tokens=0.0, queries=new, llm_tokens=prompt + new)
    if kind == "greedy":
        return Demand(slm_steps=new, slm_tokens=prompt + new)
    triggers = traffic.budget * max(0.0, new - WARMUP_STEPS)
    if kind == "s2t_local":
        steps = new + triggers
        return Demand(slm_steps=steps, slm_tokens=prompt + steps, watched=True, scorings=triggers)
    if trigger == "kl":
        return _drafting(traffic)
    return Demand(
        slm_steps=new,
        slm_tokens=prompt + new,
        watched=True,
        queries=triggers,
        llm_tokens=read_to_last_trigger(traffic),
    )


def read_to_last_trigger(traffic: Traffic) -> float:
    """Tokens that the LLM reads of an answer whose steps trigger independently."""
    steps = max(0.0, traffic.new - WARMUP_STEPS)
    b = traffic.budget
    any_trigger = 1.0 - (1.0 - b) ** steps
    last = steps - (1.0 - b) * any_trigger / b
    return any_trigger * (traffic.prompt + WARMUP_STEPS) + last


def _drafting(traffic: Traffic) -> Demand:
    b, new = traffic.budget, traffic.new
    drafted = max(1.0, min(traffic.max_draft, new, math.sqrt(2 * VERIFICATION_COST / b)))
    stands = (1.0 - (1.0 - b) ** drafted) / b
    calls = new / stands
    tokens = calls * drafted
    drafts_on = drafted * b < 0.5  # as `LiveSequence` decides
    return Demand(
        slm_steps=tokens,
        slm_tokens=traffic.prompt + tokens,
        watched=True,
        queries=calls,
        llm_tokens=traffic.prompt + tokens,
        waits=0.5 if drafts_on else 1.0,
    )
