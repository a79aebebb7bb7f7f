"""The report as one HTML file, without any outside resource: tables, plots, the answer viewer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from s2t_shared.model.tokenizer import TextTokenizer
from services.evaluation import pareto, plots, sensitivity
from services.evaluation.figures import HIT_AT, Row, Sufficiency, order_agreement, positions
from services.evaluation.problems import Problem
from services.evaluation.records import token_pieces
from services.evaluation.tables import (
    DEPTH,
    DEPTH_HEADER,
    FAILURE_HEADER,
    FAILURES,
    TAKEOVER,
    TAKEOVER_HEADER,
    depth_rows,
    explained,
    failure_rows,
    hit_rows,
    main_table,
    takeover_rows,
    task_table,
)

if TYPE_CHECKING:
    from services.evaluation.report import Evaluated

SHOWN_PROBLEMS = 40  # in the answer viewer


def page(evaluated: Evaluated) -> str:
    """The report as one HTML file, without any outside resource."""
    assets = files("services.evaluation").joinpath("page")
    base = evaluated.rows[0]
    values = {
        "title": escape(evaluated.title),
        "css": plots.style() + assets.joinpath("page.css").read_text(encoding="utf-8"),
        "js": assets.joinpath("page.js").read_text(encoding="utf-8"),
        "headline": escape(evaluated.verdict.headline),
        "reasons": "".join(f"<li>{escape(r)}</li>" for r in evaluated.verdict.reasons),
        "models": escape(_models(evaluated.about)),
        "table": _html_table(*main_table(evaluated.rows), chosen=evaluated.verdict.choice),
        "explained": escape(explained(base).replace("*", "")),
        "pareto": _scrolling(pareto.plot(evaluated.rows)),
        "tasks": _task_section(evaluated) + _takeover_section(evaluated.rows),
        "sufficiency": _sufficiency_section(evaluated.hits),
        "sensitivity": _sensitivity_section(evaluated.rows),
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


def _models(about: Mapping[str, Any]) -> str:
    """The pair, for the first screen."""
    named = [f"{role} {about[role]}" for role in ("SLM", "LLM") if role in about]
    return ", ".join(["Select-to-Think evaluation", *named])


def _html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], chosen: str | None = None
) -> str:
    """chosen: the name of the row that is marked."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = []
    for row in rows:
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        marked = ' class="is-chosen"' if row[0] == chosen else ""
        body.append(f'<tr{marked}><th scope="row">{escape(row[0])}</th>{rest}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


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
    tables = _scrolling(_html_table(header, hit_rows(hits)))
    tables += f"<p>{DEPTH}</p>" + _scrolling(_html_table(DEPTH_HEADER, depth_rows(hits)))
    if hits.local:
        tables += f"<h3>Failures of the local selector</h3><p>{FAILURES}</p>"
        tables += _scrolling(_html_table(FAILURE_HEADER, failure_rows(hits)))
    return text + _scrolling(drawn) + tables


def _task_section(evaluated: Evaluated) -> str:
    if not evaluated.has_tasks:
        return ""
    return "<h3>By task</h3>" + _scrolling(
        _html_table(*task_table(evaluated.rows, evaluated.problems))
    )


def _takeover_section(rows: Sequence[Row]) -> str:
    found = takeover_rows(rows)
    if not found:
        return ""
    table = _scrolling(_html_table(TAKEOVER_HEADER, found))
    return f"<h3>Selection against takeover</h3><p>{TAKEOVER}</p>{table}"


def _sensitivity_section(rows: Sequence[Row]) -> str:
    text = (
        "<p>What one setting changes while the others stay: each value's figures are means over "
        "the rows that have it, on the same problems, with 95 % intervals of the mean; gains are "
        "paired.</p>"
    )
    parts = []
    for setting in sensitivity.SETTINGS:
        if found := sensitivity.levels(rows, setting):
            parts.append(f"<h3>{setting[0].upper() + setting[1:]}</h3>")
            parts.append(_scrolling(_levels_plot(setting, found)))
            parts.append(_scrolling(_html_table(*sensitivity.table(setting, found))))
    if not parts:
        return "<p>Every setting had one value; <code>s2t sweep</code> compares several.</p>"
    return text + "".join(parts)


def _levels_plot(setting: str, found: Sequence[sensitivity.Level]) -> str:
    values = list(dict.fromkeys(level.value for level in found))
    marks: dict[str, list[plots.Mark | None]] = {}
    for level in found:
        mean, half = level.right
        mark = plots.Mark(mean, max(0.0, mean - half), min(1.0, mean + half))
        marks.setdefault(level.mode, [None] * len(values))[values.index(level.value)] = mark
    caption = f"Right answers by {setting}"
    return plots.lines(values, list(marks.items()), setting, "right", caption)


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
        answers = [_answer_data(row, place, evaluated.tokenizer) for row in evaluated.rows]
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


def _answer_data(row: Row, place: int, tokenizer: TextTokenizer | None) -> dict[str, Any]:
    samples = row.records[place]
    record = next((record for record in samples if record.correct), samples[0])
    pieces = [] if tokenizer is None else list(token_pieces(tokenizer, record.token_ids))
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
        "pieces": pieces or [record.text],
        "decisions": decisions if pieces else [],
    }
