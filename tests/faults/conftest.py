"""One stage for each test, and the table of figures behind a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import figures
from tests.faults.stage import Stage
from tests.faults.stage import stage as open_stage


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with open_stage(tmp_path) as opened:
        yield opened


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each test's own outcome stands in the table, too."""
    if report.when == "call" or report.failed:
        name = figures.name_of(report.nodeid)
        figures.PASSED[name] = report.passed and figures.PASSED.get(name, True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.FIGURES:
        terminalreporter.section("faults: goals and figures")
        for line in figures.table():
            terminalreporter.write_line(line)
