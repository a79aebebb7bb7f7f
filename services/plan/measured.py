"""The file that `s2t bench capacity` writes and `s2t plan --measured` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError
from services.plan.costs import ForwardCost, Point, Step, fitted_cost

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Steps of both roles, measured on one machine. points: by role, slm or llm."""

    machine: str
    conditions: str
    slm: str
    llm: str | None
    points: dict[str, list[Point]]

    def costs(self) -> dict[str, ForwardCost]:
        """By role: what fits the points."""
        return {role: fitted_cost(points) for role, points in self.points.items() if points}

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def read_measured(file: Path) -> Measured:
    """Raises ConfigError: unreadable, or not such a file."""
    hint = "give a file that `s2t bench capacity --out` has written"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--measured={str(file)!r}: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise ConfigError(f"--measured={str(file)!r}: no JSON; {hint}") from error
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        points = {role: _points(found) for role, found in content["points"].items()}
        return Measured(**{**content, "points": points})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"--measured={str(file)!r}: {error}; {hint}") from error


def _points(found: list[dict[str, Any]]) -> list[Point]:
    return [Point(Step(**point["step"]), float(point["seconds"])) for point in found]
