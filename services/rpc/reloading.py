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
T = TypeVar("T")
Signature = tuple[tuple[int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """A value read from `files`. May be used from several threads.

    A change that cannot be used (a file half written, a key without its certificate) leaves the
    last good value in force, is logged, and is looked at again. A mounted Kubernetes secret changes
    by a symbolic link: it is followed.
    """

    def __init__(
        self,
        files: Sequence[Path],
        read: Callable[[], T],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError: as `read`."""
        self._files = tuple(files)
        self._read = read
        self._clock = clock
        self._look_at = clock() + LOOK_EVERY_S
        self._signature = self._look()  # before the reading: what changes meanwhile is read again
        self._refused = ""
        self._value = read()

    @property
    def value(self) -> T:
        """As of a second ago, or later."""
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + LOOK_EVERY_S
            signature = self._look()
            if signature != self._signature:
                self._read_again(signature)
        return self._value

    def _read_again(self, signature: Signature) -> None:
        names = ", ".join(file.name for file in self._files)
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
