"""The report of an evaluation: report.json, report.md, and report.html in one file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from s2t_shared.errors import ConfigError
from services.evaluation import plots
from services.evaluation.figures import (
    HIT_AT,
    Row,
    Sufficiency,
    mcnemar,
    order_agreement,
    positions,
)
from services.evaluation.problems import Problem
from services.evaluation.verdict import Verdict, verdict

SHOWN_PROBLEMS = 40  # in the answer viewer
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


# Of Markdown and HTML: anywhere; around words, not in them; at a line's start.
MARKS = re.compile(r"[\\`*\[\]&|~]|<(?! )|(?<!\w)_|_(?!\w)|^[#>]|^[+-](?= )")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A finished evaluation. rows: the first one is what the others are compared with.

    about: what was asked, of what, where; shown as it is.
    """

    title: str
    rows: Sequence[Row]
    problems: Sequence[Problem]
    hits: Sufficiency | None
    about: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        return verdict(self.rows, self.hits)


def write_report(evaluated: Evaluated, folder: Path) -> list[Path]:
    """Write the three files; returns their paths.

    Raises:
        ConfigError: the folder cannot be written.
    """
    found = figures_of(evaluated)
    texts = {
        "report.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(evaluated),
        "report.html": page(evaluated),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    except OSError as error:
        raise ConfigError(f"--out={str(folder)!r}: {error.strerror}") from error
    return written


# -- figures --------------------------------------------------------------------------------------


def figures_of(evaluated: Evaluated) -> dict[str, Any]:
    """All figures as plain values."""
    base = evaluated.rows[0]
    hits = evaluated.hits
    return {
        "title": evaluated.title,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "about": evaluated.about,
        "problems": len(evaluated.problems),
        "groups": len(set(base.clusters)),
        "verdict": {
            "headline": evaluated.verdict.headline,
            "reasons": list(evaluated.verdict.reasons),
        },
        "rows": [row_figures(row, base) for row in evaluated.rows],
        "local_sufficiency": None if hits is None else _hit_figures(hits),
    }


def row_figures(row: Row, base: Row) -> dict[str, Any]:
    """One row's figures, compared with another one's."""
    rescued, harmed = row.rescues_and_harms(base)
    return {
        "label": row.label,
        "mode": row.spec.name,
        "trigger": row.spec.trigger,
        "budget": row.spec.budget,
        "candidates": row.spec.candidates,
        "n": len(row.correct),
        "accuracy": row.accuracy,
        "interval": list(row.interval),
        "gain": list(row.gain_over(base)),
        "rescued": rescued,
        "harmed": harmed,
        "mcnemar_p": mcnemar(rescued, harmed),
        "trigger_rate": row.trigger_rate,
        "flip_rate": row.flip_rate,
        "llm_forwards_per_token": row.llm_forwards_per_token,
        "llm_read_per_token": row.llm_read_per_token,
        "tokens": row.usage.completion_tokens,
        "seconds": row.seconds,
        "relative_time": relative_time(row, base),
        "truncated": row.truncated,
        "degraded": row.usage.degraded_steps,
        "failed": row.failed,
        "order_agreement": order_agreement(row),
        "trigger_positions": positions(row),
    }


def relative_time(row: Row, base: Row) -> float | None:
    """Wall time for all answers over the base row's; None where one of them was cut off."""
    if row.seconds is None or not base.seconds:
        return None
    return row.seconds / base.seconds


def _hit_figures(hits: Sufficiency) -> dict[str, Any]:
    def named(table: dict[float, dict[int, float]]) -> dict[str, dict[int, float]]:
        return {f"top {share:.0%}": rates for share, rates in table.items()}

    return {
        "steps": hits.steps,
        "by_kl": named(hits.by_kl),
        "by_entropy": named(hits.by_entropy),
        "all_steps": hits.all_steps,
    }


# -- tables ---------------------------------------------------------------------------------------


def main_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; a column that says nothing is left out."""
    header = list(COLUMNS)
    body = [_cells(row, rows[0]) for row in rows]
    if not any(row.truncated for row in rows):
        header.pop()
        for cells in body:
            cells.pop()
    return header, body


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


def _hit_rows(hits: Sufficiency) -> list[list[str]]:
    rows = []
    for signal, table in (("KL", hits.by_kl), ("entropy", hits.by_entropy)):
        for share, rates in table.items():
            rows.append([f"top {share:.0%} by {signal}", *(f"{rates[k]:.3f}" for k in HIT_AT)])
    rows.append(["all steps", *(f"{hits.all_steps[k]:.3f}" for k in HIT_AT)])
    return rows


def markdown(evaluated: Evaluated) -> str:
    """The report as Markdown."""
    base = evaluated.rows[0]
    found = evaluated.verdict
    lines = [f"# {_literal(evaluated.title)}", "", f"**{_literal(found.headline)}**", ""]
    lines += [f"- {_literal(reason)}" for reason in found.reasons]
    lines += ["", *_markdown_table(*main_table(evaluated.rows)), ""]
    lines += [_explained(base), ""]
    if evaluated.hits is not None:
        lines += [f"## Local sufficiency, {evaluated.hits.steps} steps", ""]
        header = ("steps", *(f"Hit@{k}" for k in HIT_AT))
        lines += [*_markdown_table(header, _hit_rows(evaluated.hits)), ""]
    lines += ["## Asked", ""]
    lines += [f"- {_literal(name)}: {_literal(str(v))}" for name, v in evaluated.about.items()]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(_literal, row)) + " |" for row in rows]


def _literal(text: str) -> str:
    """Text that Markdown shows as it is: names of models, modes and files are their users'."""
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def _explained(base: Row) -> str:
    return (
        f"Gains are paired with {base.label} on the same problems, with 95 % intervals by group; "
        "p is of the exact McNemar test. *LLM reads*: tokens of the answers that the LLM had to "
        f"read. Times are wall-clock for all answers, over {base.label}'s. Answers that were cut "
        "off count as wrong."
    )


# -- the page -------------------------------------------------------------------------------------


def page(evaluated: Evaluated) -> str:
    """The report as one HTML file, without any outside resource."""
    assets = files("services.evaluation").joinpath("page")
    base = evaluated.rows[0]
    values = {
        "title": escape(evaluated.title),
        "css": assets.joinpath("page.css").read_text(encoding="utf-8"),
        "js": assets.joinpath("page.js").read_text(encoding="utf-8"),
        "headline": escape(evaluated.verdict.headline),
        "reasons": "".join(f"<li>{escape(r)}</li>" for r in evaluated.verdict.reasons),
        "table": _html_table(*main_table(evaluated.rows)),
        "explained": escape(_explained(base).replace("*", "")),
        "pareto": _pareto(evaluated.rows),
        "sufficiency": _sufficiency_section(evaluated.hits),
        "triggers": _trigger_section(evaluated.rows),
        "about": "".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in evaluated.about.items()
        ),
        "data": _embedded(viewer_data(evaluated)),
    }
    return Template(assets.joinpath("page.html").read_text(encoding="utf-8")).substitute(values)


def _embedded(data: Any) -> str:
    """JSON inside a script element: no text of an answer can end it."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = []
    for row in rows:
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr><th scope="row">{escape(row[0])}</th>{rest}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _pareto(rows: Sequence[Row]) -> str:
    points = []
    for row in rows:
        low, high = row.interval
        points.append(plots.Point(row.label, row.llm_read_per_token, row.accuracy, low, high))
    caption = "Right answers against the share of the answers' tokens that the LLM reads"
    x_title = "share of the answers' tokens that the LLM reads"
    drawn = plots.scatter(points, x_title, "right", caption)
    return _scrolling(drawn)


def _sufficiency_section(hits: Sufficiency | None) -> str:
    if hits is None:
        return "<p>Not measured: it needs the LLM and <code>--scored</code> above 0.</p>"
    header = ("steps", *(f"Hit@{k}" for k in HIT_AT))
    series = []
    for share, rates in hits.by_kl.items():
        series.append((f"top {share:.0%} by KL", [rates[k] for k in HIT_AT]))
    drawn = plots.bars(
        [f"Hit@{k}" for k in HIT_AT],
        series,
        "rate",
        "Hit at K at the steps where the models differ most",
    )
    text = (
        f"<p>How often the LLM's first choice is among the SLM's first K, of {hits.steps} steps of "
        "the SLM's own answers. What is not among them, no selection can reach.</p>"
    )
    return text + _scrolling(drawn) + _scrolling(_html_table(header, _hit_rows(hits)))


def _trigger_section(rows: Sequence[Row]) -> str:
    triggering = [row for row in rows if row.usage.triggers]
    if not triggering:
        return "<p>No row has divergence points.</p>"
    table = []
    for row in triggering:
        agreement = order_agreement(row)
        budget = row.spec.budget
        table.append(
            [
                row.label,
                "" if budget is None else f"{budget:.1%}",
                f"{row.trigger_rate:.1%}",
                f"{row.flip_rate:.0%}",
                "" if agreement is None else f"{agreement:.2f}",
                str(row.usage.degraded_steps),
            ]
        )
    header = ("mode", "budget", "triggered", "flipped", "order agrees", "degraded")
    places = [f"{10 * tenth}%" for tenth in range(10)]
    series = []
    for row in triggering[:4]:
        counts = positions(row)
        series.append((row.label, [count / max(1, sum(counts)) for count in counts]))
    drawn = plots.bars(places, series, "share", "Where in the answers the triggers fall")
    text = (
        "<p>Where in the answers the triggers fall, by tenths; how often they changed the token; "
        "and Spearman's correlation of the SLM's and the LLM's order of the candidates. A rate far "
        "from its budget means that the calibration prompts are unlike these.</p>"
    )
    return text + _scrolling(drawn) + _scrolling(_html_table(header, table))


def _scrolling(wide: str) -> str:
    return f'<div class="scroll" tabindex="0">{wide}</div>'


# -- the answer viewer ----------------------------------------------------------------------------


def viewer_data(evaluated: Evaluated) -> dict[str, Any]:
    """Problems whose answers are shown: first those where the rows differ."""

    def differs(place: int) -> bool:
        return len({row.correct[place] for row in evaluated.rows}) > 1

    order = sorted(range(len(evaluated.problems)), key=lambda place: not differs(place))
    shown = []
    for place in order[:SHOWN_PROBLEMS]:
        problem = evaluated.problems[place]
        answers = [_answer_data(row, place) for row in evaluated.rows]
        shown.append(
            {
                "id": problem.id,
                "prompt": _prompt_text(problem),
                "expected": problem.expected,
                "answers": answers,
            }
        )
    return {"problems": shown, "of": len(evaluated.problems)}


def _prompt_text(problem: Problem) -> str:
    prompt = problem.prompt
    if prompt.text is not None:
        return prompt.text
    if prompt.messages:
        return "\n".join(f"{m.role}: {m.content}" for m in prompt.messages)
    return f"{len(prompt.token_ids)} token ids"


def _answer_data(row: Row, place: int) -> dict[str, Any]:
    samples = row.records[place]
    record = next((record for record in samples if record.correct), samples[0])
    decisions = []
    for decision in record.decisions:
        candidates = [[c.text, c.slm, c.llm, c.score] for c in decision.candidates]
        decisions.append(
            {
                "i": decision.index,
                "signal": decision.signal,
                "by": decision.chosen_by,
                "chosen": decision.chosen,
                "first": decision.slm_first,
                "why": decision.degraded,
                "candidates": candidates,
            }
        )
    return {
        "row": row.label,
        "right": row.correct[place],
        "cut": record.truncated,
        "error": record.error,
        "pieces": list(record.pieces) or [record.text],
        "decisions": decisions if record.pieces else [],
    }
