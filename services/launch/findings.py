"""What a check of `s2t doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """OK; WARN: it works, but not in every situation; FAIL: it does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """Result of one check. detail: what was found. mend: what to do about it, "" where nothing."""

    what: str
    level: Level
    detail: str
    mend: str = ""


def ok(what: str, detail: str) -> Finding:
    return Finding(what, Level.OK, detail)


def warn(what: str, detail: str, mend: str) -> Finding:
    return Finding(what, Level.WARN, detail, mend)


def fail(what: str, detail: str, mend: str = "") -> Finding:
    return Finding(what, Level.FAIL, detail, mend)
