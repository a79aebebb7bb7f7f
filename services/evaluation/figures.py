"""Counts an evaluation's records: accuracy with intervals, gains, cost, local sufficiency."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from s2t_shared.statistics import clustered_difference, hit_at, spearman, wilson_interval
from s2t_shared.types import WARMUP_STEPS, Mode, Usage
from services.evaluation.journal import Journal, ScoredChoices, ScoredRollout
from services.evaluation.modes import ModeSpec
from services.evaluation.problems import Problem
from services.evaluation.records import Decision, Record

HIT_AT = (1, 2, 4, 8, 16)
SHARES = (0.01, 0.05, 0.1)  # of steps, by KL or by entropy
DEPTH_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mode's figures.

    records: by problem, then sample. clusters: the problems' groups, or each its own. seconds: wall
    time of all answers; None where not all of them were timed.
    """

    spec: ModeSpec
    records: tuple[tuple[Record, ...], ...]
    clusters: tuple[str, ...]
    seconds: float | None

    @property
    def label(self) -> str:
        return self.spec.label

    @cached_property
    def correct(self) -> tuple[bool, ...]:
        """By problem; with several samples, whether any is right."""
        return tuple(any(record.correct for record in samples) for samples in self.records)

    @cached_property
    def usage(self) -> Usage:
        return sum((record.usage for record in self._flat()), Usage())

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(sum(self.correct), len(self.correct))

    @property
    def trigger_rate(self) -> float:
        return self.usage.triggers / max(1, self.usage.completion_tokens)

    @property
    def flip_rate(self) -> float:
        """Share of the triggers that changed the token."""
        return self.usage.flips / max(1, self.usage.triggers)

    @property
    def llm_forwards_per_token(self) -> float:
        return self.usage.llm_forwards / max(1, self.usage.completion_tokens)

    @property
    def llm_read_per_token(self) -> float:
        """Tokens of the answers that the LLM read, per token."""
        return sum(record.llm_read for record in self._flat()) / max(
            1, self.usage.completion_tokens
        )

    @property
    def truncated(self) -> int:
        return sum(record.truncated for record in self._flat())

    @property
    def failed(self) -> int:
        return sum(bool(record.error) for record in self._flat())

    def gain_over(self, other: Row) -> tuple[float, float]:
        """Difference in accuracy on the same problems, and the half width of its 95 % interval, by
        group."""
        return clustered_difference(self.correct, other.correct, self.clusters)

    def rescues_and_harms(self, other: Row) -> tuple[int, int]:
        """Problems that only this row has right, and that only the other one has."""
        pairs = list(zip(self.correct, other.correct, strict=True))
        return pairs.count((True, False)), pairs.count((False, True))

    def decisions(self) -> list[Decision]:
        return [decision for record in self._flat() for decision in record.decisions]

    def _flat(self) -> Iterable[Record]:
        return (record for samples in self.records for record in samples)


def row_of(spec: ModeSpec, problems: Sequence[Problem], journal: Journal) -> Row:
    """A row's figures. Every problem has been asked."""
    records = []
    for problem in problems:
        keys = [(spec.label, problem.id, sample) for sample in range(spec.samples)]
        records.append(tuple(journal.records[key] for key in keys))
    count = len(problems) * spec.samples
    seconds = journal.seconds.get(spec.label)
    return Row(
        spec=spec,
        records=tuple(records),
        clusters=tuple(problem.group or problem.id for problem in problems),
        seconds=seconds if journal.timed.get(spec.label) == count else None,
    )


def beside_takeover(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of `s2t`, each with the takeover at the same divergence points' trigger and budget."""
    found = []
    for row in rows:
        for other in rows:
            same = (row.spec.trigger, row.spec.budget) == (other.spec.trigger, other.spec.budget)
            if same and row.spec.mode is Mode.S2T and other.spec.mode is Mode.TAKEOVER:
                found.append((row, other))
    return found


def mcnemar(rescues: int, harms: int) -> float:
    """Two-sided p of the exact McNemar test: rescues and harms are equally likely."""
    n = rescues + harms
    if n == 0:
        return 1.0
    fewer = min(rescues, harms)
    below = sum(math.comb(n, i) for i in range(fewer + 1))
    return float(min(1.0, 2 * below / 2**n))


def by_task(row: Row, problems: Sequence[Problem]) -> dict[str, tuple[int, int]]:
    """Right answers and problems of each task, in the problems' order."""
    found: dict[str, tuple[int, int]] = {}
    for problem, is_right in zip(problems, row.correct, strict=True):
        right, count = found.get(problem.task, (0, 0))
        found[problem.task] = (right + is_right, count + 1)
    return found


# -- local sufficiency ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sufficiency:
    """How often the LLM's first choice is among the SLM's first K.

    steps: that were scored. by_kl, by_entropy: {share of steps: {K: rate}}, at the top steps by
    that signal. all_steps: {K: rate}. by_depth: of the top steps by KL, by quarter of the answer:
    how many there are, and {K: rate}; {} for none. local: by row of a local selector.
    """

    steps: int
    by_kl: dict[float, dict[int, float]]
    by_entropy: dict[float, dict[int, float]]
    all_steps: dict[int, float]
    by_depth: tuple[tuple[int, dict[int, float]], ...]
    local: dict[str, LocalChoices] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalChoices:
    """A local selector's choices beside the LLM's, at its own divergence points.

    hit_failures: the LLM's first choice is no candidate. selection_failures: it is one, and another
    was chosen. slm_agreed: it is the SLM's first candidate. order: mean Spearman's rho of the
    selector's and the LLM's order of the candidates; None where it is not known.
    """

    steps: int
    hit_failures: int
    selection_failures: int
    slm_agreed: int
    order: float | None = None

    @property
    def agreed(self) -> int:
        return self.steps - self.hit_failures - self.selection_failures

    def figures(self) -> dict[str, Any]:
        return {**asdict(self), "agreed": self.agreed}


def local_choices(rollouts: Sequence[ScoredChoices]) -> LocalChoices:
    """Counts of scored answers of one row."""
    pairs = [
        pair for rollout in rollouts for pair in zip(rollout.rank, rollout.chosen, strict=True)
    ]
    orders = [rho for rollout in rollouts for rho in rollout.order]
    return LocalChoices(
        steps=len(pairs),
        hit_failures=sum(rank < 0 for rank, _ in pairs),
        selection_failures=sum(0 <= rank != chosen for rank, chosen in pairs),
        slm_agreed=sum(rank == 0 for rank, _ in pairs),
        order=sum(orders) / len(orders) if orders else None,
    )


def sufficiency(
    rollouts: Sequence[ScoredRollout], local: Mapping[str, LocalChoices] = MappingProxyType({})
) -> Sufficiency:
    """Hit@K of scored rollouts. Warm-up steps are left out: they never trigger in decoding."""
    kl: list[float] = []
    entropy: list[float] = []
    ranks: list[int] = []
    quarters: list[int] = []
    total = 0
    for rollout in rollouts:
        length = len(rollout.rank)
        total += length
        kl += rollout.kl[WARMUP_STEPS:]
        entropy += rollout.entropy[WARMUP_STEPS:]
        ranks += rollout.rank[WARMUP_STEPS:]
        quarters += [4 * step // length for step in range(WARMUP_STEPS, length)]

    def top(signal: Sequence[float], share: float) -> list[int]:
        order = sorted(range(len(ranks)), key=lambda i: -signal[i])
        return order[: max(1, int(share * total))]

    def hits(places: Sequence[int]) -> dict[int, float]:
        return hit_at([ranks[i] for i in places], HIT_AT)

    divergent = top(kl, DEPTH_SHARE)
    by_depth = []
    for quarter in range(4):
        places = [i for i in divergent if quarters[i] == quarter]
        by_depth.append((len(places), hits(places) if places else {}))
    return Sufficiency(
        steps=total,
        by_kl={share: hits(top(kl, share)) for share in SHARES},
        by_entropy={share: hits(top(entropy, share)) for share in SHARES},
        all_steps=hits(range(len(ranks))),
        by_depth=tuple(by_depth),
        local=dict(local),
    )


# -- divergence points ----------------------------------------------------------------------------


def positions(row: Row, bins: int = 10) -> list[int]:
    """How many triggers fall into each tenth of the answers."""
    counts = [0] * bins
    for samples in row.records:
        for record in samples:
            length = max(1, record.usage.completion_tokens)
            for decision in record.decisions:
                counts[min(bins - 1, bins * decision.index // length)] += 1
    return counts


def order_agreement(row: Row) -> float | None:
    """Mean Spearman's rho of the SLM's and the LLM's order of the candidates; None: not known."""
    found = []
    for decision in row.decisions():
        slm = [c.slm for c in decision.candidates if c.slm is not None]
        llm = [c.llm for c in decision.candidates if c.llm is not None]
        if len(slm) == len(llm) == len(decision.candidates) > 1:
            found.append(spearman(slm, llm))
    return sum(found) / len(found) if found else None
