"""What a setting changes: means over the same other settings, paired."""

from __future__ import annotations

import pytest

from s2t_shared.types import Usage
from services.evaluation.figures import Row
from services.evaluation.modes import ModeSpec
from services.evaluation.records import Record
from services.evaluation.sensitivity import figures_of, levels, table


def row(mode: str, budget: float, k: int, right: int, trigger: str = "entropy") -> Row:
    spec = ModeSpec(name=mode, trigger=trigger, budget=budget, candidates=k)
    records = []
    for place in range(10):
        usage = Usage(completion_tokens=10, triggers=1)
        record = Record(row=spec.label, problem_id=str(place), correct=place < right, usage=usage)
        records.append((record,))
    clusters = tuple(map(str, range(10)))
    return Row(spec=spec, records=tuple(records), clusters=clusters, seconds=1.0)


GRID = [
    row("s2t", 0.05, 8, 8),
    row("s2t", 0.01, 8, 4),
    row("s2t", 0.01, 2, 2),
    row("s2t", 0.05, 2, 6),
]


def test_a_value_is_the_mean_over_the_other_settings() -> None:
    """In ascending order; the gain is over the first value, on the same problems."""
    low, high = levels(GRID, "budget")
    assert (low.value, high.value, low.rows) == ("1%", "5%", 2)
    assert low.right[0] == pytest.approx(0.3) and high.right[0] == pytest.approx(0.7)
    assert high.gain[0] == pytest.approx(0.4) and high.gain[1] < 0.4
    assert [level.value for level in levels(GRID, "K")] == ["2", "8"]
    assert levels(GRID, "trigger") == []  # one value only


def test_a_row_that_others_lack_is_left_out() -> None:
    """A mean over other settings at one value only would compare those, too."""
    low, high = levels([*GRID, row("s2t", 0.05, 4, 0)], "budget")
    assert high.right[0] == pytest.approx(0.7) and high.rows == low.rows == 2


def test_modes_are_kept_apart() -> None:
    found = levels([*GRID, row("takeover", 0.01, 8, 1), row("takeover", 0.05, 8, 9)], "budget")
    assert [level.mode for level in found] == ["s2t", "s2t", "takeover", "takeover"]
    header, body = table("budget", found)
    assert header[1] == "budget" and [cells[3] == "" for cells in body] == [True, False] * 2
    assert set(figures_of(GRID)) == {"budget", "K"}
