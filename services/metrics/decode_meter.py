"""Counts what an engine decides, from the Steps that it hands out.

Knows Steps and sequences; runs on the engine's thread, and only adds to numbers there. Whoever
reads them does so from any thread, between two additions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.types import ChosenBy, Mode, Step
from services.metrics.registry import Distribution, Reading
from services.metrics.table import TABLE


def _distribution(name: str) -> Distribution:
    return Distribution(TABLE[name].buckets)


@dataclass
class ModeCounts:
    """What was counted of one mode."""

    prompt_tokens: int = 0
    tokens: Counter[ChosenBy] = field(default_factory=Counter)
    triggers: int = 0
    flips: int = 0
    degraded: int = 0
    parked: int = 0
    llm_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    first_token: Distribution = field(
        default_factory=lambda: _distribution("s2t_time_to_first_token_seconds")
    )
    between_tokens: Distribution = field(
        default_factory=lambda: _distribution("s2t_inter_token_latency_seconds")
    )
    queued: Distribution = field(default_factory=lambda: _distribution("s2t_queue_time_seconds"))


@dataclass
class _Seen:
    """What is counted already of a sequence. last_at: when its last token came, None before one.
    parks: whether it waits for the LLM at each divergence point. is_llms: whether at each token."""

    counts: ModeCounts
    parks: bool
    is_llms: bool
    last_at: float | None = None
    llm_forwards: int = 0
    drafted: int = 0
    accepted: int = 0


class DecodeMeter:
    """The counts of one engine, by mode."""

    def __init__(self) -> None:
        self._modes: dict[Mode, ModeCounts] = {}
        self._seen: dict[LiveSequence, _Seen] = {}
        self._compared = Counter[str]()
        self._agreed = Counter[str]()

    def count(
        self, sequence: LiveSequence, steps: Sequence[Step], arrived_at: float, now: float
    ) -> None:
        """Count what a sequence got in one step of the engine; its end, too.

        arrived_at, now: seconds on the engine's clock.
        """
        seen = self._seen.get(sequence)
        if seen is None:
            seen = self._begin(sequence, arrived_at)
        if steps:
            self._count_time(sequence, seen, len(steps), arrived_at, now)
            self._count_steps(seen, steps)
        self._count_llm(sequence, seen)
        if sequence.finish_reason is not None:
            del self._seen[sequence]

    def forget(self, sequence: LiveSequence) -> None:
        """Of a sequence whose end nobody will tell."""
        self._seen.pop(sequence, None)

    def _begin(self, sequence: LiveSequence, arrived_at: float) -> _Seen:
        policy = sequence.request.options.policy
        counts = self._modes.setdefault(policy.mode, ModeCounts())
        if sequence.started_at is not None:
            counts.prompt_tokens += len(sequence.request.token_ids)
            counts.queued.observe(max(0.0, sequence.started_at - arrived_at))
        parks = policy.mode in (Mode.S2T, Mode.TAKEOVER) and not policy.trigger.needs_llm
        seen = self._seen[sequence] = _Seen(
            counts,
            parks=parks,
            is_llms=policy.mode is Mode.LLM,
            llm_forwards=sequence.request.llm_forwards,
        )
        return seen

    @staticmethod
    def _count_time(
        sequence: LiveSequence, seen: _Seen, count: int, arrived_at: float, now: float
    ) -> None:
        counts = seen.counts
        if seen.last_at is not None:
            counts.between_tokens.observe((now - seen.last_at) / count, count)
        elif not sequence.request.decided:  # else its first token was another engine's
            counts.first_token.observe(now - arrived_at)
        seen.last_at = now

    def _count_steps(self, seen: _Seen, steps: Sequence[Step]) -> None:
        counts = seen.counts
        for step in steps:
            counts.tokens[step.chosen_by] += 1
            if step.degraded:
                counts.degraded += 1
            if step.triggered:
                counts.triggers += 1
                counts.flips += step.flipped
                counts.parked += seen.parks
                self._compare(step)
        if seen.is_llms:  # each token waits for it
            counts.parked += len(steps)

    def _compare(self, step: Step) -> None:
        """Whether the small models would have chosen as the LLM did, where both are known."""
        scores = step.llm.log_probs[: len(step.candidate_ids)] if step.llm is not None else ()
        if not scores:
            return
        chosen_id = step.candidate_ids[scores.index(max(scores))]
        self._compared["slm"] += 1
        self._agreed["slm"] += chosen_id == step.candidate_ids[0]
        if step.chosen_by is ChosenBy.LOCAL:
            self._compared["local"] += 1
            self._agreed["local"] += chosen_id == step.token_id

    @staticmethod
    def _count_llm(sequence: LiveSequence, seen: _Seen) -> None:
        counts = seen.counts
        counts.llm_forwards += sequence.llm_forwards - seen.llm_forwards
        counts.drafted += sequence.drafted - seen.drafted
        counts.accepted += sequence.accepted - seen.accepted
        seen.llm_forwards = sequence.llm_forwards
        seen.drafted = sequence.drafted
        seen.accepted = sequence.accepted

    # -- read from any thread ---------------------------------------------------------------------

    def readings(self) -> Iterator[Reading]:
        for mode, counts in list(self._modes.items()):
            yield from _of_mode(mode.value, counts)
        for chooser in ("slm", "local"):
            yield Reading("s2t_compared_selections_total", self._compared[chooser], (chooser,))
            yield Reading("s2t_agreed_selections_total", self._agreed[chooser], (chooser,))


def _of_mode(mode: str, counts: ModeCounts) -> Iterator[Reading]:
    for chosen_by, tokens in list(counts.tokens.items()):
        yield Reading("s2t_generation_tokens_total", tokens, (mode, chosen_by.value))
    values: dict[str, float | Distribution] = {
        "s2t_prompt_tokens_total": counts.prompt_tokens,
        "s2t_triggers_total": counts.triggers,
        "s2t_flips_total": counts.flips,
        "s2t_degraded_steps_total": counts.degraded,
        "s2t_parked_steps_total": counts.parked,
        "s2t_llm_forwards_total": counts.llm_forwards,
        "s2t_draft_tokens_total": counts.drafted,
        "s2t_accepted_draft_tokens_total": counts.accepted,
        "s2t_time_to_first_token_seconds": counts.first_token,
        "s2t_inter_token_latency_seconds": counts.between_tokens,
        "s2t_queue_time_seconds": counts.queued,
    }
    for name, value in values.items():
        yield Reading(name, value, (mode,))
