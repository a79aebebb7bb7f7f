"""The verdict and the report: what they claim, and that the page works in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from s2t_shared.types import Prompt, Usage
from services.evaluation import pareto
from services.evaluation.figures import Row, sufficiency
from services.evaluation.journal import ScoredRollout
from services.evaluation.modes import ModeSpec
from services.evaluation.problems import Problem
from services.evaluation.records import Candidate, Decision, Record
from services.evaluation.report import Evaluated, figures_of, markdown, write_report
from services.evaluation.verdict import verdict
from tests.helpers.chromium import chromium, needs_chromium, new_page

HOSTILE = '</script><img src=x onerror="document.title=1"> & "quotes"'
HITS = sufficiency([ScoredRollout("p", (0.1,) * 100, (0.1,) * 100, (0,) * 100)])
DECISION = Decision(
    index=1,
    signal=0.75,
    chosen_by="llm",
    candidates=(
        Candidate(text="12", slm=0.6, llm=0.1),
        Candidate(text="<4>", slm=0.4, llm=0.9),
    ),
    chosen=1,
    slm_first=0,
)


class Words:
    """A tokenizer of three words."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(("So ", "<4>", HOSTILE)[i] for i in token_ids)


def row(
    name: str, right: int, of: int = 200, llm_read: int = 0, budget: float | None = None
) -> Row:
    trigger = "entropy" if budget else ""
    records = []
    for place in range(of):
        record = Record(
            row=name,
            problem_id=str(place),
            text=HOSTILE,
            correct=place < right,
            usage=Usage(completion_tokens=10, llm_forwards=min(1, llm_read), triggers=1),
            llm_read=llm_read,
            token_ids=(0, 1, 2),
            decisions=(DECISION,) if budget else (),
        )
        records.append((record,))
    spec = ModeSpec(name=name, trigger=trigger, budget=budget)
    clusters = tuple(str(place) for place in range(of))
    return Row(spec=spec, records=tuple(records), clusters=clusters, seconds=2.0)


GREEDY, LLM = row("greedy", 100), row("llm", 190, llm_read=10)
S2T = row("s2t", 180, llm_read=4, budget=0.05)
LOCAL = row("s2t_local", 130, budget=0.05)


# -- the verdict ----------------------------------------------------------------------------------


def test_a_grader_that_fits_nothing_is_noticed() -> None:
    """ "Nothing to gain was found" beside a row of zeros sent a newcomer to the wrong place."""
    wrong = " ".join(verdict([row("greedy", 0), row("llm", 0, llm_read=10)], None).reasons)
    assert "--grader" in wrong
    assert "--grader" not in " ".join(verdict([row("greedy", 0), LLM], None).reasons)


def says(*rows: Row) -> str:
    found = verdict(rows, None)
    return "\n".join([found.headline, *found.reasons])


def test_the_mode_that_gains_is_recommended() -> None:
    text = says(GREEDY, S2T, LLM)
    assert text.startswith("For this pair and these prompts, use s2t entropy 5%: it closes 89%")
    assert "the LLM reads 40% of the answers' tokens" in text


def test_what_is_recommended_is_explained_and_marked(tmp_path: Path) -> None:
    """Who reads the first report knows no mode by name."""
    text = says(GREEDY, S2T, LLM)
    assert (
        "s2t entropy 5%: the small model (SLM) writes; at 10.0% of the tokens the large one (LLM) "
        "chooses among its candidates." in text
    )
    assert "greedy, the small model (SLM) alone, is right on 50.0%" in text
    assert "llm, the large model (LLM) alone, is right on" in text
    found = evaluated([GREEDY, S2T, LLM])
    write_report(found, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<tr class="is-chosen"><th scope="row">s2t entropy 5%') == 1
    assert f"Select-to-Think evaluation, SLM {escape(HOSTILE)}" in page
    assert verdict([GREEDY, row("s2t", 104, llm_read=4, budget=0.05)], None).choice == ""


def test_what_is_as_good_and_asks_less_is_preferred() -> None:
    cheaper = row("s2t", 178, llm_read=1, budget=0.01)
    assert says(GREEDY, S2T, cheaper).startswith(
        "For this pair and these prompts, use s2t entropy 1%"
    )
    takeover = row("takeover", 181, llm_read=4, budget=0.05)
    assert "use s2t entropy 5%" in says(GREEDY, takeover, S2T)


def test_the_llm_free_mode_is_named_beside() -> None:
    assert "Without the LLM: s2t_local entropy 5% is right on 65.0%" in says(
        GREEDY, S2T, LOCAL, LLM
    )


def test_a_gain_within_noise_is_no_gain() -> None:
    assert says(GREEDY, row("s2t", 104, llm_read=4, budget=0.05)).startswith("Stay with greedy")
    assert says(GREEDY, S2T, row("llm", 101, llm_read=10)).startswith("For this pair")
    far = says(GREEDY, row("s2t", 101, llm_read=4, budget=0.05), LLM)
    assert far.startswith("Nothing short of the LLM helps here")
    alike = says(GREEDY, row("s2t", 101, llm_read=4, budget=0.05), row("llm", 101, llm_read=10))
    assert alike.startswith("Nothing to gain was found")


def test_a_gap_that_no_asked_mode_could_close_is_told() -> None:
    """ "Stay with greedy" where only the LLM was asked beside it, and is far better."""
    assert says(GREEDY, LLM).startswith("There is something to gain")


def test_pass_at_n_is_never_recommended() -> None:
    """It needs someone who knows the right answer."""
    assert says(GREEDY, row("pass@8", 190)).startswith("Stay with greedy")


def test_the_best_of_many_is_told_to_be_just_that() -> None:
    """A sweep chooses among dozens of rows on the problems that it reports."""
    many = [row("s2t", 100 + n, llm_read=4, budget=n / 100) for n in range(1, 12)]
    assert "The best of 12 rows looks better than it is" in says(GREEDY, *many)
    assert "looks better" not in says(GREEDY, S2T, LLM)


def test_too_few_problems_are_said() -> None:
    few = says(row("greedy", 5, 10), row("s2t", 7, 10, 4, 0.05))
    assert "a difference below" in few and "ask more" in few


# -- the files ------------------------------------------------------------------------------------


def evaluated(rows: Sequence[Row] = (GREEDY, S2T, LOCAL, LLM)) -> Evaluated:
    problems = [Problem(str(i), Prompt(text=HOSTILE), bool, expected="4") for i in range(200)]
    about = {"SLM": HOSTILE, "command": "s2t eval"}
    return Evaluated(
        title="A <title>",
        rows=rows,
        problems=problems,
        hits=HITS,
        about=about,
        tokenizer=Words(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert len(write_report(evaluated(), folder)) == 4
    return folder


def test_the_figures_are_in_the_json(folder: Path) -> None:
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [r["label"] for r in found["rows"]][:2] == ["greedy", "s2t entropy 5%"]
    s2t = found["rows"][1]
    assert s2t["accuracy"] == 0.9 and s2t["rescued"] == 80 and s2t["harmed"] == 0
    assert found["local_sufficiency"]["by_kl"]["top 5%"]["8"] == 1.0
    assert found["verdict"]["headline"].startswith("For this pair")


def test_the_markdown_has_the_table(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "| s2t entropy 5% | 0.900 | 0.85 - 0.93 | +0.400 ± 0.068 | 80, 0 | < 0.001 |" in text
    assert "cut off |" not in text  # a column that says nothing


def test_s2t_is_compared_with_the_takeover_at_the_same_points(tmp_path: Path) -> None:
    """Not with one of another budget."""
    takeover = row("takeover", 184, llm_read=4, budget=0.05)
    other = row("takeover", 150, llm_read=1, budget=0.01)
    found = evaluated([GREEDY, S2T, takeover, other, LLM])
    assert figures_of(found)["over_takeover"].keys() == {"s2t entropy 5%"}
    assert "| s2t entropy 5% | 0.900 | 0.920 | -0.020 ± 0.020 | 0, 4 | 0.125 |" in markdown(found)
    assert "takeover" not in markdown(evaluated())


def test_the_plot_is_also_a_file_of_its_own(folder: Path) -> None:
    """For other people's pages: with its colours, and well formed."""
    root = ElementTree.parse(folder / "report.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text or "" for element in root.iter()]
    assert "s2t_local entropy" in texts and any("--c0:" in text for text in texts)


class _Outside(HTMLParser):
    """Elements and attributes that load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "action") or name.startswith("on"):
                self.found.append(f"{tag} {name}={value}")


def test_names_do_not_become_markup_in_the_markdown(folder: Path) -> None:
    """A folder or a model that is named like a tag was one in whatever shows the report."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    parser = _Outside()
    shown = MarkdownIt("commonmark").enable("table").render(text)
    parser.feed(shown)
    assert parser.found == ["img src=report.svg"] and "A &lt;title&gt;" in shown
    assert "<td>s2t_local entropy 5%</td>" in shown
    assert escape(HOSTILE) in shown
    hostile = ModeSpec(name="s2t", trigger="a | `x` *y*", budget=0.05)
    rows = (GREEDY, replace(S2T, spec=hostile))
    shown = MarkdownIt("commonmark").enable("table").render(markdown(evaluated(rows)))
    assert "<td>s2t a | `x` *y* 5%</td>" in shown


def test_the_page_needs_nothing_else_and_escapes_all(folder: Path) -> None:
    """An answer's text must not become markup, and nothing is loaded from elsewhere."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    parser = _Outside()
    parser.feed(text)
    assert parser.found == []
    assert not re.search(r"url\(|@import|https?://", text)


def test_budgets_of_a_mode_are_one_curve(folder: Path) -> None:
    """Twenty names beside twenty marks covered one another; each curve is named once."""
    budgets = [row("takeover", 90 + n, llm_read=6, budget=n / 100) for n in (1, 5, 10)]
    drawn = pareto.plot([GREEDY, S2T, *budgets, LLM])
    names = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    for name in ("greedy", "s2t entropy", "takeover entropy", "llm", "10%"):
        assert names.count(name) == 1
    assert "<title>takeover entropy 5%: 0.475" in drawn


@needs_chromium
@pytest.mark.slow
def test_the_answer_viewer_in_a_browser(folder: Path) -> None:
    """A click on a marked token shows its candidates; hostile text stays text."""
    phone = {"viewport": {"width": 390, "height": 800}}
    with chromium() as browser, new_page(browser, **phone) as page:
        page.goto((folder / "report.html").as_uri())
        assert page.title() == "A <title>"
        token = page.locator("button.token").first
        assert token.get_attribute("aria-label") == "<4>, divergence point, changed"
        token.focus()
        page.keyboard.press("Enter")
        shown = page.locator("#decision").inner_text()
        assert "chosen by the LLM, changed" in shown and "90.0 %" in shown and "<4> ✓" in shown
        assert HOSTILE in page.locator("#prompt").inner_text()
        first = page.locator("#problem").input_value()
        page.locator("#next").click()
        assert page.locator("#problem").input_value() != first
        # On a phone the page itself does not scroll sideways.
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390
