"""No token and no score changes: the engine of today against recorded Step traces (law: a refactor
proves itself)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.decode.golden import traces

# Relative; absolute below 1. The traces were recorded on an Intel CPU: on an AMD one the same code
# gives scores that differ by 2e-5. On one machine they are equal bit by bit, see CONTRIBUTING.md.
TOLERANCE = 1e-4


def differences(now: Any, then: Any, where: str = "") -> Iterator[str]:
    """Where two traces differ; floats may differ by rounding."""
    if isinstance(then, float) and isinstance(now, float):
        if now != pytest.approx(then, rel=TOLERANCE, abs=TOLERANCE):
            yield f"{where}: {now} instead of {then}"
    elif isinstance(then, dict) and isinstance(now, dict):
        if now.keys() != then.keys():
            yield f"{where}: has {sorted(now)} instead of {sorted(then)}"
        for key in now.keys() & then.keys():
            yield from differences(now[key], then[key], f"{where}.{key}")
    elif isinstance(then, list) and isinstance(now, list):
        if len(now) != len(then):
            yield f"{where}: {len(now)} instead of {len(then)} entries"
        for i, (a, b) in enumerate(zip(now, then, strict=False)):
            yield from differences(a, b, f"{where}[{i}]")
    elif now != then:
        yield f"{where}: {now!r} instead of {then!r}"


def check(name: str, now: dict[str, Any]) -> None:
    then = json.loads((traces.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    found = list(differences(now, then))
    assert not found, f"{len(found)} differences, first: " + "; ".join(found[:5])


@pytest.mark.slow
def test_the_bundled_pair_decodes_as_recorded() -> None:
    check("bundled_pair", traces.bundled_pair())


@pytest.mark.slow
def test_a_random_pair_decodes_as_recorded(tmp_path: Path) -> None:
    check("random_pair", traces.random_pair(tmp_path))


def test_the_recording_covers_what_it_says() -> None:
    """Guards the two tests above: triggers fire, local selectors flip tokens, drafts are
    rejected."""
    recorded = json.loads((traces.FOLDER / "random_pair.json").read_text(encoding="utf-8"))
    assert set(recorded) == {case.name for case in traces.cases()}
    steps = [step for answers in recorded.values() for answer in answers for step in answer]
    assert {step["by"] for step in steps} == {"slm", "sampler", "llm", "local"}
    flipped = [step for step in steps if "scores" in step and step["token"] != step["slm_top"]]
    assert len(flipped) > 100
