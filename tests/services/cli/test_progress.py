"""Progress of a verb: lines where there is no terminal, with the rate of this start only."""

from __future__ import annotations

import pytest

from services.cli import progress as module
from services.cli.progress import progress


def test_lines_now_and_then_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with progress("prompts", 100) as shown:
        shown.update(20)  # done by an earlier start
        for done in range(21, 61):
            clock[0] += 1.0
            shown.update(done, note=f"{done} labels")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["s2t: 50 of 100 prompts, 50 labels, about 0.8 min left"]


def test_the_end_of_long_work_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with progress("steps", None) as shown:
        for done in (1, 2, 3):
            clock[0] += 31.0
            shown.update(done, total=3, note="loss 1.0")
    assert capsys.readouterr().err.splitlines()[-1] == "s2t: 3 of 3 steps, loss 1.0"


def test_quick_or_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with progress("answers", 2, quiet) as shown:
            shown.advance()
            shown.advance()
        assert shown.done == 2
    assert capsys.readouterr().err == ""
