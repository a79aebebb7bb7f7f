"""One way to show progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 30.0


@dataclass
class Progress:
    """How far a piece of work is. `report` is called after each change.

    total: None while it is not known. note: figures that are shown beside it.
    """

    what: str
    total: int | None
    report: Callable[[Progress], None]
    done: int = 0
    note: str = ""
    _began: float = field(default_factory=time.monotonic)
    _began_at: int | None = None

    def advance(self) -> None:
        """One more is done."""
        self.update(self.done + 1)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """So many are done. The first call says what earlier starts had done already."""
        if self._began_at is None:
            self._began_at = min(done, self.done) if self.done else done
            self._began = time.monotonic()
        self.done = done
        self.total = total if total is not None else self.total
        self.note = note
        self.report(self)

    @property
    def seconds(self) -> float:
        """Since the first call."""
        return max(1e-3, time.monotonic() - self._began)

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None while nothing is known."""
        done = self.done - (self._began_at or 0)
        if self.total is None or done <= 0:
            return None
        return (self.total - self.done) / done * self.seconds


@contextmanager
def progress(what: str, total: int | None, quiet: bool = False) -> Iterator[Progress]:
    """Show the progress of a block of work on stderr; `quiet` shows nothing."""
    console = Console(stderr=True)
    if quiet:
        yield Progress(what, total, lambda now: None)
    elif not console.is_terminal:
        yield Progress(what, total, _Lines())
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console) as bar:
            task: Any = bar.add_task(what, total=total, note="")

            def show(now: Progress) -> None:
                bar.update(task, total=now.total, completed=now.done, note=now.note)

            yield Progress(what, total, show)


class _Lines:
    """A line every half minute, and one at the end of work that took so long."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._any = False

    def __call__(self, now: Progress) -> None:
        ended = self._any and now.done == now.total
        if time.monotonic() - self._last < LINE_EVERY_S and not ended:
            return
        self._last = time.monotonic()
        self._any = True
        total = now.total if now.total is not None else "?"
        note = f", {now.note}" if now.note else ""
        left = now.seconds_left
        time_left = f", about {left / 60:.1f} min left" if left else ""
        line = f"s2t: {now.done} of {total} {now.what}{note}{time_left}"
        print(line, file=sys.stderr, flush=True)
