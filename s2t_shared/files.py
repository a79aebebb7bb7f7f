"""Durable files and folders, and locks.

A file or folder is written under a temporary name beside its target, synced, and renamed, so that a
crash leaves the old content or the new one. Temporary names begin with a dot and are unique on all
hosts that share the storage. Whoever owns a folder removes the temporaries that a killed writer has
left there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path

# -- locks ----------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on the file `path`, which is created. It ends with the block or the process.

    shared: others may hold a shared lock at the same time. Yields whether the lock is held: always,
    unless `wait` is false and somebody else holds it.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    # NFSv4 grants a shared lock only to a descriptor open for reading, an exclusive one only to one
    # for writing.
    with path.open("a+b") as stream:
        yield lock_stream(stream.fileno(), shared, wait)


def lock_stream(descriptor: int, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed, in every process that inherits it. Returns whether the
    lock is held.

    Raises:
        OSError: the file cannot be locked.
    """
    operation = LOCK_SH if shared else LOCK_EX
    if not wait:
        operation |= LOCK_NB
    try:
        flock(descriptor, operation)
    except BlockingIOError:
        return False
    return True


# -- files ----------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path`, durably. A reader, or a crash, sees the old content or the new
    one."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to. Its file replaces `target`, durably, when the block ends without an
    error; otherwise it is removed."""
    temporary = temporary_name(target)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


# -- folders --------------------------------------------------------------------------------------


def private_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone: what is in them
    quotes users. Folders that are there keep their mode."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill. It becomes `target`, durably, when the block ends without an error;
    otherwise it is removed.

    replace: an old `target` is removed first, so a crash may leave neither.

    Raises:
        FileExistsError: `target` exists, unless it is an empty folder or `replace` is true.
    """
    if not replace:
        _refuse_content(target)
    temporary = temporary_name(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish_folder(temporary, target, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(folder: Path, target: Path, replace: bool = False) -> None:
    """Sync all that is in `folder`, then rename it to `target`.

    For a folder whose name depends on its content; otherwise use `new_folder`.

    Raises:
        FileExistsError: as `new_folder`.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    if replace:
        shutil.rmtree(target, ignore_errors=True)
    try:
        folder.rename(target)
    except OSError:
        _refuse_content(target)
        raise
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. After a crash it is whole, or gone but for a temporary name."""
    temporary = temporary_name(folder)
    folder.rename(temporary)
    shutil.rmtree(temporary)


def _refuse_content(target: Path) -> None:
    if not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


# -- names and disks ------------------------------------------------------------------------------


def temporary_name(target: Path) -> Path:
    """A path beside `target` that no other writer on any host uses."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
