"""The points of `s2t bench curve` as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from s2t_shared.statistics import paired_difference
from services.bench.curve import SLM, Point
from services.bench.measure import machine

Interval = tuple[float, float]  # mean, half width of its 95 % interval


def table(points: Sequence[Point]) -> Table:
    """One row per selector and number of labels: means over the seeds.

    The intervals are of one seed, over problems. Gains are paired, over the SLM alone.
    """
    budgets = _budgets(points)
    slm = next(p for p in points if p.name == SLM)
    problems = len(slm.correct.get("", ""))
    title = f"{slm.test_labels} test labels, {problems} problems\n{machine()}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("selector", no_wrap=True)
    for column in ("labels", "Agree@1", "gain", *map(_accuracy_at, budgets), "s"):
        shown.add_column(column, justify="right", no_wrap=True)
    for seeds in _by_count(points).values():
        shown.add_row(
            seeds[0].name,
            f"{seeds[0].labels:,}",
            _mean([(p.agree_at_1, p.half) for p in seeds]),
            "" if seeds[0].name == SLM else _mean([(p.gain, p.gain_half) for p in seeds], "+"),
            *(_accuracy_cell(seeds, slm, budget) for budget in budgets),
            f"{statistics.fmean(p.seconds for p in seeds):.0f}",
        )
    return shown


def draw(points: Sequence[Point], title: str, file: Path) -> None:
    """Write a PNG: training labels against Agree@1 and, where answered, against accuracy.

    The shade reaches from the least to the greatest seed.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    budgets = _budgets(points)
    panels = 1 + len(budgets)
    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False)
    agree = axes[0, 0]
    _panel(agree, points, lambda p: p.agree_at_1)
    agree.set_title(f"held-out Agree@1 ({points[0].test_labels} labels)", fontsize=9)
    agree.legend(fontsize=7)
    problems = max((len(digits) for p in points for digits in p.correct.values()), default=0)
    for axis, budget in zip(axes[0, 1:], budgets, strict=True):
        _panel(axis, points, partial(Point.accuracy, budget=budget))
        axis.set_title(f"{_accuracy_at(budget)} ({problems} problems)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _accuracy_cell(seeds: Sequence[Point], slm: Point, budget: str) -> str:
    """Accuracy and, in brackets, its paired gain over the SLM alone; "" if not answered."""
    answered = [p for p in seeds if p.accuracy(budget) is not None]
    if not answered:
        return ""
    mean = statistics.fmean(p.accuracy(budget) or 0.0 for p in answered)
    if answered[0].name == SLM:
        return f"{mean:.3f}"
    slm_right = _right(slm, budget)
    gains = [paired_difference(_right(p, budget), slm_right) for p in answered]
    return f"{mean:.3f} ({_mean(gains, '+')})"


def _panel(axis: Any, points: Sequence[Point], value: Callable[[Point], float | None]) -> None:
    """Draw a line per name; a control that needs no labels is a horizontal one."""
    import matplotlib

    curves: dict[str, list[tuple[int, list[float]]]] = {}
    for (name, _), seeds in _by_count(points).items():
        values = [v for v in map(value, seeds) if v is not None]
        if values:
            curves.setdefault(name, []).append((seeds[0].labels, values))
    for name, curve in curves.items():
        labels, groups = zip(*curve, strict=True)
        means = [statistics.fmean(group) for group in groups]
        if labels[0] == 0:
            style = "--" if name == SLM else ":"
            axis.axhline(means[0], linestyle=style, color="gray", label=name)
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


def _right(point: Point, budget: str) -> list[bool]:
    """Per problem, whether the answer at this budget is right."""
    return [digit == "1" for digit in point.digits(budget)]


def _mean(values: Sequence[Interval], sign: str = "") -> str:
    means = [statistics.fmean(column) for column in zip(*values, strict=True)]
    return f"{means[0]:{sign}.3f} ± {means[1]:.3f}"


def _accuracy_at(budget: str) -> str:
    return f"accuracy at {100 * float(budget):g} %"


def _budgets(points: Sequence[Point]) -> list[str]:
    """Every budget once, in order of appearance."""
    return list(dict.fromkeys(budget for p in points for budget in p.correct if budget))


def _by_count(points: Sequence[Point]) -> dict[tuple[str, int], list[Point]]:
    """Points that differ only by seed, together."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.name, point.count), []).append(point)
    return groups
