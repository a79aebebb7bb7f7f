"""The points of `s2t bench curve` as tables and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from s2t_shared.statistics import Z95, clustered_difference
from services.bench.curve import Point
from services.bench.curve_answers import PLAIN, SLM
from services.bench.measure import machine

Interval = tuple[float, float]  # mean, half width of its 95 % interval
Outcomes = Callable[[Point], Sequence[float]]  # of each problem


def tables(points: Sequence[Point], groups: Sequence[str]) -> list[Table]:
    """One table for each condition: a trigger at a budget. Without answers, one of agreement.

    "- plain" is the difference to plain distillation, "log p" the LLM's mean log-probability per
    token of the answers.

    groups: of each problem. Differences are paired. Their intervals are over groups and seeds.
    """
    conditions = conditions_of(points) or [""]
    return [_table(points, condition, groups) for condition in conditions]


def _table(points: Sequence[Point], condition: str, groups: Sequence[str]) -> Table:
    slm = next(p for p in points if p.name == SLM)
    title = f"{slm.test_labels} test labels, {len(groups)} problems\n{machine()}"
    if condition:
        title = f"{_spoken(condition)}: {title}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("way to answer", no_wrap=True)
    columns = ["labels", "seeds", "Agree@1", "accuracy", "- SLM alone", "- plain"]
    if slm.log_probs:
        columns += ["log p", "- SLM alone"]
    for column in (*columns, "s"):
        shown.add_column(column, justify="right", no_wrap=True)
    by_count = _by_count(points)
    for (_, count), seeds in by_count.items():
        first = seeds[0]
        plain = by_count.get((PLAIN, count), [])
        right: Outcomes = partial(Point.right, condition=condition)
        cells = [
            f"{first.labels:,}",
            str(len(seeds)),
            _agreement(seeds),
            _mean_of(seeds, right),
            "" if first.name == SLM else _minus(seeds, [slm], right, groups),
            "" if first.name == PLAIN else _minus(seeds, plain, right, groups),
        ]
        if slm.log_probs:
            likelihood: Outcomes = partial(Point.likelihood, condition=condition)
            cells.append(_mean_of(seeds, likelihood))
            cells.append("" if first.name == SLM else _minus(seeds, [slm], likelihood, groups))
        shown.add_row(first.name, *cells, f"{statistics.fmean(p.seconds for p in seeds):.0f}")
    return shown


def difference(
    new: Sequence[Sequence[float]], old: Sequence[Sequence[float]], groups: Sequence[str]
) -> Interval:
    """Mean of new - old over problems and seeds, and the half width of its 95 % interval.

    new, old: outcomes by seed and problem. The squared standard error is the sum of two: over
    groups of problems, of each problem's mean over the seeds; and over the seeds, of their means.
    """
    new_means = [statistics.fmean(column) for column in zip(*new, strict=True)]
    old_means = [statistics.fmean(column) for column in zip(*old, strict=True)]
    mean, half = clustered_difference(new_means, old_means, groups)
    squares = (half / Z95) ** 2
    for side in (new, old):
        if len(side) > 1:
            squares += statistics.variance(map(statistics.fmean, side)) / len(side)
    return mean, Z95 * math.sqrt(squares)


def draw(points: Sequence[Point], title: str, file: Path) -> None:
    """Write a PNG: training labels against Agree@1 and, where answered, against accuracy.

    The shade reaches from the least to the greatest seed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    conditions = conditions_of(points)
    panels = 1 + len(conditions)
    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False)
    agree = axes[0, 0]
    _panel(agree, points, lambda p: p.agree_at_1)
    agree.set_title(f"held-out Agree@1 ({points[0].test_labels} labels)", fontsize=9)
    problems = max((len(digits) for p in points for digits in p.correct.values()), default=0)
    for axis, condition in zip(axes[0, 1:], conditions, strict=True):
        _panel(axis, points, partial(Point.accuracy, condition=condition))
        axis.set_title(f"accuracy, {_spoken(condition)} ({problems} problems)", fontsize=9)
    axes[0, -1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def conditions_of(points: Sequence[Point]) -> list[str]:
    """Every condition once, in order of appearance."""
    return list(dict.fromkeys(name for p in points for name in p.correct if name))


# -- cells ----------------------------------------------------------------------------------------


def _agreement(seeds: Sequence[Point]) -> str:
    values = [(p.agree_at_1, p.half) for p in seeds if p.agree_at_1 is not None]
    if not values:
        return ""
    means = [statistics.fmean(column) for column in zip(*values, strict=True)]
    return f"{means[0]:.3f} ± {means[1]:.3f}"


def _mean_of(seeds: Sequence[Point], outcomes: Outcomes) -> str:
    answered = [statistics.fmean(outcomes(p)) for p in seeds if outcomes(p)]
    return f"{statistics.fmean(answered):.3f}" if answered else ""


def _minus(
    seeds: Sequence[Point], others: Sequence[Point], outcomes: Outcomes, groups: Sequence[str]
) -> str:
    new = [outcomes(p) for p in seeds if outcomes(p)]
    old = [outcomes(p) for p in others if outcomes(p)]
    if not new or not old:
        return ""
    mean, half = difference(new, old, groups)
    return f"{mean:+.3f} ± {half:.3f}"


def _spoken(condition: str) -> str:
    """For example "entropy 5 %"."""
    trigger, budget = condition.split()
    return f"{trigger} {100 * float(budget):g} %"


# -- the plot -------------------------------------------------------------------------------------


def _panel(axis: Any, points: Sequence[Point], value: Callable[[Point], float | None]) -> None:
    """Draw a line per name; a control that needs no labels is a horizontal one."""
    import matplotlib

    curves: dict[str, list[tuple[int, list[float]]]] = {}
    for (name, _), seeds in _by_count(points).items():
        values = [v for v in map(value, seeds) if v is not None]
        if values:
            curves.setdefault(name, []).append((seeds[0].labels, values))
    levels = iter(((0, (5, 2)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 1)), (0, (2, 3))))
    for name, curve in curves.items():
        labels, groups = zip(*curve, strict=True)
        means = [statistics.fmean(group) for group in groups]
        if labels[0] == 0:
            axis.axhline(means[0], linestyle=next(levels, ":"), color="gray", label=name)
            continue
        axis.plot(labels, means, marker="o", markersize=3, label=name)
        axis.fill_between(labels, list(map(min, groups)), list(map(max, groups)), alpha=0.15)
    axis.set_xscale("log")
    axis.set_xticks(sorted({p.labels for p in points if p.labels}))
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.minorticks_off()
    axis.set_xlabel("training labels", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _by_count(points: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """Points that differ only by seed, together."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.name, point.count), []).append(point)
    return groups
