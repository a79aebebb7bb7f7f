"""`s2t eval`: from a file of questions to a report, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from s2t_shared.bundled import problems
from services.cli import app


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def s2t_eval(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["s2t", "eval", *arguments])
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
    assert "s2t entropy 5%" in shown.out and "greedy is right on" in shown.out
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
