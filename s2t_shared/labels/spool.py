"""The disk spool: where a writer's entries are safe while Redis is away, or does not confirm that
it has them on disk.

    spool/
      .lock                        held for a moment, to make, adopt or remove a folder
      <node>-<pid>-<random>/       of one writer; node: this boot of this machine
      <writer>/lock                held for as long as the writer lives, however it dies; touched
      <writer>/<number>.entries    a segment: records (length, CRC-32, bytes), appended and synced

A segment is removed when its entries are durable elsewhere. A living writer adopts the folder of a
dead one: one whose lock it gets and, as some shared file systems keep locks to each node, that is
of its own node or was not touched for QUIET_S. Reading ends at a record that a crash cut short:
nobody was promised it. Knows bytes and files; not what the bytes mean.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from s2t_shared.errors import StoreError
from s2t_shared.files import locked, sync

HEADER = struct.Struct("<II")  # length in bytes, CRC-32
SEGMENT_BYTES = 4 << 20  # about; one is read whole
SUFFIX = ".entries"
BEAT_S = 10.0  # a living writer touches its locks so often
QUIET_S = 600.0  # a folder of another node that was not touched for so long belongs to nobody
FOLDER = re.compile(r"([0-9a-f]{8})-\d+-[0-9a-f]{12}")


@dataclass(frozen=True)
class SpoolUsage:
    """What a spool holds."""

    bytes: int
    entries: int


class Spool:
    """One writer's folder under `root`, and the folders that it adopted. Thread-safe.

    max_bytes: bounds all these folders together. Every method raises StoreError where the disk
    refuses.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._node = this_node()
        self._folder = root / f"{self._node}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._lock = threading.Lock()  # of all below
        self._open: IO[bytes] | None = None  # the segment being written: its stream, path and size
        self._path = self._folder
        self._size = 0
        self._segments_made = 0
        self._folder_locks: dict[Path, ExitStack] = {}
        self._next_beat = 0.0
        self._counted: dict[Path, tuple[int, int]] = {}  # segment -> its size then, its entries
        with self._guarded():
            with self._folders_locked():
                self._folder.mkdir()
                lock = _lock_folder(self._folder)
                assert lock is not None, "nobody else knows this folder"
                self._folder_locks[self._folder] = lock
            sync(root)
        self.adopt()

    # -- one segment after the other --------------------------------------------------------------

    def append(self, entries: Sequence[bytes]) -> None:
        """Write entries; they are on disk when the call returns.

        Raises:
            StoreError: `max_bytes` is reached or the disk refuses; then no entry was written.
        """
        records = b"".join(_record(entry) for entry in entries)
        with self._guarded():
            used = sum(path.stat().st_size for path in self._files())
            if used + len(records) > self._max_bytes:
                raise StoreError(
                    f"the label spool {self._root.name!r} is full ({self._max_bytes >> 20} MiB); "
                    "see that Redis answers, or raise labels.spool_mib"
                )
            stream = self._open or self._new_segment()
            try:
                _write_all(stream, records)
                os.fsync(stream.fileno())
            except OSError:
                self._truncate(stream)
                raise
            self._size += len(records)
            if self._size >= SEGMENT_BYTES:
                self._seal()

    def _new_segment(self) -> IO[bytes]:
        self._path = self._folder / f"{self._segments_made:08d}{SUFFIX}"
        self._segments_made += 1
        self._size = 0
        self._open = self._path.open("xb", buffering=0)
        sync(self._folder)
        return self._open

    def _truncate(self, stream: IO[bytes]) -> None:
        """Cut the segment back to what was promised, and end it: after a failed write or fsync
        nobody knows what is on disk."""
        try:
            os.ftruncate(stream.fileno(), self._size)
        finally:
            self._seal()

    def _seal(self) -> None:
        if self._open is None:
            return
        self._open.close()
        self._open = None
        if not self._size:
            self._path.unlink()

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for folder in self._folder_locks:
            files.extend(_segments_in(folder))
        return files

    def segments(self) -> list[Path]:
        """Segments of this writer and of adopted ones, without the one being written. Oldest
        first within a folder."""
        with self._guarded():
            return [path for path in self._files() if self._open is None or path != self._path]

    def seal(self) -> None:
        """End the segment being written; later entries go to a new one."""
        with self._guarded():
            self._seal()

    def read(self, segment: Path) -> list[bytes]:
        """The entries of a segment, up to the first one that a crash cut short."""
        with self._guarded():
            return list(read_records(segment.read_bytes()))

    def remove(self, segment: Path) -> None:
        """Remove a segment whose entries are durable elsewhere."""
        with self._guarded():
            segment.unlink(missing_ok=True)

    def usage(self) -> SpoolUsage:
        """How much is in this writer's folder and in adopted ones."""
        with self._guarded():
            sizes = {path: path.stat().st_size for path in self._files()}
        counts = {}
        for path, size in sizes.items():
            known_size, count = self._counted.get(path, (-1, 0))
            counts[path] = (size, count if size == known_size else _count_records(path))
        self._counted = counts
        return SpoolUsage(sum(sizes.values()), sum(count for _, count in counts.values()))

    # -- folders ----------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Take over the folders of dead writers; release adopted ones that are empty."""
        with self._guarded(), self._folders_locked():
            for folder in self._root.iterdir():
                if folder.is_dir() and self._is_abandoned(folder):
                    lock = _lock_folder(folder)
                    if lock is not None:
                        self._folder_locks[folder] = lock
            for folder in list(self._folder_locks):
                if folder != self._folder and not _segments_in(folder):
                    self._release(folder)

    def _is_abandoned(self, folder: Path) -> bool:
        """Whether its writer must be dead if its lock is free. Both times are of the disk's own
        clock."""
        if folder in self._folder_locks:
            return False
        name = FOLDER.fullmatch(folder.name)
        if name is None or name[1] == self._node:
            return True
        touched = _touched(folder / "lock")
        own = self._folder / "lock"
        own.touch()
        now = own.stat().st_mtime
        return touched is None or now - touched > QUIET_S

    def _beat(self) -> None:
        """Tell other nodes that the writer of these folders lives."""
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + BEAT_S
        for folder in self._folder_locks:
            (folder / "lock").touch()

    def close(self) -> None:
        """Leave what is in the spool to whoever opens it next."""
        with self._guarded():
            self._seal()
            with self._folders_locked():
                for folder in list(self._folder_locks):
                    self._release(folder)

    def _release(self, folder: Path) -> None:
        lock = self._folder_locks.pop(folder)
        try:
            if not _segments_in(folder):
                shutil.rmtree(folder)
        finally:
            lock.close()

    @contextmanager
    def _folders_locked(self) -> Iterator[None]:
        """No other process makes, adopts or removes a folder meanwhile."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)  # labels hold users' text
        with locked(self._root / ".lock"):
            yield

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; what the disk refuses becomes a StoreError."""
        try:
            with self._lock:
                self._beat()
                yield
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(
                f"the label spool {self._root.name!r} cannot be used: {reason}; free or grant "
                "space there"
            ) from error


def this_node() -> str:
    """Eight hex digits that the processes of one boot of one machine share, its containers too."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:
        boot = socket.gethostname()
    return hashlib.sha256(boot.encode()).hexdigest()[:8]


def _touched(file: Path) -> float | None:
    """When a file was last touched; None where there is none."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def _lock_folder(folder: Path) -> ExitStack | None:
    """Lock a folder until the stack is closed. None: its writer lives, or is another user's."""
    with ExitStack() as stack, suppress(PermissionError):
        if stack.enter_context(locked(folder / "lock", wait=False)):
            return stack.pop_all()
    return None


def _segments_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


# -- records --------------------------------------------------------------------------------------


def _record(entry: bytes) -> bytes:
    return HEADER.pack(len(entry), zlib.crc32(entry)) + entry


def read_records(content: bytes) -> Iterator[bytes]:
    """The entries in a segment's bytes, up to the first one that is cut short or damaged."""
    start = 0
    while start + HEADER.size <= len(content):
        length, crc = HEADER.unpack_from(content, start)
        start += HEADER.size
        entry = content[start : start + length]
        if len(entry) < length or zlib.crc32(entry) != crc:
            return
        yield entry
        start += length


def _count_records(segment: Path) -> int:
    """How many records a segment holds, without reading what is in them."""
    count = 0
    with suppress(FileNotFoundError), segment.open("rb") as stream:  # removed meanwhile
        while len(header := stream.read(HEADER.size)) == HEADER.size:
            stream.seek(HEADER.unpack(header)[0], os.SEEK_CUR)
            count += 1
    return count


def _write_all(stream: IO[bytes], content: bytes) -> None:
    view = memoryview(content)
    while view:
        written = stream.write(view) or 0
        view = view[written:]
