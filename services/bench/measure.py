"""Side by side: the sides of a comparison take turns, so that a machine's bad minute hits both."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number over all repeats: median, least and greatest."""

    name: str
    median: float
    low: float
    high: float
    unit: str = ""
    conditions: str = ""


@dataclass(frozen=True)
class Report:
    """What one benchmark found, and on what."""

    title: str
    figures: tuple[Figure, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"machine": machine()}

    def table(self) -> Table:
        table = Table(title=f"{self.title}\n{machine()}", title_justify="left")
        for column in ("what", "median", "min - max", "conditions"):
            table.add_column(
                column,
                justify="left" if column in ("what", "conditions") else "right",
                overflow="fold",
            )
        for f in self.figures:
            table.add_row(
                f.name, f"{f.median:.4g} {f.unit}", f"{f.low:.4g} - {f.high:.4g}", f.conditions
            )
        return table


def figure(name: str, values: Sequence[float], unit: str = "", conditions: str = "") -> Figure:
    return Figure(
        name=name,
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        unit=unit,
        conditions=conditions,
    )


def take_turns(
    sides: Mapping[str, Callable[[], float]],
    repeats: int,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times, in an order that rotates."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(sides[name]())
            on_turn()
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(over, under, strict=True)]


def clock() -> float:
    """Seconds, when everything that was launched is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> str:
    """Hardware and library, as a line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            name = next(
                line.split(":")[1].strip() for line in stream if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores = f"{os.cpu_count()} cores"
    threads = f"{torch.get_num_threads()} torch threads"
    return f"{name}, {cores}{gpu}; {threads}, torch {torch.__version__}"
