"""Statistics of the label lake: how much, of what, and Hit@K.

Hit@K is the share of positions where the LLM's choice is among the SLM's first K. It is given for
all positions, for the labelled ones, and for those that a trigger would pick. Reads the lake once,
in constant memory but for the problems' names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.statistics import HIT_AT, hits
from s2t_shared.types import WARMUP_STEPS

TOP_SHARES = (0.01, 0.05, 0.10)
# Histogram of a signal in nats: bins of equal ratio, 0.3 % wide.
BINS = 8192
LOWEST = 1e-7
HIGHEST = 1e3


class _Histogram:
    """Scored positions by the strength of one signal: how many, and how many hits at each K."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._hits = np.zeros((BINS, len(HIT_AT)), dtype=np.int64)

    def add(self, values: np.ndarray, hits: np.ndarray) -> None:
        """values: [n], nats; hits: [n, 4], bool."""
        ratios = np.clip(values, LOWEST, HIGHEST) / LOWEST
        scale = (BINS - 1) / math.log(HIGHEST / LOWEST)
        bins = (np.log(ratios) * scale).astype(np.int64)
        np.add.at(self._counts, bins, 1)
        np.add.at(self._hits, bins, hits)

    def hit_at(self, positions: int) -> dict[int, float | None]:
        """Hit@K of the `positions` strongest. Of those in the last bin the mean counts."""
        counts = self._counts[::-1]
        hits = self._hits[::-1]
        above = np.minimum(np.cumsum(counts), positions)
        taken = np.diff(above, prepend=0)
        total = int(taken.sum())
        if not total:
            return dict.fromkeys(HIT_AT)
        shares = taken / np.maximum(counts, 1)
        found = shares @ hits
        return {k: float(n / total) for k, n in zip(HIT_AT, found, strict=True)}


@dataclass(kw_only=True)
class LabelStats:
    """Figures of a lake. Times are Unix seconds; None where there is nothing to measure.

    answer_tokens: of all rollouts; positions: those of them that were scored.
    groups: of problems, which are held out together; without groups each problem is one.
    mass: mean probability that the LLM puts on the candidates of a label.
    tasks, sources: labels by name. pairs: labels by "SLM digest / LLM digest".
    hits: Hit@K by name of the positions ("all", "labelled", "kl top 1 %", ...). As with a budget, a
    top share is one of all scored positions, and none of the warm-up is among them.
    """

    shards: int = 0
    bytes: int = 0
    rollouts: int = 0
    labels: int = 0
    held_out_labels: int = 0
    problems: int = 0
    groups: int = 0
    held_out_groups: int = 0
    answer_tokens: int = 0
    positions: int = 0
    mass: float | None = None
    oldest: float | None = None
    newest: float | None = None
    tasks: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    hits: dict[str, dict[int, float | None]] = field(default_factory=dict)

    @property
    def label_share(self) -> float | None:
        """Labels per answer token."""
        return self.labels / self.answer_tokens if self.answer_tokens else None


def measure_labels(lake: Lake) -> LabelStats:
    """Read the whole lake once.

    Raises:
        StoreError: a shard is damaged.
    """
    shards = lake.shards()
    stats = LabelStats(
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        oldest=min((shard.first for shard in shards), default=None),
        newest=max((shard.last for shard in shards), default=None),
    )
    problems: set[int] = set()  # hashes of 64 bits, rather than the names
    groups: dict[int, bool] = {}  # hash of a group -> whether it is held out
    mass = 0.0
    found = _Hits()
    for rollout in lake.rollouts():
        _count(stats, rollout)
        problems.add(hash((rollout.task, rollout.problem)))
        groups[hash((rollout.task, rollout.split_group))] = rollout.held_out
        mass += sum(label.mass for label in rollout.labels)
        found.add(rollout)
    stats.problems = len(problems)
    stats.groups = len(groups)
    stats.held_out_groups = sum(groups.values())
    stats.mass = mass / stats.labels if stats.labels else None
    stats.hits = found.by_positions(stats.positions, stats.labels)
    return stats


def _count(stats: LabelStats, rollout: Rollout) -> None:
    labels = len(rollout.labels)
    stats.rollouts += 1
    stats.labels += labels
    stats.answer_tokens += len(rollout.token_ids) - rollout.prompt_length
    stats.positions += len(rollout.llm_top_rank)
    if rollout.held_out:
        stats.held_out_labels += labels
    _add(stats.tasks, rollout.task, labels)
    _add(stats.sources, rollout.source, labels)
    _add(stats.pairs, f"{rollout.slm_digest} / {rollout.llm_digest}", labels)


def _add(counts: dict[str, int], name: str, count: int) -> None:
    counts[name] = counts.get(name, 0) + count


class _Hits:
    """Histograms of all, of labelled, and of scored positions by KL and entropy."""

    def __init__(self) -> None:
        self._all = _Histogram()
        self._labelled = _Histogram()
        self._signals = {"kl": _Histogram(), "entropy": _Histogram()}

    def add(self, rollout: Rollout) -> None:
        found = hits(rollout.llm_top_rank)
        self._all.add(np.ones(len(found)), found)
        for name, histogram in self._signals.items():
            values = np.asarray(getattr(rollout, name))
            histogram.add(values[WARMUP_STEPS:], found[WARMUP_STEPS:])
        labelled = hits([label.llm_top_rank for label in rollout.labels])
        self._labelled.add(np.ones(len(labelled)), labelled)

    def by_positions(self, positions: int, labels: int) -> dict[str, dict[int, float | None]]:
        found = {
            "all": self._all.hit_at(positions),
            "labelled": self._labelled.hit_at(labels),
        }
        for name, histogram in self._signals.items():
            for share in TOP_SHARES:
                count = max(1, int(share * positions))
                found[f"{name} top {share:.0%}"] = histogram.hit_at(count)
        return found
