"""`s2t eval`: from a file of questions to a report, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from s2t_shared.bundled import SLM_DIR, problems
from s2t_shared.model.local_selector import SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.versions.registry import Registry
from services.cli import app
from services.evaluation.grid import read_grid
from tests.helpers.versions import publish


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def s2t_eval(monkeypatch: pytest.MonkeyPatch, *arguments: str, verb: str = "eval") -> int:
    monkeypatch.setattr(sys, "argv", ["s2t", verb, *arguments])
    with pytest.raises(SystemExit) as done:
        app.run()
        sys.exit(0)
    return int(done.value.code or 0)


def test_from_questions_to_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: no service. The same command asks nothing again."""
    lines = []
    for problem in problems.problems("test", 4):
        reference = f"So Eva buys {problem.answer}"
        lines.append(json.dumps({"prompt": problem.prompt, "answer": reference}))
    Path("mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("s2t.yaml").write_text("defaults:\n  answer_pattern: 'buys (\\d+ and \\d+)'\n")
    arguments = ["mine.jsonl", "--slm", "bundled", "--llm", "bundled", "--modes", "greedy,s2t"]
    arguments += ["--budget", "0.05", "--max-new-tokens", "40", "--threads", "1"]
    arguments += ["--config", "s2t.yaml", "--out", "report"]
    assert s2t_eval(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    assert "s2t entropy 5%" in shown.out and "greedy, the small model (SLM) alone, is" in shown.out
    assert "wrote report/report.html" in shown.err
    found = json.loads(Path("report/report.json").read_text(encoding="utf-8"))
    assert [row["n"] for row in found["rows"]] == [4, 4] and found["local_sufficiency"]["steps"]
    answers = Path("report/answers.jsonl").read_text(encoding="utf-8")
    assert s2t_eval(monkeypatch, *arguments, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["greedy"]["accuracy"] == found["rows"][0]["accuracy"]
    assert Path("report/answers.jsonl").read_text(encoding="utf-8") == answers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slm", "bundled"], "s2t entropy 1% asks the LLM; give --llm"),
        (["--llm", "bundled"], "--llm needs --slm"),
        (["--budget", "much"], "numbers, separated by commas"),
        (["--budget", "7"], "less than or equal to 1"),
        (["--modes", "fast"], "unknown; choose from"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["--grader", "fuzzy", "one.jsonl"], "choose number, exact, choice, math"),
        (["empty.jsonl"], "no problem"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    Path("empty.jsonl").write_text("", encoding="utf-8")
    Path("one.jsonl").write_text('{"prompt": "x", "answer": "1"}\n', encoding="utf-8")
    assert s2t_eval(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err


# -- sweeps ---------------------------------------------------------------------------------------

GRID = """
slm: bundled
llm: bundled
problems: [bundled, {source: more.jsonl, grader: exact}]
modes: [greedy, s2t, s2t_local]
budgets: [0.05, 0.1]
candidates: [2, 8]
count: 2
scored: 1
max_new_tokens: 40
threads: 1
"""


def test_a_sweep_is_one_report_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All values on the same problems of all tasks; run again, nothing is asked again."""
    (problem,) = problems.problems("test", 1)
    line = json.dumps({"prompt": problem.prompt, "answer": "no"})
    Path("more.jsonl").write_text(line + "\n", encoding="utf-8")
    Path("grid.yaml").write_text(GRID, encoding="utf-8")
    assert s2t_eval(monkeypatch, "grid.yaml", verb="sweep") == 0
    assert "s2t entropy 10% K=2" in capsys.readouterr().out
    found = json.loads(Path("grid/report.json").read_text(encoding="utf-8"))
    assert len(found["rows"]) == 9 and found["problems"] == 3
    assert set(found["sensitivity"]) == {"budget", "K"}
    assert set(found["tasks"]["greedy"]) == {"bundled", "more.jsonl"}
    assert set(found["local_sufficiency"]["local"]) == {
        row["label"] for row in found["rows"] if row["mode"] == "s2t_local"
    }
    page = Path("grid/report.html").read_text(encoding="utf-8")
    assert "Right answers by budget" in page and "By task" in page
    assert "## Sensitivity to the K" in Path("grid/report.md").read_text(encoding="utf-8")
    answers = Path("grid/answers.jsonl").read_text(encoding="utf-8")
    assert s2t_eval(monkeypatch, "grid.yaml", "--json", verb="sweep") == 0
    assert Path("grid/answers.jsonl").read_text(encoding="utf-8") == answers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modes:\n- greedy\n- fast\n", "line 3: modes.1: "),
        ("\nbudgets: [0.1, 7]\n", "line 2: budgets.1: 7: input should be less than"),
        ("modes: greedy\ncandidats: 8\n", "line 2: candidats: no such key; nearest: 'candidates'"),
        ("triggers: [entropy,\n  gut]\n", "line 2: triggers.1: "),
        ("problems:\n- source: x\n  graader: exact\n", "line 3: problems.0.graader: no such key"),
        ("modes: [greedy, greedy]\n", "line 1: modes: 'greedy' is asked for twice"),
        ("modes: [\n", "no YAML"),
        ("- greedy\n", "keys and values"),
    ],
)
def test_a_wrong_sweep_is_refused_with_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    """Before anything is loaded or asked."""
    Path("grid.yaml").write_text(text, encoding="utf-8")
    assert s2t_eval(monkeypatch, "grid.yaml", verb="sweep") == 2
    error = capsys.readouterr().err
    assert says in error and "grid.yaml" in error


def test_the_sweep_of_the_page_is_read() -> None:
    """The documented file must work as it stands."""
    page = (Path(__file__).parents[3] / "services/evaluation/README.md").read_text(encoding="utf-8")
    Path("sweep.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    grid = read_grid(Path("sweep.yaml"))
    assert len(grid.rows(8)) == 2 + 2 * 3 * (4 + 1) and grid.sources == "bundled"


def test_local_selectors_are_compared_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row asks for its own version; the other modes are asked once."""
    runtime = ModelRuntime.load(str(SLM_DIR))
    tokenizer = Tokenizer.load(SLM_DIR)
    registry = Registry(Path("s2t-data/versions"))
    names = []
    for seed in (0, 1):
        values = {"tokenizer_digest": tokenizer.digest, "thresholds": {}}
        names.append(publish(registry, runtime, SelectorKind.PREFIX, seed, **values))
    arguments = ["--slm", "bundled", "--llm", "bundled", "--modes", "greedy,s2t_local"]
    arguments += ["--budget", "0.1", "--count", "2", "--max-new-tokens", "30", "--threads", "1"]
    arguments += ["--selector", ",".join(names), "--out", "out", "--scored", "1"]
    assert s2t_eval(monkeypatch, *arguments) == 0
    assert "untrained" not in capsys.readouterr().err
    found = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    assert [row["version"] for row in found["rows"]] == [None, *names]
    assert [level["value"] for level in found["sensitivity"]["local selector"]] == names
