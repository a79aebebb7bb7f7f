"""How findings of `s2t doctor` look: one line each as they come, and how to mend what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from services.cli.options import wide_console
from services.launch.findings import Finding, Level

MARKS = {
    Level.OK: "[green]ok[/green]",
    Level.WARN: "[bold yellow]WARN[/bold yellow]",
    Level.FAIL: "[bold red]FAIL[/bold red]",
}
NAME_WIDTH = 18


def show_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Print findings as they are found, then how many there were of each level."""
    console = wide_console()
    shown = []
    for finding in findings:
        line = Table.grid(padding=(0, 1))
        line.add_column(width=4)
        line.add_column(width=NAME_WIDTH)
        line.add_column(overflow="fold")
        text = escape(finding.detail)
        if finding.mend:
            text += f"\n[cyan]-> {escape(finding.mend)}[/cyan]"
        line.add_row(MARKS[finding.level], escape(finding.what), text)
        console.print(Padding(line, (0, 0)))
        shown.append(finding)
    counts = Counter(finding.level for finding in shown)
    console.print(
        f"{counts[Level.OK]} well, {counts[Level.WARN]} to look at, {counts[Level.FAIL]} to mend"
    )
    return shown
