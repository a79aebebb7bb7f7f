"""The figures of a run of this suite, and the table of all goals that is printed behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from _pytest.mark import ParameterSet

from tests.faults.goals import GOALS

MET = {True: "yes", False: "NO", None: ""}


@dataclass(frozen=True)
class Figure:
    """One line of the table. goal: its id in `GOALS`. is_met: None where it is only told. test: the
    function that measured it."""

    goal: str
    what: str
    measured: str
    wanted: str
    is_met: bool | None
    test: str


FIGURES: list[Figure] = []
PASSED: dict[str, bool] = {}  # of this run, by `file::function` below tests/: whether all passed


def report(goal: str, what: str, measured: str, wanted: str, is_met: bool | None) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    FIGURES.append(Figure(goal, what, measured, wanted, is_met, name_of(test)))


def at_most(goal: str, what: str, value: float, limit: float, unit: str = "") -> None:
    report(goal, what, f"{value:.3g}{unit}", f"<= {limit:g}{unit}", value <= limit)


def at_least(goal: str, what: str, value: float, limit: float, unit: str = "") -> None:
    report(goal, what, f"{value:.3g}{unit}", f">= {limit:g}{unit}", value >= limit)


def name_of(node: str) -> str:
    """ "tests/faults/test_x.py::test_y[short]" -> "faults/test_x.py::test_y"."""
    return node.partition("[")[0].removeprefix("tests/")


def table() -> Iterator[str]:
    """Lines of Markdown: every goal, with what this run measured, or where it is tested."""
    yield "| goal | what | measured | wanted | met | test |"
    yield "|---|---|---|---|---|---|"
    for goal in GOALS:
        yield from lines_of(goal)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    yield f"{os.cpu_count()} cores, load averages at the end {load}"


def lines_of(goal: str) -> Iterator[str]:
    """A line for each figure of this run, and one for each test that measures none."""
    figures = [figure for figure in FIGURES if figure.goal == goal]
    for f in figures:
        yield f"| {goal} | {f.what} | {f.measured} | {f.wanted} | {MET[f.is_met]} | {f.test} |"
    for test in GOALS[goal].tests:
        if test not in {figure.test for figure in figures}:
            met = MET[PASSED.get(test)]
            where = "" if test in PASSED else "not run here; make test"
            yield f"| {goal} | {GOALS[goal].text} | {where} | passes | {met} | {test} |"


def percentile(values: Sequence[float], share: float) -> float:
    """0.0 of nothing."""
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def sizes(short: Sequence[object], long: Sequence[object]) -> list:
    """For `parametrize`: the short forms run with the ordinary tests, the long ones with
    `make faults`. A tuple has a value for each of several names."""
    return [_case("short", values) for values in short] + [
        _case("long", values, pytest.mark.faults) for values in long
    ]


def _case(size: str, values: object, *marks: pytest.MarkDecorator) -> ParameterSet:
    values = values if isinstance(values, tuple) else (values,)
    named = [value for value in values if isinstance(value, str)]
    return pytest.param(*values, id="-".join([size, *named]), marks=marks)
