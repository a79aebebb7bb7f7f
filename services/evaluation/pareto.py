"""The plot of right answers against cost."""

from __future__ import annotations

from collections.abc import Sequence

from s2t_shared.types import Mode
from services.evaluation import plots
from services.evaluation.figures import Row

NAMED_POINTS = 10  # more rows than these hide one another's names
CAPTION = "Right answers against the share of the answers' tokens that the LLM reads"
NAMED = (
    "Named: the first row, the LLM, and the rows that are right more often than all that read "
    "less. The others are named when pointed at."
)


def plot(rows: Sequence[Row]) -> str:
    """SVG, in the colours of the page that it stands in."""
    shown = named(rows)
    points = []
    for row in rows:
        low, high = row.interval
        cost = row.llm_read_per_token
        points.append(plots.Point(row.label, cost, row.accuracy, low, high, row.label in shown))
    x_title = "share of the answers' tokens that the LLM reads"
    return plots.scatter(points, x_title, "right", CAPTION)


def named(rows: Sequence[Row]) -> set[str]:
    """Rows whose names stand in the plot: all, or where they are many, the front of it."""
    return _front(rows) if len(rows) > NAMED_POINTS else {row.label for row in rows}


def _front(rows: Sequence[Row]) -> set[str]:
    """The rows that are right more often than all that cost less, the first one and the LLM."""
    found = {rows[0].label, *(row.label for row in rows if row.spec.mode is Mode.LLM)}
    best = -1.0
    for row in sorted(rows, key=lambda row: (row.llm_read_per_token, -row.accuracy)):
        if row.accuracy > best:
            found.add(row.label)
            best = row.accuracy
    return found
