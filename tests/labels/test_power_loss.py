"""What a power cut and a full disk leave of labels: all that was acknowledged, and exact counts of
what was not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.redis_connection import open_client
from tests.helpers.lake import rollout
from tests.helpers.redis import eventually
from tests.labels.test_ledger_kills import Server, check, drain_all, empty, serving

pytestmark = pytest.mark.kill
ROOT = Path(__file__).parents[2]
POWER_CUTS = 20


def log_file(folder: Path) -> Path:
    """The append-only file that the server writes to."""
    return max((folder / "appendonlydir").glob("*.incr.aof"), key=lambda file: file.stat().st_mtime)


def cut_power(server: Server, folder: Path, durable_bytes: int) -> int:
    """Kill the server and take back what was not on the disk: any part of its last bytes. Returns
    how many."""
    server.kill()
    file = log_file(folder)
    size = file.stat().st_size
    kept = random.randint(durable_bytes, size)
    os.truncate(file, kept)
    server.start()
    server.wait()
    return size - kept


def test_labels_survive_twenty_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R5. A server that has a rollout in its file may still lose it: the spool may forget it only
    when WAITAOF has said that it is on disk."""
    monkeypatch.setattr("s2t_shared.labels.writer.WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("s2t_shared.labels.writer.MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr("s2t_shared.labels.writer.RECHECK_S", 0.05)
    monkeypatch.setattr("s2t_shared.labels.writer.SETTLED_S", 60.0)
    random.seed(5)
    lake, spool, folder = Lake(tmp_path / "lake"), tmp_path / "spool", tmp_path / "redis"
    acknowledged: set[int] = set()
    lost_bytes = 0
    with serving(folder, "--appendfsync", "always") as server:
        server.wait()
        writer = LabelWriter(LabelStream(server.url), spool)
        for cut in range(POWER_CUTS):
            numbers = range(100 * cut, 100 * cut + 10)
            confirmed, unconfirmed = numbers[:5], numbers[5:]
            for number in confirmed:
                writer.write([rollout(number)]).result(5.0)
            eventually(lambda: empty(spool))  # all of it was confirmed
            durable_bytes = log_file(folder).stat().st_size
            # From here on the server writes, and does not sync.
            open_client(server.url, 2.0).config_set("appendfsync", "no")
            for number in unconfirmed:
                writer.write([rollout(number)]).result(5.0)
            eventually(lambda least=durable_bytes + 500: log_file(folder).stat().st_size > least)  # type: ignore[misc]
            time.sleep(0.2)  # the spool has sent them and asks whether they are durable
            assert not empty(spool)
            acknowledged |= set(numbers)
            lost_bytes += cut_power(server, folder, durable_bytes)
        drain_all(server.url, lake, spool)
        writer.close()
    assert writer.dropped == {} and lost_bytes > 1000
    check(lake, acknowledged)


FULL_DISK = """
import sys
sys.path.insert(0, {root!r})
import logging, shutil
from pathlib import Path
from s2t_shared.errors import StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from tests.helpers.lake import rollout

logging.disable(logging.CRITICAL)
disk, url = Path(sys.argv[1]), sys.argv[2]
what = sys.argv[3]
if what == "spool":
    writer = LabelWriter(LabelStream("redis://127.0.0.1:1"), disk / "spool")
    futures = [writer.write([rollout(n)]) for n in range(3000)]
    kept = {{n for n, future in enumerate(futures) if future.exception(30.0) is None}}
    writer.close()
    assert writer.dropped.total() == 2 * (3000 - len(kept)), writer.dropped
    assert writer.written == 2 * len(kept)
    left = LabelWriter(LabelStream(url), disk / "spool")
    import time
    while list(disk.glob("spool/*/*.entries")):
        time.sleep(0.02)
    left.close()
    print(len(kept), LabelStream(url).counts().rollouts)
else:
    stream, lake = LabelStream(url), Lake(disk / "lake")
    stream.append([rollout(n).to_json().encode() for n in range(200)])
    drain = Drain(stream, lake, shard_age_s=0.01, reclaim_idle_s=0.1)
    filler = disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"x" * 65536)
        except OSError:
            pass
    refused = 0
    for _ in range(5):
        try:
            drain.flush()
        except StoreError:
            refused += 1
    waiting = stream.counts().rollouts
    filler.unlink()
    drain.flush()
    print(refused, waiting, len(list(lake.rollouts())), stream.counts().rollouts)
"""


def on_a_small_disk(disk: Path, mib: float, url: str, what: str) -> list[int]:
    """Run FULL_DISK on a tmpfs of its own; returns the numbers that it prints."""
    disk.mkdir()
    (disk.parent / "program.py").write_text(FULL_DISK.format(root=str(ROOT)))
    mount = f"mount -t tmpfs -o size={int(mib * 1024)}k none {disk} && exec $0 $@"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, sys.executable, disk.parent / "program.py"]
        + [str(disk), url, what],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def may_mount() -> bool:
    try:
        allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    except OSError:
        return False
    return allowed.returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="no user namespaces: no tmpfs of our own")


@needs_mount
def test_a_full_spool_disk_loses_exactly_what_it_says(tmp_path: Path) -> None:
    """R6. Redis is away and the disk full: the writer goes on, and its counts are right."""
    with serving(tmp_path / "redis", "--appendfsync", "always") as server:
        server.wait()
        kept, delivered = on_a_small_disk(tmp_path / "disk", 1.0, server.url, "spool")
    assert kept == delivered and 100 < kept < 3000


@needs_mount
def test_a_full_lake_disk_keeps_labels_in_redis(tmp_path: Path) -> None:
    """R6. They wait, and are in the lake once when there is room."""
    with serving(tmp_path / "redis", "--appendfsync", "always") as server:
        server.wait()
        found = on_a_small_disk(tmp_path / "disk", 2.0, server.url, "lake")
    assert found == [5, 200, 200, 0]
