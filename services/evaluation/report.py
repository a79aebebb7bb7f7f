"""The report of an evaluation: report.json, report.md with report.svg, and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError
from s2t_shared.model.tokenizer import TextTokenizer
from services.evaluation import pareto, plots, sensitivity
from services.evaluation.figures import (
    HIT_AT,
    Row,
    Sufficiency,
    beside_takeover,
    by_task,
    mcnemar,
    order_agreement,
    positions,
)
from services.evaluation.html_page import page
from services.evaluation.problems import Problem
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
    relative_time,
    takeover_rows,
    task_table,
)
from services.evaluation.verdict import Verdict, verdict

# Of Markdown and HTML: anywhere; around words, not in them; at a line's start.
MARKS = re.compile(r"[\\`*\[\]&|~]|<(?! )|(?<!\w)_|_(?!\w)|^[#>]|^[+-](?= )")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A finished evaluation. rows: the first one is what the others are compared with.

    about: what was asked, of what, where; shown as it is. tokenizer: tells the text of each token.
    """

    title: str
    rows: Sequence[Row]
    problems: Sequence[Problem]
    hits: Sufficiency | None
    about: dict[str, Any]
    tokenizer: TextTokenizer | None = None

    @property
    def has_tasks(self) -> bool:
        """Whether the problems are of several tasks."""
        return len({problem.task for problem in self.problems}) > 1

    @property
    def verdict(self) -> Verdict:
        return verdict(self.rows, self.hits)


def write_report(evaluated: Evaluated, folder: Path) -> list[Path]:
    """Write the four files; returns their paths.

    Raises:
        ConfigError: the folder cannot be written.
    """
    found = figures_of(evaluated)
    texts = {
        "report.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(evaluated),
        "report.html": page(evaluated),
        "report.svg": plots.standalone(pareto.plot(evaluated.rows)),
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
        "over_takeover": {
            row.label: list(row.gain_over(takeover))
            for row, takeover in beside_takeover(evaluated.rows)
        },
        "tasks": {row.label: by_task(row, evaluated.problems) for row in evaluated.rows},
        "local_sufficiency": None if hits is None else _hit_figures(hits),
        "sensitivity": sensitivity.figures_of(evaluated.rows),
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
        "version": row.spec.version,
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


def _hit_figures(hits: Sufficiency) -> dict[str, Any]:
    def named(table: dict[float, dict[int, float]]) -> dict[str, dict[int, float]]:
        return {f"top {share:.0%}": rates for share, rates in table.items()}

    return {
        "steps": hits.steps,
        "by_kl": named(hits.by_kl),
        "by_entropy": named(hits.by_entropy),
        "all_steps": hits.all_steps,
        "by_depth": [{"steps": steps, "hit_at": rates} for steps, rates in hits.by_depth],
        "local": {row: choices.figures() for row, choices in hits.local.items()},
    }


# -- Markdown --------------------------------------------------------------------------------------


def markdown(evaluated: Evaluated) -> str:
    """The report as Markdown."""
    base = evaluated.rows[0]
    said = evaluated.verdict
    lines = [f"# {_literal(evaluated.title)}", "", f"**{_literal(said.headline)}**", ""]
    lines += [f"- {_literal(reason)}" for reason in said.reasons]
    lines += ["", *_markdown_table(*main_table(evaluated.rows)), ""]
    lines += [explained(base), "", f"![{pareto.CAPTION}](report.svg)", ""]
    if evaluated.has_tasks:
        lines += [
            "## By task",
            "",
            *_markdown_table(*task_table(evaluated.rows, evaluated.problems)),
            "",
        ]
    if against := takeover_rows(evaluated.rows):
        lines += ["## Selection against takeover", "", TAKEOVER, ""]
        lines += [*_markdown_table(TAKEOVER_HEADER, against), ""]
    if evaluated.hits is not None:
        lines += [f"## Local sufficiency, {evaluated.hits.steps} steps", ""]
        header = ("steps", *(f"Hit@{k}" for k in HIT_AT))
        lines += [*_markdown_table(header, hit_rows(evaluated.hits)), ""]
        lines += [DEPTH, "", *_markdown_table(DEPTH_HEADER, depth_rows(evaluated.hits)), ""]
        if evaluated.hits.local:
            failures = _markdown_table(FAILURE_HEADER, failure_rows(evaluated.hits))
            lines += ["## Failures of the local selector", "", FAILURES, "", *failures, ""]
    for setting in sensitivity.SETTINGS:
        if found := sensitivity.levels(evaluated.rows, setting):
            lines += [f"## Sensitivity to the {setting}", ""]
            lines += [*_markdown_table(*sensitivity.table(setting, found)), ""]
    lines += ["## Asked", ""]
    lines += [f"- {_literal(name)}: {_literal(str(v))}" for name, v in evaluated.about.items()]
    return "\n".join(lines) + "\n"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(map(_literal, row)) + " |" for row in rows]


def _literal(text: str) -> str:
    """Text that Markdown shows as it is: names of models, modes and files are their users'."""
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))
