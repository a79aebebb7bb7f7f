"""Files and folders that are there whole or not at all, and locks that work on NFS too."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest

from s2t_shared import files
from s2t_shared.decode.calibrate import store_calibration
from s2t_shared.files import (
    locked,
    new_file,
    new_folder,
    private_folder,
    publish_folder,
    write_atomically,
)
from s2t_shared.labels.known_models import KnownModels, Models
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.spool import Spool
from s2t_shared.policy import Calibration
from s2t_shared.versions.registry import LEFTOVERS, writer_lock
from tests.helpers.rollouts import make_rollout

# -- who reads them -------------------------------------------------------------------------------


def modes(folder: Path, top: Path) -> set[int]:
    """Of a folder and those above it, below `top`."""
    return {f.stat().st_mode & 0o777 for f in (folder, *folder.parents) if top in f.parents}


def test_what_quotes_users_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Lake, versions and known models had the umask's mode: everybody on the machine could read
    prompts and answers. So had data_dir where the spool was made first."""
    before = os.umask(0o022)
    try:
        Lake(tmp_path / "a/data/labels").write([make_rollout(1)])
        Spool(tmp_path / "b/data/spool", 1 << 20).append([b"entry"])
        with writer_lock(tmp_path / "c/data/versions", LEFTOVERS):
            pass
        KnownModels(tmp_path / "d/data/known-models").add(Models("slm", "llm", "tokenizer"))
        store_calibration(tmp_path / "e/data/calibration", "slm", "llm", Calibration({}))
    finally:
        os.umask(before)
    for name in ("a/data/labels", "b/data/spool", "c/data/versions", "d/data/known-models"):
        assert modes(tmp_path / name, tmp_path) == {0o700}, name
    assert modes(tmp_path / "e/data/calibration", tmp_path) == {0o700}


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    """Somebody who shares it with a group meant it."""
    shared = tmp_path / "data"
    shared.mkdir(mode=0o750)
    private_folder(shared / "labels")
    assert shared.stat().st_mode & 0o777 == 0o750


# -- locks ----------------------------------------------------------------------------------------


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as NFSv4 grants them: a shared one to a descriptor open for reading, an exclusive one
    for writing."""
    real = fcntl.flock

    def flock(stream: IO[bytes] | int, kind: int) -> None:
        descriptor = stream if isinstance(stream, int) else stream.fileno()
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        refused = os.O_WRONLY if kind & fcntl.LOCK_SH else os.O_RDONLY
        if mode == refused:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "flock", flock)


@pytest.mark.usefixtures("nfs")
def test_everything_that_locks_works_on_nfs(tmp_path: Path) -> None:
    """`LOCK_SH` on a file opened with "w" is EBADF there: no label reached the lake, and Redis
    grew."""
    lake = Lake(tmp_path / "lake")
    lake.write([make_rollout(1)])
    assert lake.freeze().labels and lake.compact() == 0 and lake.verify() == {}
    spool = Spool(tmp_path / "spool", 1 << 20)
    spool.append([b"x"])
    spool.close()
    with writer_lock(tmp_path / "versions", LEFTOVERS):
        pass


def test_locks_shut_out_whom_they_should(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"kept")
    with ExitStack() as stack:
        assert stack.enter_context(locked(path, shared=True))
        with locked(path, shared=True, wait=False) as second, locked(path, wait=False) as exclusive:
            assert second and not exclusive
    with (
        locked(path),
        locked(path, wait=False) as exclusive,
        locked(path, shared=True, wait=False) as shared,
    ):
        assert not exclusive and not shared
    with locked(path, wait=False) as free:
        assert free
    assert path.read_bytes() == b"kept"


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys, time; from pathlib import Path; from s2t_shared.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with locked(path, wait=False) as held:
            assert not held
        holder.kill()
        holder.wait()
        with locked(path) as held:
            assert held


# -- whole or not at all --------------------------------------------------------------------------


def test_two_hosts_with_the_same_pid_write_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pods often have equal pids, and all proposers write the calibration at their first start:
    were temporaries named by pid, one writer would rename the other's half-written file away."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    target = tmp_path / "calibration.json"
    with new_file(target) as one, new_file(target) as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.write_text("one", encoding="utf-8")
        write_atomically(target, "third")
        other.write_text("other", encoding="utf-8")
    assert target.read_text(encoding="utf-8") == "one" and list(tmp_path.iterdir()) == [target]


def test_a_file_that_failed_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, "old")
    with pytest.raises(RuntimeError), new_file(target) as aside:
        aside.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert target.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [target]


def fill(folder: Path, text: str) -> None:
    (folder / "deeper").mkdir()
    (folder / "deeper" / "file").write_text(text, encoding="utf-8")


def test_a_folder_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a name must not stand for files that never reached the disk."""
    target, synced = tmp_path / "new" / "folder", []
    real = files.sync

    def sync(path: Path) -> None:
        synced.append(
            (path.name if path.name in ("deeper", "file", "new") else "aside", target.exists())
        )
        real(path)

    monkeypatch.setattr(files, "sync", sync)
    with new_folder(target) as aside:
        fill(aside, "whole")
        assert not target.exists() and aside.parent == target.parent
    assert sorted(synced[:-1]) == [("aside", False), ("deeper", False), ("file", False)]
    assert synced[-1] == ("new", True)
    assert (target / "deeper" / "file").read_text(encoding="utf-8") == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_failed_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "folder") as aside:
        fill(aside, "half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    """Neither what was there before, nor what somebody else put there meanwhile; an empty folder
    may be filled."""
    target, file = tmp_path / "folder", tmp_path / "file"
    target.mkdir()
    file.touch()
    with new_folder(target) as aside:
        fill(aside, "first")
    for taken in (target, file):
        with pytest.raises(FileExistsError), new_folder(taken):
            pytest.fail("filled in vain")
    late = tmp_path / "late"
    with pytest.raises(FileExistsError), new_folder(late) as aside:
        fill(aside, "late")
        with new_folder(late) as other:
            fill(other, "early")
    assert (late / "deeper" / "file").read_text(encoding="utf-8") == "early"
    with new_folder(target, replace=True) as aside:
        fill(aside, "second")
        assert (target / "deeper" / "file").read_text(encoding="utf-8") == "first"
    assert (target / "deeper" / "file").read_text(encoding="utf-8") == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file", "late"}


def test_a_folder_may_get_its_name_last(tmp_path: Path) -> None:
    aside = tmp_path / ".aside"
    aside.mkdir()
    fill(aside, "x")
    publish_folder(aside, tmp_path / "v1")
    assert (tmp_path / "v1" / "deeper" / "file").exists() and not aside.exists()
