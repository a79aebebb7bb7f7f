"""The figures of a run of this suite, and the table that is printed behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from _pytest.mark import ParameterSet


@dataclass(frozen=True)
class Figure:
    """One line of the table. goal: its id in the list of goals. is_met: None where it is only
    told."""

    goal: str
    what: str
    measured: str
    wanted: str
    is_met: bool | None


FIGURES: list[Figure] = []


def report(goal: str, what: str, measured: str, wanted: str, is_met: bool | None) -> None:
    FIGURES.append(Figure(goal, what, measured, wanted, is_met))


def at_most(goal: str, what: str, value: float, limit: float, unit: str = "") -> None:
    report(goal, what, f"{value:.3g}{unit}", f"<= {limit:g}{unit}", value <= limit)


def at_least(goal: str, what: str, value: float, limit: float, unit: str = "") -> None:
    report(goal, what, f"{value:.3g}{unit}", f">= {limit:g}{unit}", value >= limit)


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| goal | what | measured | wanted | met |"
    yield "|---|---|---|---|---|"
    for f in FIGURES:
        met = {True: "yes", False: "NO", None: ""}[f.is_met]
        yield f"| {f.goal} | {f.what} | {f.measured} | {f.wanted} | {met} |"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    yield f"{os.cpu_count()} cores, load averages at the end {load}"


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
