"""What the label lake holds: how much, of what, and how often the LLM's choice is among the SLM's
first K (Hit@K) at the positions that a trigger would pick. One pass, constant memory but for the
problems' names. Pure numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.types import WARMUP_STEPS

HIT_AT = (1, 2, 4, 8)
TOP_SHARES = (0.01, 0.05, 0.10)
BINS, LOWEST, HIGHEST = 8192, 1e-7, 1e3  # of a signal in nats, in equal ratios of 0.3 %


class _Signal:
    """Positions by the strength of one signal: how many, and how many of them hit at each K."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS, dtype=np.int64)
        self._hits = np.zeros((BINS, len(HIT_AT)), dtype=np.int64)

    def add(self, values: np.ndarray, hits: np.ndarray) -> None:
        """values: [n] nats; hits: [n, 4] bool."""
        place = (
            np.log(np.clip(values, LOWEST, HIGHEST) / LOWEST)
            / math.log(HIGHEST / LOWEST)
            * (BINS - 1)
        )
        np.add.at(self._counts, place.astype(np.int64), 1)
        np.add.at(self._hits, place.astype(np.int64), hits)

    def hit_at(self, positions: int) -> dict[int, float | None]:
        """Hit@K of the `positions` strongest; of those that tie in the last bin, the mean."""
        above = np.minimum(np.cumsum(self._counts[::-1]), positions)
        taken = np.diff(above, prepend=0)
        share = taken / np.maximum(self._counts[::-1], 1)
        found = share @ self._hits[::-1]
        total = int(taken.sum())
        return {k: float(found[i] / total) if total else None for i, k in enumerate(HIT_AT)}


@dataclass(kw_only=True)
class LabelStats:
    """Figures of a lake. `pairs`: labels by "SLM digest / LLM digest"; `answer_tokens`: of all
    rollouts; `positions`: of those, scored ones. `mass`: the LLM's mean probability on a label's
    candidates. `hits`: Hit@K by which positions ("all", "labelled", "kl top 1 %", ...); None where
    there are none. A top share counts all scored positions and takes none of the warm-up, as a
    budget does. Times are Unix seconds."""

    shards: int = 0
    bytes: int = 0
    rollouts: int = 0
    labels: int = 0
    held_out_labels: int = 0
    problems: int = 0
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
        bytes=sum(s.bytes for s in shards),
        oldest=min((s.first for s in shards), default=None),
        newest=max((s.last for s in shards), default=None),
    )
    tasks, sources, pairs = Counter[str](), Counter[str](), Counter[str]()
    problems: set[int] = set()
    every, labelled, by_kl, by_entropy = _Signal(), _Signal(), _Signal(), _Signal()
    mass = 0.0
    for rollout in lake.rollouts():
        count = len(rollout.labels)
        stats.rollouts += 1
        stats.labels += count
        stats.held_out_labels += count * rollout.held_out
        stats.answer_tokens += len(rollout.token_ids) - rollout.prompt_length
        stats.positions += len(rollout.llm_top_rank)
        tasks[rollout.task] += count
        sources[rollout.source] += count
        pairs[f"{rollout.slm_digest} / {rollout.llm_digest}"] += count
        problems.add(hash((rollout.task, rollout.problem)))
        mass += sum(label.mass for label in rollout.labels)
        _add_positions(rollout, every, by_kl, by_entropy)
        ranks = np.asarray([label.llm_top_rank for label in rollout.labels], dtype=np.int64)
        labelled.add(np.ones(count), _hits(ranks))
    stats.problems, stats.mass = len(problems), mass / stats.labels if stats.labels else None
    stats.tasks, stats.sources, stats.pairs = dict(tasks), dict(sources), dict(pairs)
    stats.hits = {"all": every.hit_at(stats.positions), "labelled": labelled.hit_at(stats.labels)}
    for name, signal in (("kl", by_kl), ("entropy", by_entropy)):
        for share in TOP_SHARES:
            stats.hits[f"{name} top {share:.0%}"] = signal.hit_at(
                max(1, int(share * stats.positions))
            )
    return stats


def _add_positions(rollout: Rollout, every: _Signal, by_kl: _Signal, by_entropy: _Signal) -> None:
    hits = _hits(np.asarray(rollout.llm_top_rank, dtype=np.int64))
    every.add(np.ones(len(hits)), hits)
    by_kl.add(np.asarray(rollout.kl)[WARMUP_STEPS:], hits[WARMUP_STEPS:])
    by_entropy.add(np.asarray(rollout.entropy)[WARMUP_STEPS:], hits[WARMUP_STEPS:])


def _hits(ranks: np.ndarray) -> np.ndarray:
    """[n] ranks -> [n, 4] bool."""
    hits: np.ndarray = (ranks[:, None] >= 0) & (ranks[:, None] < np.asarray(HIT_AT))
    return hits
