"""The tables of a report as texts, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from s2t_shared.statistics import wilson_interval
from services.evaluation.figures import (
    DEPTH_SHARE,
    HIT_AT,
    Row,
    Sufficiency,
    beside_takeover,
    by_task,
    mcnemar,
)
from services.evaluation.problems import Problem

DEPTH = (
    f"By depth: the top {DEPTH_SHARE:.0%} of the steps by KL, by the quarter of the answer that "
    "they are in."
)
DEPTH_HEADER = ("depth", "steps", *(f"Hit@{k}" for k in HIT_AT))
FAILURES = (
    "At the local selector's own divergence points, on answers that the LLM scored afterwards. "
    "Hit failure: the LLM's first choice is not among the candidates. Selection failure: it is, "
    "and the local selector chose another."
)
FAILURE_HEADER = (
    "mode",
    "steps",
    "hit failures",
    "selection failures",
    "Agree@1",
    "the SLM's own",
    "order agrees",
)
TAKEOVER = (
    "Selection is confined to the SLM's candidates, a takeover is not: what that costs, at "
    "the same trigger and budget, paired on the same problems."
)
TAKEOVER_HEADER = ("mode", "right", "takeover", "difference", "rescued, harmed", "p")
COLUMNS = (
    "mode",
    "right",
    "95 %",
    "gain",
    "rescued, harmed",
    "p",
    "triggered",
    "flipped",
    "LLM forwards / token",
    "LLM reads",
    "time",
    "cut off",
)


def relative_time(row: Row, base: Row) -> float | None:
    """Wall time for all answers over the base row's; None where one of them was cut off."""
    if row.seconds is None or not base.seconds:
        return None
    return row.seconds / base.seconds


def main_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; a column that says nothing is left out."""
    body = [_cells(row, rows[0]) for row in rows]
    said = [place for place in range(len(COLUMNS)) if any(cells[place] for cells in body)]
    header = [COLUMNS[place] for place in said]
    return header, [[cells[place] for place in said] for cells in body]


def _cells(row: Row, base: Row) -> list[str]:
    """A row of the main table, in the order of COLUMNS."""
    low, high = row.interval
    gain, half = row.gain_over(base)
    rescued, harmed = row.rescues_and_harms(base)
    first = row is base
    time = relative_time(row, base)
    triggers = row.usage.triggers
    return [
        row.label,
        f"{row.accuracy:.3f}",
        f"{low:.2f} - {high:.2f}",
        "" if first else f"{gain:+.3f} ± {half:.3f}",
        "" if first else f"{rescued}, {harmed}",
        "" if first else _p_value(mcnemar(rescued, harmed)),
        f"{row.trigger_rate:.1%}" if triggers else "",
        f"{row.flip_rate:.0%}" if triggers else "",
        f"{row.llm_forwards_per_token:.3f}",
        f"{row.llm_read_per_token:.0%}",
        "" if time is None else f"{time:.2f}",
        str(row.truncated) if row.truncated else "",
    ]


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def hit_rows(hits: Sufficiency) -> list[list[str]]:
    """Hit@K, of HIT_AT, by signal and share of the steps."""
    rows = []
    for signal, table in (("KL", hits.by_kl), ("entropy", hits.by_entropy)):
        for share, rates in table.items():
            rows.append([f"top {share:.0%} by {signal}", *(f"{rates[k]:.3f}" for k in HIT_AT)])
    rows.append(["all steps", *(f"{hits.all_steps[k]:.3f}" for k in HIT_AT)])
    return rows


def depth_rows(hits: Sufficiency) -> list[list[str]]:
    """Rows below DEPTH_HEADER."""
    rows = []
    for quarter, (steps, rates) in enumerate(hits.by_depth, 1):
        cells = [f"{rates[k]:.3f}" if rates else "" for k in HIT_AT]
        rows.append([f"quarter {quarter}", str(steps), *cells])
    return rows


def failure_rows(hits: Sufficiency) -> list[list[str]]:
    """Rows below FAILURE_HEADER."""
    rows = []
    for label, choices in hits.local.items():
        failures = (choices.hit_failures, choices.selection_failures)
        cells = []
        for count in (*failures, choices.agreed, choices.slm_agreed):
            low, high = wilson_interval(count, choices.steps)
            cells.append(f"{count / max(1, choices.steps):.3f} ({low:.2f} - {high:.2f})")
        order = "" if choices.order is None else f"{choices.order:.2f}"
        rows.append([label, str(choices.steps), *cells, order])
    return rows


def task_table(
    rows: Sequence[Row], problems: Sequence[Problem]
) -> tuple[list[str], list[list[str]]]:
    """Each row's rate of right answers by task, with its interval."""
    counted = [by_task(row, problems) for row in rows]
    header = ["mode", *(f"{task} ({of})" for task, (_, of) in counted[0].items())]
    body = []
    for row, tasks in zip(rows, counted, strict=True):
        cells = [row.label]
        for right, of in tasks.values():
            low, high = wilson_interval(right, of)
            cells.append(f"{right / of:.3f} ({low:.2f} - {high:.2f})")
        body.append(cells)
    return header, body


def takeover_rows(rows: Sequence[Row]) -> list[list[str]]:
    """Rows below TAKEOVER_HEADER."""
    found = []
    for row, takeover in beside_takeover(rows):
        gain, half = row.gain_over(takeover)
        rescued, harmed = row.rescues_and_harms(takeover)
        rates = (f"{row.accuracy:.3f}", f"{takeover.accuracy:.3f}")
        p = _p_value(mcnemar(rescued, harmed))
        found.append([row.label, *rates, f"{gain:+.3f} ± {half:.3f}", f"{rescued}, {harmed}", p])
    return found


def explained(base: Row) -> str:
    """What the main table's columns are."""
    return (
        f"Gains are paired with {base.label} on the same problems, with 95 % intervals by group; "
        "p is of the exact McNemar test. *LLM reads*: tokens of the answers that the LLM had to "
        f"read. Times are wall-clock for all answers, over {base.label}'s. Answers that were cut "
        "off count as wrong."
    )
