"""What a training worker reports to the command that waits for it, on whatever node it runs.

<job folder>/progress.json   where the run stands, rewritten by rank 0
             failure.json    the error that ended one of several workers
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from s2t_shared import errors
from s2t_shared.errors import S2TError
from s2t_shared.files import write_atomically

PROGRESS = "progress.json"
FAILURE = "failure.json"
INTERVAL_S = 0.5


# -- progress -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Where a running job stands.

    loss: of the last step. validation_loss, agree_at_1: at the last validation.
    """

    step: int
    steps: int
    loss: float
    validation_loss: float
    agree_at_1: float


OnProgress = Callable[[TrainProgress], None]


class ProgressWriter:
    """Writes progress at most every `INTERVAL_S`, and the last step."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / PROGRESS
        self._written_at = 0.0

    def write(self, progress: TrainProgress) -> None:
        now = time.monotonic()
        if now - self._written_at > INTERVAL_S or progress.step == progress.steps:
            self._written_at = now
            write_atomically(self._file, json.dumps(asdict(progress)))


@contextmanager
def watched_progress(folder: Path, on_progress: OnProgress) -> Iterator[None]:
    """Call `on_progress`, from a thread, whenever rank 0 reports; once more at the end."""
    file = folder / PROGRESS
    file.unlink(missing_ok=True)
    stop = threading.Event()
    seen = ""

    def look() -> None:
        nonlocal seen
        with suppress(OSError):
            text = file.read_text(encoding="utf-8")
            if text != seen:
                seen = text
                on_progress(TrainProgress(**json.loads(text)))

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


# -- failure --------------------------------------------------------------------------------------


def failure_of(error: S2TError) -> dict[str, str]:
    """The error as JSON values."""
    return {"error": str(error), "kind": type(error).__name__}


def error_of(failure: dict[str, str]) -> S2TError:
    """The error that `failure_of` described."""
    return cast("S2TError", vars(errors)[failure["kind"]](failure["error"]))


def write_failure(folder: Path, error: S2TError) -> None:
    """Note the error that ends this worker, where the folder can be written."""
    with suppress(OSError):
        write_atomically(folder / FAILURE, json.dumps(failure_of(error)))


def read_failure(folder: Path) -> S2TError | None:
    """The noted error, or None."""
    with suppress(OSError, ValueError, LookupError):
        return error_of(json.loads((folder / FAILURE).read_text(encoding="utf-8")))
    return None


def clear_failure(folder: Path) -> None:
    """Remove what an earlier attempt noted."""
    (folder / FAILURE).unlink(missing_ok=True)
