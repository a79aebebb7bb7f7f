"""Whether a store is worth a look while an answer waits: a circuit breaker.

Closed, it is asked. A look that fails, or a few slow ones in a row, open it; then nobody waits for
the store. A thread, which lives as long as the breaker is open, pings it, less and less often, and
closes the breaker when a ping comes back fast. So an outage costs answers one look, not one every
now and then. Knows no Redis.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from s2t_shared.errors import StoreError

log = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 2.0
SLOW_LOOKS = 3


class LookupBreaker:
    """The breaker of one store. Thread-safe.

    ping: asks the store for a sign of life; raises StoreError where none comes. slow_s: a look that
    takes longer costs more than it saves.
    """

    def __init__(self, ping: Callable[[], None], slow_s: float) -> None:
        self._ping = ping
        self._slow_s = slow_s
        self._lock = threading.Lock()  # of all below
        self._is_closed = True
        self._slow_looks = 0
        self._pause_s = FIRST_PAUSE_S
        self._ending = threading.Event()
        self._prober: threading.Thread | None = None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def looked(self, took_s: float) -> None:
        """A look was answered."""
        with self._lock:
            if took_s <= self._slow_s:
                self._slow_looks = 0
                self._pause_s = FIRST_PAUSE_S
                return
            self._slow_looks += 1
            if self._slow_looks >= SLOW_LOOKS:
                self._open(f"{SLOW_LOOKS} in a row took more than {self._slow_s * 1000:.0f} ms")

    def failed(self, error: StoreError) -> None:
        """A look was not answered."""
        with self._lock:
            self._open(str(error))

    def close(self) -> None:
        """End the thread, if there is one."""
        self._ending.set()
        if self._prober is not None:
            self._prober.join()

    def _open(self, reason: str) -> None:
        if not self._is_closed or self._ending.is_set():
            return
        self._is_closed = False
        log.warning("selections are not looked up until the store answers fast: %s", reason)
        self._prober = threading.Thread(target=self._probe, name="selection-probe", daemon=True)
        self._prober.start()

    def _probe(self) -> None:
        while not self._ending.wait(self._pause_s * random.uniform(0.5, 1.0)):
            if self._is_fast():
                with self._lock:
                    self._slow_looks = 0
                    self._is_closed = True
                log.info("selections are looked up again")
                return
            with self._lock:
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _is_fast(self) -> bool:
        started = time.monotonic()
        try:
            self._ping()
        except StoreError:
            return False
        return time.monotonic() - started <= self._slow_s
