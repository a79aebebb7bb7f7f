"""Values that are read from files, and read again when a file changes: tokens, certificates.

Nothing runs in the background: whoever asks for the value looks, once a second at most.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from s2t_shared.errors import ConfigError

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
GONE_S = 10.0  # a file that is replaced, by an editor or by Kubernetes, is there again much sooner
T = TypeVar("T")
Signature = tuple[tuple[int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """A value read from `files`. May be used from several threads.

    A change that cannot be used (a file half written, a key without its certificate) leaves the
    last good value in force, is logged, and is looked at again. A mounted Kubernetes secret changes
    by a symbolic link: it is followed.

    without: the value when a file has been gone for `GONE_S`, until it is there again. None: the
    last good value stays then too.
    """

    def __init__(
        self,
        files: Sequence[Path],
        read: Callable[[], T],
        clock: Callable[[], float] = time.monotonic,
        *,
        without: T | None = None,
    ) -> None:
        """Raises ConfigError: as `read`."""
        self._files = tuple(files)
        self._read = read
        self._clock = clock
        self._look_at = clock() + LOOK_EVERY_S
        self._signature = self._look()  # before the reading: what changes meanwhile is read again
        self._refused = ""
        self._value = read()
        self._without = without
        self._gone_since: float | None = None

    @property
    def value(self) -> T:
        """As of a second ago, or later."""
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + LOOK_EVERY_S
            signature = self._look()
            if self._is_gone(signature):
                self._forget()
            elif signature != self._signature:
                self._read_again(signature)
        return self._value

    def _is_gone(self, signature: Signature) -> bool:
        """Whether a file is gone, and has been for so long that somebody means it."""
        now = self._clock()
        if None not in signature:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = now
        return self._gone_since is not None and now - self._gone_since >= GONE_S

    def _forget(self) -> None:
        if self._without is None or self._value == self._without:
            return
        self._value = self._without
        log.critical(
            "%s is gone since %.0f s: what was read from it is no longer in force; write it again",
            self._names,
            GONE_S,
        )

    @property
    def _names(self) -> str:
        return ", ".join(file.name for file in self._files)

    def _read_again(self, signature: Signature) -> None:
        names = self._names
        try:
            self._value = self._read()
        except ConfigError as error:
            if str(error) != self._refused:
                log.error("%s changed, and what was read before stays in force: %s", names, error)
            self._refused = str(error)
            return
        self._signature = signature
        self._refused = ""
        log.info("%s changed and was read again", names)

    def _look(self) -> Signature:
        return tuple(map(_signature_of, self._files))


def _signature_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_bytes(file: Path) -> bytes:
    """Raises ConfigError: the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"security file {file.name!r} cannot be read: {error.strerror}"
        ) from error
