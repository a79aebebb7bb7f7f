"""The plot of right answers against cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from s2t_shared.types import Mode
from services.evaluation import plots
from services.evaluation.figures import Row

CAPTION = "Right answers against the share of the answers' tokens that the LLM reads"


def plot(rows: Sequence[Row]) -> str:
    """SVG, in the colours of the page that it stands in: a colour per mode, a curve per trigger."""
    modes = list(dict.fromkeys(row.spec.name for row in rows))
    triggers = list(dict.fromkeys(row.spec.trigger for row in rows if row.spec.trigger))
    curves = []
    for name, of in _curves(rows).items():
        spec = of[0].spec
        is_first = not spec.trigger or spec.trigger == triggers[0]
        shape = "circle" if is_first else "square"
        if spec.mode is Mode.TAKEOVER:
            shape = "ring" if is_first else "frame"
        points = [_point(row) for row in sorted(of, key=lambda row: row.spec.budget or 0.0)]
        curves.append(plots.Curve(name, points, modes.index(spec.name), shape))
    x_title = "share of the answers' tokens that the LLM reads"
    return plots.scatter(curves, x_title, "right", CAPTION)


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in their budget alone, by their common name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(replace(row.spec, budget=None).label, []).append(row)
    return found


def _point(row: Row) -> plots.Point:
    low, high = row.interval
    note = f"{row.spec.budget * 100:g}%" if row.spec.budget else ""
    return plots.Point(row.llm_read_per_token, row.accuracy, low, high, note)
