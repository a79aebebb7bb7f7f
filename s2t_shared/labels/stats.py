"""Statistics of the label lake: how much, of what, and Hit@K.

Hit@K is the share of positions where the LLM's choice is among the SLM's first K. It is given for
all positions, for the labelled ones, and for those that a trigger would pick. Reads some columns of
the lake, each once, in bounded memory; shards may be counted on several machines.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from s2t_shared.labels.keys import Keys, Repeats, mixed
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.reader import Reader
from s2t_shared.labels.rows import PART, PROMPT_KEY, Rows
from s2t_shared.statistics import HIT_AT
from s2t_shared.types import SUPPORT_SIZE, WARMUP_STEPS

TOP_SHARES = (0.01, 0.05, 0.10)
# Histogram of a signal in nats: bins of equal ratio, 0.3 % wide.
BINS = 8192
LOWEST = 1e-7
HIGHEST = 1e3
# By rank + 1: the place in HIT_AT of the first K that holds the rank, len(HIT_AT) for none.
FIRST_HIT = np.searchsorted(HIT_AT, np.arange(-1, SUPPORT_SIZE), side="right")
FIRST_HIT[0] = len(HIT_AT)
NAMES = {"tasks": ("task",), "sources": ("source",), "pairs": ("slm_digest", "llm_digest")}
COLUMNS = (
    "task",
    "group",
    "problem_id",
    PROMPT_KEY,
    PART,
    "source",
    "slm_digest",
    "llm_digest",
    "token_ids",
    "prompt_length",
    "entropy",
    "kl",
    "llm_top_rank",
    "labels.mass",
    "labels.llm_top_rank",
)


class _Histogram:
    """Scored positions by the strength of one signal and by the first K that holds the LLM's
    choice."""

    def __init__(self) -> None:
        self._counts = np.zeros((BINS, len(HIT_AT) + 1), dtype=np.int64)

    def add(self, values: np.ndarray, first_hits: np.ndarray) -> None:
        """values: [n], nats; first_hits: [n], as FIRST_HIT gives them."""
        ratios = np.clip(values, LOWEST, HIGHEST) / np.float32(LOWEST)
        scale = np.float32((BINS - 1) / math.log(HIGHEST / LOWEST))
        bins = (np.log(ratios) * scale).astype(np.int64)
        cells = bins * self._counts.shape[1] + first_hits
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)

    def join(self, other: _Histogram) -> None:
        self._counts += other._counts

    def hit_at(self, positions: int) -> dict[int, float | None]:
        """Hit@K of the `positions` strongest. Of those in the last bin the mean counts."""
        counts = self._counts[::-1].sum(1)
        hits = self._counts[::-1].cumsum(1)[:, : len(HIT_AT)]
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


def measure_labels(lake: Lake, run: Run = map) -> LabelStats:
    """Read what the figures need of the lake.

    run: applies a function to readers of one shard each, as `map` does; elsewhere, if it likes, and
    in any order.

    Raises:
        StoreError: a shard is damaged.
    """
    reader = lake.reader()
    shards = reader.shards
    stats = LabelStats(
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        oldest=min((shard.first for shard in shards), default=None),
        newest=max((shard.last for shard in shards), default=None),
    )
    counted = _Counted()
    for counts in run(count_shard, map(reader.part, range(len(shards)))):
        counted.add(counts)
    counted.fill(stats)
    return stats


def count_shard(part: Reader) -> Counts:
    """What counts of a reader's first shard."""
    return Counts.of(part.read(0, COLUMNS))


@dataclass(frozen=True)
class Counts:
    """Of one shard. problems, groups, held_out_groups: their keys, each once."""

    figures: dict[str, int]
    by_name: dict[str, Counter[tuple[str, ...]]]
    problems: Keys
    groups: Keys
    held_out_groups: Keys
    mass: float
    hits: _Hits

    @classmethod
    def of(cls, rows: Rows) -> Counts:
        held_out = rows.numbers(PART) != 0
        figures = {
            "rollouts": len(rows),
            "labels": rows.label_counts.sum(),
            "held_out_labels": rows.label_counts[held_out].sum(),
            "answer_tokens": (rows.lengths("token_ids") - rows.numbers("prompt_length")).sum(),
            "positions": rows.lengths("llm_top_rank").sum(),
        }
        problems = _pick(rows, "problem_id", rows.numbers(PROMPT_KEY))
        groups = _pick(rows, "group", problems)
        hits = _Hits()
        hits.count(rows)
        return cls(
            figures={name: int(figure) for name, figure in figures.items()},
            by_name={name: rows.labels_by(*of) for name, of in NAMES.items()},
            problems=np.unique(problems),
            groups=np.unique(groups),
            held_out_groups=np.unique(groups[held_out]),
            mass=float(rows.of_labels("mass").sum(dtype=np.float64)),
            hits=hits,
        )


Run = Callable[[Callable[[Reader], Counts], Iterable[Reader]], Iterable[Counts]]


class _Counted:
    """What was counted of all shards together."""

    def __init__(self) -> None:
        self._figures = Counter[str]()
        self._by_name = {name: Counter[tuple[str, ...]]() for name in NAMES}
        self._problems = _Distinct()
        self._groups = _Distinct()
        self._held_out_groups = _Distinct()
        self._mass = 0.0
        self._hits = _Hits()

    def add(self, counts: Counts) -> None:
        self._figures.update(counts.figures)
        for name, labels in counts.by_name.items():
            self._by_name[name] += labels
        self._problems.add(counts.problems)
        self._groups.add(counts.groups)
        self._held_out_groups.add(counts.held_out_groups)
        self._mass += counts.mass
        self._hits.add(counts.hits)

    def fill(self, stats: LabelStats) -> None:
        for name, figure in self._figures.items():
            setattr(stats, name, figure)
        for name, counts in self._by_name.items():
            setattr(stats, name, {" / ".join(key): count for key, count in counts.items()})
        stats.problems = self._problems.count()
        stats.groups = self._groups.count()
        stats.held_out_groups = self._held_out_groups.count()
        stats.mass = self._mass / stats.labels if stats.labels else None
        stats.hits = self._hits.by_positions(stats.positions, stats.labels)


def _pick(rows: Rows, name: str, others: Keys) -> Keys:
    """Keys of a column of texts within their task; where a text is empty, of `others`."""
    own = mixed(rows.keys(name) ^ mixed(rows.keys("task")))
    return np.where(rows.equal(name, ""), others, own)


class _Distinct:
    """Counts distinct keys in bounded memory. Those that are added together are distinct."""

    def __init__(self) -> None:
        self._repeats = Repeats()
        self._seen = 0

    def add(self, keys: Keys) -> None:
        self._repeats.add(keys, self._seen + np.arange(len(keys)))
        self._seen += len(keys)

    def count(self) -> int:
        self._repeats.repeats()
        return self._repeats.distinct


class _Hits:
    """Histograms of all, of labelled, and of scored positions by KL and entropy."""

    def __init__(self) -> None:
        self._all = _Histogram()
        self._labelled = _Histogram()
        self._signals = {"kl": _Histogram(), "entropy": _Histogram()}

    def add(self, other: _Hits) -> None:
        self._all.join(other._all)
        self._labelled.join(other._labelled)
        for name, histogram in self._signals.items():
            histogram.join(other._signals[name])

    def count(self, rows: Rows) -> None:
        lengths = rows.lengths("llm_top_rank")
        found = FIRST_HIT[rows.values("llm_top_rank") + 1]
        self._all.add(np.ones(len(found), np.float32), found)
        within = np.arange(len(found)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        is_warm = within >= WARMUP_STEPS
        for name, histogram in self._signals.items():
            histogram.add(rows.values(name)[is_warm], found[is_warm])
        labelled = FIRST_HIT[rows.of_labels("llm_top_rank") + 1]
        self._labelled.add(np.ones(len(labelled), np.float32), labelled)

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
