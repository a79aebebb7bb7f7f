"""The table of goals is whole, and names tests that are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults import figures
from tests.faults.goals import GOALS

TESTS = Path(__file__).parent.parent
README = Path(__file__).parent / "README.md"
IDS = [f"R{n}" for n in range(1, 18)] + [f"S{n}" for n in range(1, 14)]


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_each_goal_names_tests_that_are_there() -> None:
    """A goal whose test was renamed would look held."""
    assert list(GOALS) == IDS
    for goal, held in GOALS.items():
        for name in held.tests:
            file, _, function = name.partition("::")
            assert function in functions_of(TESTS / file), f"{goal}: {name}"


def test_the_table_has_every_goal_whatever_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make faults` printed only what it had measured: who read it missed half of the goals."""
    monkeypatch.setattr(figures, "FIGURES", [])
    monkeypatch.setattr(figures, "PASSED", {})
    figures.at_most("R16", "memory", 2.0, 1.0, " MB/min")
    lines = list(figures.table())
    for goal in IDS:
        assert any(line.startswith(f"| {goal} |") for line in lines), goal
    (measured,) = (line for line in lines if "2 MB/min" in line)
    assert "| NO |" in measured and "test_the_table_has_every_goal_whatever_was_run" in measured


def test_the_page_tells_of_every_goal() -> None:
    """With the words of the table, so that one page says what is promised."""
    page = README.read_text(encoding="utf-8")
    for goal, held in GOALS.items():
        assert f"| {goal} | {held.text} |" in page, goal
