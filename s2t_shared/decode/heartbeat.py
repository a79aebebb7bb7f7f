"""Says for how long a loop has not turned. Knows a clock only."""

from __future__ import annotations

import time
from collections.abc import Callable


class Heartbeat:
    """Beaten by the loop that it watches, read from any thread. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None

    def beat(self) -> None:
        """The loop turns."""
        self._last = self._clock()

    def rest(self) -> None:
        """The loop waits for work: that may take as long as it likes."""
        self._last = None

    @property
    def silent_s(self) -> float:
        """Seconds since the last beat; 0 at rest."""
        last = self._last
        return 0.0 if last is None else self._clock() - last
