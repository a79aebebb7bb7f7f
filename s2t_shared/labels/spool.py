"""The disk spool: where a producer's entries are safe while Redis is away, or cannot say that it
has them on disk.

    spool/ .lock             held for a moment, to make, adopt or remove a folder <writer>/lock
      held for as long as the writer lives, however it dies <writer>/<number>.entries   a segment:
      records (length, CRC-32, bytes), appended, fsynced, never changed

A segment is removed when its entries are durable elsewhere. The folder of a dead writer is adopted
by a living one. A record that a crash cut short was never promised: reading ends there. Knows bytes
and files; not what they mean.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from s2t_shared.errors import StoreError
from s2t_shared.files import locked, sync

HEADER = struct.Struct("<II")  # length in bytes, CRC-32
SEGMENT_BYTES = 4 << 20  # about; one is read whole
SUFFIX = ".entries"


class Spool:
    """One writer's folder under `root`, and those it adopted; `max_bytes` bounds them together.
    Thread-safe.

    Raises:
        StoreError: `root` cannot be written.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._folder = root / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._lock = threading.Lock()  # of what follows
        self._open: IO[bytes] | None = None
        self._path, self._size, self._made = self._folder, 0, 0
        self._held: dict[Path, ExitStack] = {}  # folder -> its lock
        with self._guarded():
            with self._alone():
                self._folder.mkdir()
                lock = _hold(self._folder)
                assert lock is not None, "nobody else knows this folder"
                self._held[self._folder] = lock
            sync(root)
        self.adopt()

    def append(self, entries: Sequence[bytes]) -> None:
        """Returns once all entries are on disk.

        Raises: StoreError: `max_bytes` is reached or the disk refuses. None of the entries is kept
            then.
        """
        records = b"".join(HEADER.pack(len(entry), zlib.crc32(entry)) + entry for entry in entries)
        with self._guarded():
            if sum(path.stat().st_size for path in self._files()) + len(records) > self._max_bytes:
                raise StoreError(
                    f"the label spool {self._root.name!r} is full ({self._max_bytes >> 20} MiB); "
                    "see that Redis answers, or raise labels.spool_mib"
                )
            if self._open is None:
                self._path = self._folder / f"{self._made:08d}{SUFFIX}"
                self._made += 1
                self._open, self._size = self._path.open("xb", buffering=0), 0
                sync(self._folder)
            try:
                _write_all(self._open, records)
                os.fsync(self._open.fileno())
            except OSError:
                self._abandon()
                raise
            self._size += len(records)
            if self._size >= SEGMENT_BYTES:
                self._seal()

    def _abandon(self) -> None:
        """After a failed write or fsync nobody knows what is on disk: back to what was promised,
        and a new segment."""
        assert self._open is not None
        try:
            os.ftruncate(self._open.fileno(), self._size)
        finally:
            self._seal()

    def _seal(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
            if not self._size:
                self._path.unlink()

    def _files(self) -> list[Path]:
        return [path for folder in list(self._held) for path in sorted(folder.glob(f"*{SUFFIX}"))]

    def segments(self) -> list[Path]:
        """What waits here, oldest first, of this writer and of those it adopted, without the one
        being written.

        Raises:
            StoreError: the disk refuses.
        """
        with self._guarded():
            return [path for path in self._files() if self._open is None or path != self._path]

    def seal(self) -> None:
        """What comes later goes to another segment.

        Raises:
            StoreError: the disk refuses.
        """
        with self._guarded():
            self._seal()

    def read(self, segment: Path) -> list[bytes]:
        """The entries of a segment, up to the first one that a crash cut short.

        Raises:
            StoreError: the disk refuses.
        """
        with self._guarded():
            return list(_records(segment.read_bytes()))

    def remove(self, segment: Path) -> None:
        """The segment's entries are durable elsewhere.

        Raises:
            StoreError: the disk refuses.
        """
        with self._guarded():
            segment.unlink(missing_ok=True)

    def adopt(self) -> None:
        """Take over the folders of writers that have died; let go of adopted ones that are empty.

        Raises:
            StoreError: the disk refuses.
        """
        with self._guarded(), self._alone():
            for folder in self._root.iterdir():
                if (
                    folder.is_dir()
                    and folder not in self._held
                    and (lock := _hold(folder)) is not None
                ):
                    self._held[folder] = lock
            for folder in [
                f for f in self._held if f != self._folder and not any(f.glob(f"*{SUFFIX}"))
            ]:
                self._release(folder)

    def close(self) -> None:
        """Leave what waits to whoever opens the spool next.

        Raises:
            StoreError: the disk refuses.
        """
        with self._guarded():
            self._seal()
            with self._alone():
                for folder in list(self._held):
                    self._release(folder)

    def _release(self, folder: Path) -> None:
        lock = self._held.pop(folder)
        try:
            if not any(folder.glob(f"*{SUFFIX}")):
                shutil.rmtree(folder)
        finally:
            lock.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While folders come, change hands or go."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)  # labels hold users' text
        with locked(self._root / ".lock"):
            yield

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; what the disk refuses becomes a StoreError."""
        try:
            with self._lock:
                yield
        except OSError as error:
            raise StoreError(
                f"the label spool {self._root.name!r} cannot be used: {error.strerror or error}; free or "
                "grant space there"
            ) from error


def _hold(folder: Path) -> ExitStack | None:
    """Lock a folder until the stack is closed; None: its writer lives, or is another user's."""
    with ExitStack() as stack, suppress(PermissionError):
        if stack.enter_context(locked(folder / "lock", wait=False)):
            return stack.pop_all()
    return None


def _write_all(stream: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[stream.write(view) or 0 :]


def _records(content: bytes) -> Iterator[bytes]:
    at = 0
    while at + HEADER.size <= len(content):
        length, crc = HEADER.unpack_from(content, at)
        entry = content[at + HEADER.size : at + HEADER.size + length]
        if len(entry) < length or zlib.crc32(entry) != crc:
            return
        yield entry
        at += HEADER.size + length
