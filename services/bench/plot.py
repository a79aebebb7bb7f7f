"""`s2t bench plot`: how the cost of `s2t_local` grows with batch, prefix length, K and budget, as
four small plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.bench.decode import bench_decode
from services.bench.measure import Figure, machine
from services.bench.score import bench_score
from services.bench.workload import Settings

BATCHES = (1, 4, 16)
PREFIXES = (64, 256, 1024)
KS = (2, 8, 32)
BUDGETS = (0.01, 0.05, 0.2)
KINDS = ("prefix", "joint", "reserved")
Curves = dict[str, list[tuple[float, float, float, float]]]  # name -> (x, median, low, high)


def sweep(settings: Settings, on_turn: Callable[[], None] = lambda: None) -> dict[str, Curves]:
    """Plot title -> its curves."""
    names = [f"{kind}, base" for kind in KINDS]
    plots: dict[str, Curves] = {"batch": {}, "budget": {}, "prefix": {}, "K": {}}
    for batch in BATCHES:
        for f in bench_decode(settings, [batch], names, False, on_turn).figures:
            _add(plots["batch"], batch, f)
    for budget in BUDGETS:
        for f in bench_decode(replace(settings, budget=budget), [4], names, False, on_turn).figures:
            _add(plots["budget"], budget, f)
    for prefix in PREFIXES:
        for f in bench_score(settings, [prefix], [settings.k], False, on_turn).figures:
            if f.name.startswith(tuple(names)):
                _add(plots["prefix"], prefix, f)
    for k in KS:
        for f in bench_score(settings, [256], [k], False, on_turn).figures:
            if f.name.startswith(tuple(names)):
                _add(plots["K"], k, f)
    return plots


def _add(curves: Curves, x: float, f: Figure) -> None:
    kind = next(kind for kind in KINDS if f"{kind}, base" in f.name)
    curves.setdefault(kind, []).append((x, f.median, f.low, f.high))


def draw(plots: dict[str, Curves], settings: Settings, file: Path) -> None:
    """An SVG with the four plots; the numbers go beside it as JSON."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "s2t"
    from matplotlib import pyplot

    titles = {
        "batch": (f"decode time / greedy, budget {settings.budget:.0%}", "batch"),
        "budget": ("decode time / greedy, batch 4", "budget (share of steps)"),
        "prefix": (f"one scoring / one decode step, K {settings.k}", "prefix (tokens)"),
        "K": ("one scoring / one decode step, prefix 256", "K (candidates)"),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4))
    for axis, (name, curves) in zip(axes.flat, plots.items(), strict=True):
        for kind in (kind for kind in KINDS if kind in curves):  # the same colour in every plot
            points = curves[kind]
            x, y, low, high = zip(*points, strict=True)
            axis.plot(x, y, marker="o", markersize=3, label=kind)
            axis.fill_between(x, low, high, alpha=0.15)
        axis.set_title(titles[name][0], fontsize=9)
        axis.set_xlabel(titles[name][1], fontsize=8)
        axis.set_xscale("log", base=2 if name != "budget" else 10)
        axis.set_xticks(sorted({p[0] for points in curves.values() for p in points}))
        axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.minorticks_off()
        axis.set_ylim(
            bottom=0
            if name in ("prefix", "K")
            else min(0.95, *(p[2] for c in curves.values() for p in c))
        )
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"{Path(settings.slm).name}, {settings.dtype}, reads: base\n{machine()}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    numbers: dict[str, Any] = {
        "machine": machine(),
        "slm": Path(settings.slm).name,
        "dtype": settings.dtype,
        "columns": ["x", "median", "min", "max"],
        "plots": plots,
    }
    file.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
