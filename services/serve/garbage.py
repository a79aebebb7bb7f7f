"""Garbage collection in processes that serve."""

from __future__ import annotations

import gc


def spare_what_is_loaded() -> None:
    """Never again look for garbage in what the process has by now: libraries and models.

    They are half a million objects. Python looks through all it has now and then, which takes a few
    tenths of a second, on a busy machine whole ones, and meanwhile no thread moves: no stream, no
    refusal, no heartbeat. Call it once, when a process begins to serve.
    """
    gc.collect()
    gc.freeze()
