"""What one setting changes while all others stay: K, budget, trigger, local selector.

A value's figures are means over the rows that have it, with every combination of the other settings
that was asked at all values: on the same problems, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from s2t_shared.statistics import clustered_difference
from services.evaluation.figures import Row
from services.evaluation.modes import ModeSpec

SETTINGS: dict[str, Callable[[ModeSpec], Any]] = {
    "trigger": lambda spec: spec.trigger,
    "budget": lambda spec: spec.budget,
    "K": lambda spec: spec.candidates,
    "local selector": lambda spec: spec.version,
}


@dataclass(frozen=True)
class Level:
    """A setting's value in one mode. right, gain: a mean with the half width of its 95 % interval;
    the gain is over the first value. rows: how many the means are over."""

    mode: str
    value: str
    right: tuple[float, float]
    gain: tuple[float, float]
    trigger_rate: float
    flip_rate: float
    llm_read: float
    rows: int


def levels(rows: Sequence[Row], setting: str) -> list[Level]:
    """A setting's values, mode by mode; none where no mode was asked at two of them."""
    found: list[Level] = []
    for mode in dict.fromkeys(row.spec.name for row in rows if row.spec.trigger):
        of_mode = [row for row in rows if row.spec.name == mode]
        found += _levels_of(mode, of_mode, setting)
    return found


def _levels_of(mode: str, rows: Sequence[Row], setting: str) -> list[Level]:
    table: dict[Any, dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        table.setdefault(SETTINGS[setting](row.spec), {})[_others(row.spec, setting)] = row
    shared = set.intersection(*(set(by_others) for by_others in table.values()))
    if len(table) < 2 or not shared:
        return []
    values = list(table) if setting in ("trigger", "local selector") else sorted(table)
    columns = [_where(table[value], shared) for value in values]
    first = _right(columns[0])
    return [
        _level(mode, _named(setting, value), column, first)
        for value, column in zip(values, columns, strict=True)
    ]


def _where(rows: dict[tuple[Any, ...], Row], shared: set[tuple[Any, ...]]) -> list[Row]:
    return [row for others, row in rows.items() if others in shared]


def _others(spec: ModeSpec, setting: str) -> tuple[Any, ...]:
    return tuple(of(spec) for name, of in SETTINGS.items() if name != setting)


def _right(rows: Sequence[Row]) -> list[float]:
    """By problem: the share of the rows that are right."""
    found: list[float] = np.mean([row.correct for row in rows], axis=0).tolist()
    return found


def _level(mode: str, value: str, rows: Sequence[Row], first: list[float]) -> Level:
    right = _right(rows)
    clusters = rows[0].clusters
    return Level(
        mode=mode,
        value=value,
        right=clustered_difference(right, [0.0] * len(right), clusters),
        gain=clustered_difference(right, first, clusters),
        trigger_rate=float(np.mean([row.trigger_rate for row in rows])),
        flip_rate=float(np.mean([row.flip_rate for row in rows])),
        llm_read=float(np.mean([row.llm_read_per_token for row in rows])),
        rows=len(rows),
    )


def _named(setting: str, value: Any) -> str:
    return f"{value * 100:g}%" if setting == "budget" else str(value)


# -- shown ----------------------------------------------------------------------------------------

HEADER = ("mode", "{}", "right", "gain over the first", "triggered", "flipped", "LLM reads", "rows")


def table(setting: str, found: Sequence[Level]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a setting's table."""
    body = []
    for place, level in enumerate(found):
        is_first = not place or found[place - 1].mode != level.mode
        body.append(
            [
                level.mode,
                level.value,
                f"{level.right[0]:.3f} ± {level.right[1]:.3f}",
                "" if is_first else f"{level.gain[0]:+.3f} ± {level.gain[1]:.3f}",
                f"{level.trigger_rate:.1%}",
                f"{level.flip_rate:.0%}",
                f"{level.llm_read:.0%}",
                str(level.rows),
            ]
        )
    return [name.format(setting) for name in HEADER], body


def figures_of(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """All settings' levels as plain values; a setting with one value is left out."""
    found = {setting: levels(rows, setting) for setting in SETTINGS}
    return {setting: [asdict(level) for level in of] for setting, of in found.items() if of}
