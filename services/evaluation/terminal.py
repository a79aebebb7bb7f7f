"""An evaluation's figures for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from services.evaluation.figures import Row
from services.evaluation.tables import relative_time


def table(rows: Sequence[Row], title: str) -> Table:
    """One line per row; gains and times are relative to the first one."""
    first = rows[0]
    shown = Table(title=title, title_justify="left")
    columns = [
        "mode",
        "accuracy",
        "95 % interval",
        f"paired gain\nover {first.label}",
        "triggered",
        "LLM forwards\nper token",
        f"time /\n{first.label}",
    ]
    cut_off = any(row.truncated for row in rows)
    if cut_off:
        columns.append("cut off")
    for column in columns:
        shown.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    for row in rows:
        gain, half = row.gain_over(first)
        low, high = row.interval
        time = relative_time(row, first)
        cells = [
            row.label,
            f"{row.accuracy:.3f}",
            f"{low:.2f} - {high:.2f}",
            "" if row is first else f"{gain:+.3f} ± {half:.3f}",
            f"{row.trigger_rate:.1%}",
            f"{row.llm_forwards_per_token:.3f}",
            "" if time is None else f"{time:.2f}",
        ]
        if cut_off:
            cells.append(str(row.truncated))
        shown.add_row(*cells)
    return shown
