"""The spool: what was acknowledged is read back, whatever was cut short; the living take over from
the dead."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t_shared.errors import StoreError
from s2t_shared.labels import spool as spool_module
from s2t_shared.labels import spool as spooling
from s2t_shared.labels.spool import HEADER, Spool, SpoolUsage

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def everything(spool: Spool) -> list[bytes]:
    spool.seal()
    return [entry for segment in spool.segments() for entry in spool.read(segment)]


@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    batches=st.lists(st.lists(st.binary(max_size=50), max_size=4), max_size=6),
    limit=st.integers(1, 100),
    seal=st.booleans(),
)
def test_reads_back_what_was_appended_in_order(
    batches: list[list[bytes]],
    limit: int,
    seal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", limit)
    spool = Spool(tmp_path, MIB)
    appended: list[bytes] = []
    for batch in batches:
        spool.append(batch)
        appended += batch
        size = sum(HEADER.size + len(entry) for entry in appended)
        assert spool.usage() == SpoolUsage(size, len(appended))
        if seal:
            spool.seal()
    assert everything(spool) == [entry for batch in batches for entry in batch]
    for segment in spool.segments():
        spool.remove(segment)
    assert spool.usage() == SpoolUsage(0, 0)
    spool.close()
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


@given(cut=st.integers(1, 60), flip=st.booleans())
@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_a_record_cut_short_or_changed_ends_the_reading(
    cut: int, flip: bool, tmp_path: Path
) -> None:
    """A crash in the middle of a write leaves any part of it, and any bytes."""
    spool = Spool(tmp_path, MIB)
    spool.append([b"first" * 3, b"second" * 3, b"third" * 3])
    assert spool.segments() == []  # it is still being written
    spool.seal()
    [segment] = spool.segments()
    content = segment.read_bytes()
    left = bytearray(content if flip else content[:-cut])
    if flip:
        left[-cut] ^= 1
    segment.write_bytes(left)
    whole = [b"first" * 3, b"second" * 3, b"third" * 3]
    damaged = len(content) - cut
    ends = [23, 49, 72]
    assert spool.read(segment) == [
        entry for entry, end in zip(whole, ends, strict=True) if end <= damaged
    ]
    spool.remove(segment)
    spool.close()


def test_full_refuses_whole_batches_and_has_room_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 100)
    spool.append([b"x" * 40])
    with pytest.raises(StoreError, match="is full.*labels.spool_mib"):
        spool.append([b"y" * 20, b"z" * 40])
    assert everything(spool) == [b"x" * 40]
    spool.remove(spool.segments()[0])
    spool.append([b"y" * 20, b"z" * 40])
    assert everything(spool) == [b"y" * 20, b"z" * 40]


def test_a_failed_write_spoils_neither_what_was_before_nor_what_comes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    spool.append([b"before"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(StoreError, match="File too large; free"):
            spool.append([b"lost", b"x" * 100])
        with pytest.raises(StoreError):
            spool.append([b"x" * 100])  # in a segment of its own
        spool.append([b"small"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    spool.append([b"after"])
    assert everything(spool) == [b"before", b"small", b"after"]


def test_a_failed_sync_was_no_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    spool = Spool(tmp_path, MIB)
    spool.append([b"before"])
    with monkeypatch.context() as patch:
        patch.setattr("s2t_shared.labels.spool.os.fsync", broken)
        with pytest.raises(StoreError, match="Input/output error"):
            spool.append([b"lost"])
    spool.append([b"after"])
    assert everything(spool) == [b"before", b"after"]


def test_a_new_segment_has_its_name_before_the_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a file without a name is lost, however well it was synced."""
    synced: list[Path] = []
    real = spooling.sync
    monkeypatch.setattr(spooling, "sync", lambda path: (synced.append(path), real(path)))
    spool = Spool(tmp_path, MIB)
    synced.clear()
    spool.append([b"a"])
    [segment] = tmp_path.rglob(f"*{spooling.SUFFIX}")
    assert segment.parent in synced


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="label spool 'spool' cannot be used"):
        Spool(tmp_path / "file" / "spool", MIB)


WORKER = """
import sys, os, signal
sys.path.insert(0, {root!r})
from pathlib import Path
from s2t_shared.labels.spool import HEADER, Spool, SpoolUsage
spool = Spool(Path({folder!r}), 1 << 20)
spool.append([b"mine"])
print("there", flush=True)
sys.stdin.readline()
"""


def test_the_dead_are_adopted_and_the_living_are_not(tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(root=str(ROOT), folder=str(tmp_path))],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None and worker.stdout.readline() == "there\n"
    one, two = Spool(tmp_path, MIB), Spool(tmp_path, MIB)
    one.adopt()
    assert everything(one) == everything(two) == []
    worker.kill()
    worker.wait()
    one.adopt()
    two.adopt()
    assert everything(one) == [b"mine"] and everything(two) == []
    one.append([b"own"])
    assert sorted(everything(one)) == [b"mine", b"own"]
    for segment in one.segments():
        one.remove(segment)
    one.adopt()
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2  # the adopted folder is gone
    one.append([b"late"])
    one.close()
    two.adopt()
    assert everything(two) == [b"late"]


def test_a_writer_that_died_at_any_point_of_its_start_leaves_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "1-folder-without-lock").mkdir(parents=True)
    (tmp_path / "2-with-empty-segment").mkdir()
    (tmp_path / "2-with-empty-segment" / "00000000.entries").touch()
    spool = Spool(tmp_path, MIB)
    assert everything(spool) == []
    for segment in spool.segments():
        spool.remove(segment)
    spool.adopt()
    spool.close()
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


# -- shared storage whose locks other nodes do not see --------------------------------------------


def on_another_node(root: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    """A spool of another node, where `flock` always succeeds: it is local to each node."""

    def unseen(path: Path, *_: object, **__: object) -> AbstractContextManager[bool]:
        path.touch()
        return nullcontext(True)

    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "this_node", lambda: "0123abcd")
        patch.setattr(spool_module, "locked", unseen)
        return Spool(root, MIB)


def adopted(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    other = on_another_node(root, monkeypatch)
    entries = everything(other)
    other.close()
    return entries


def test_a_living_writer_of_another_node_is_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its segment was sent and removed under it: what it appended after that was lost, although it
    had been acknowledged."""
    living = Spool(tmp_path, MIB)
    living.append([b"acknowledged"])
    assert adopted(tmp_path, monkeypatch) == []
    assert everything(living) == [b"acknowledged"]


def test_a_writer_of_another_node_that_was_quiet_for_long_is_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that burnt down must not keep its labels for ever; one that works beats."""
    monkeypatch.setattr(spool_module, "BEAT_S", 0.0)
    lost = Spool(tmp_path, MIB)
    lost.append([b"of the lost"])
    [lock] = tmp_path.glob("*/lock")
    long_ago = lock.stat().st_mtime - spool_module.QUIET_S - 1
    os.utime(lock, (long_ago, long_ago))
    lost.segments()
    assert adopted(tmp_path, monkeypatch) == []  # any work is a sign of life
    os.utime(lock, (long_ago, long_ago))
    assert adopted(tmp_path, monkeypatch) == [b"of the lost"]
