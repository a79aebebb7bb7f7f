"""Files and folders that are there whole or not at all, and locks that die with their holder.

Everything is written under a temporary name beside its target, synced, and renamed. Temporary names
are unique on all hosts that share the storage, and begin with a dot. What a killed writer leaves
under one is the owner's to sweep.
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


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on the file `path`, which is created; it ends with the block, or with the
    process.

    `shared`: others may hold it too, if theirs is shared. Yields whether it is held: always, unless
    `wait` is false and somebody else holds it.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    kind = LOCK_SH if shared else LOCK_EX
    # NFSv4 grants a shared lock only to a descriptor open for reading, an exclusive one only to one
    # for writing.
    with path.open("a+b") as stream:
        try:
            flock(stream, kind if wait else kind | LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` so that a reader, or a crash, sees the old or the new content,
    never a part."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to; the file there replaces `target`, durably, when the block ends well, and
    goes otherwise."""
    aside = temporary_name(target)
    try:
        yield aside
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill; it becomes `target`, durably, when the block ends well, and goes otherwise.

    `replace`: an old `target` is removed first, so a crash may leave neither.

    Raises:
        FileExistsError: `target` exists, unless it is an empty folder or `replace` is true.
    """
    if not replace:
        _refuse_content(target)
    aside = temporary_name(target)
    try:
        aside.mkdir(parents=True)
        yield aside
        publish_folder(aside, target, replace)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish_folder(aside: Path, target: Path, replace: bool = False) -> None:
    """Sync all that is in `aside`, then give it its name; for a folder whose name depends on its
    content.

    Raises:
        FileExistsError: as `new_folder`.
    """
    for folder, _, names in os.walk(aside):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    if replace:
        shutil.rmtree(target, ignore_errors=True)
    try:
        aside.rename(target)
    except OSError:
        _refuse_content(target)
        raise
    sync(target.parent)


def temporary_name(target: Path) -> Path:
    """Beside `target`, and nobody else's on any host."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def sync(path: Path) -> None:
    """Make a file's content, or the names inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_content(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
