"""Kill -9 anywhere between a proposer and the lake: whatever was acknowledged is in the lake once,
and nothing needs repair. The server, the drain and the writer are real processes; only the models
are missing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from s2t_shared.errors import StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.redis_connection import open_client
from services.launch.redis_server import find_program, free_port
from tests.faults.figures import sizes
from tests.helpers.lake import rollout

pytestmark = pytest.mark.kill
ROOT = Path(__file__).parents[2]


class Server:
    """A valkey on one folder and one port that can be killed and come back."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [
            find_program(),
            "--port",
            str(self.port),
            "--dir",
            str(folder),
            "--save",
            "",
            "--appendonly",
            "yes",
            *arguments,
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        client = open_client(self.url, 1.0)
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up:
            try:
                client.ping()
                return
            except redis.RedisError:
                time.sleep(0.01)
        raise AssertionError("the server did not come back")


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(folder, *arguments)
    try:
        yield server
    finally:
        server.kill()


class Acknowledged:
    """Threads that write until they are told to stop; the numbers whose future was done without an
    error."""

    def __init__(self, writer: LabelWriter, threads: int = 2, pause_s: float = 0.002) -> None:
        self._writer, self._pause_s = writer, pause_s
        self.numbers: set[int] = set()
        self.sent = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(i, threads)) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, first: int, step: int) -> None:
        number = first
        while not self._stop.wait(self._pause_s):
            future = self._writer.write([rollout(number)])
            future.add_done_callback(lambda f, n=number: self._done(n, f.exception()))  # type: ignore[misc]
            number += step
            with self._lock:
                self.sent += 1

    def _done(self, number: int, error: BaseException | None) -> None:
        with self._lock:
            if error is None:
                self.numbers.add(number)

    def finish(self) -> set[int]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        give_up = time.monotonic() + 20
        while (
            len(self.numbers) + self._writer.dropped.total() // 2 < self.sent
            and time.monotonic() < give_up
        ):
            time.sleep(0.01)
        return self.numbers


def check(lake: Lake, acknowledged: set[int]) -> None:
    """Everything that was promised, once; statistics count each once."""
    found = [int(r.rollout_id.split("-")[1]) for r in lake.rollouts()]
    assert len(found) == len(set(found)), "counted twice"
    assert acknowledged <= set(found), (
        f"{len(acknowledged - set(found))} of {len(acknowledged)} lost"
    )
    labels = [label.label_id for r in lake.rollouts() for label in r.labels]
    assert len(labels) == len(set(labels)) == 2 * len(found)
    assert lake.verify(values=True) == {}


def empty(spool: Path) -> bool:
    return not list(spool.glob("*/*.entries"))


def drain_all(url: str, lake: Lake, spool: Path) -> None:
    """Until the spool and the stream are empty, whatever the killed have left."""
    store = LabelStream(url)
    drain = Drain(store, lake, shard_age_s=0.2, reclaim_idle_s=0.3)
    give_up = time.monotonic() + 30
    while not (empty(spool) and store.counts().rollouts == 0):
        assert time.monotonic() < give_up, (
            f"{store.counts()} and {list(spool.glob('*/*'))} are left"
        )
        drain.run_once(block_ms=50)
    assert store.counts().dead_letters == 0


@pytest.mark.parametrize(
    ("policy", "kills"),
    sizes([("always", 12), ("everysec", 6)], [("always", 50), ("everysec", 12)]),
)
def test_redis_killed_while_writers_write(policy: str, kills: int, tmp_path: Path) -> None:
    random.seed(policy)
    lake, spool = Lake(tmp_path / "lake"), tmp_path / "spool"
    with serving(tmp_path / "redis", "--appendfsync", policy) as server:
        writer = LabelWriter(LabelStream(server.url), spool)
        drain = Drain(
            LabelStream(server.url), lake, shard_rows=200, shard_age_s=0.5, reclaim_idle_s=1.0
        )
        drain.start()
        writing = Acknowledged(writer)
        direct = 0
        for _ in range(kills):
            time.sleep(random.uniform(0.05, 0.35))
            direct += writer.writes_to_redis
            server.kill()
            time.sleep(random.uniform(0.0, 0.05))
            server.start()
            server.wait()
        acknowledged = writing.finish()
        drain.stop()
        drain_all(server.url, lake, spool)
        writer.close()
    assert writer.dropped == {} and len(acknowledged) == writing.sent > 10 * kills
    assert direct > kills / 10  # both ways were in use, also on a busy machine
    check(lake, acknowledged)


def test_redis_without_waitaof_killed_and_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2t_shared.labels.writer.WRITE_TIMEOUT_S", 0.5)
    lake, spool = Lake(tmp_path / "lake"), tmp_path / "spool"
    random.seed(3)
    with serving(
        tmp_path / "redis", "--appendfsync", "everysec", "--rename-command", "WAITAOF", ""
    ) as server:
        writer = LabelWriter(LabelStream(server.url), spool)
        writing = Acknowledged(writer, threads=1, pause_s=0.01)
        for _ in range(4):
            time.sleep(random.uniform(0.1, 0.6))
            os.kill(server.process.pid, signal.SIGSTOP)
            time.sleep(random.uniform(0.1, 0.8))
            os.kill(server.process.pid, signal.SIGCONT)
            time.sleep(random.uniform(0.1, 0.3))
            server.kill()
            server.start()
            server.wait()
        acknowledged = writing.finish()
        drain_all(server.url, lake, spool)
        writer.close()
    assert writer.dropped == {} and len(acknowledged) == writing.sent > 50
    check(lake, acknowledged)


READER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
class SlowStream(LabelStream):  # so that kills hit between the lake and the acknowledgement
    def remove(self, entry_ids):
        if entry_ids:
            time.sleep(0.05)
        super().remove(entry_ids)
class EagerLake(Lake):
    def compact(self, least=4):
        return super().compact(least)
drain = Drain(
    SlowStream({url!r}), EagerLake(Path({lake!r})),
    shard_rows=40, shard_age_s=0.15, reclaim_idle_s=0.2,
)
print("ready", flush=True)
n = 0
while True:
    drain.run_once(20)
    n += 1
    if n % 10 == 0:
        drain.housekeep()
"""

PROPOSER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from tests.helpers.lake import rollout
writer = LabelWriter(LabelStream({url!r}), Path({spool!r}))
def on_done(number):
    def acknowledge(future):
        if future.exception() is None:
            print(number, flush=True)
    return acknowledge
print("ready", flush=True)
import time
for number in range({first}, {first} + 10**6):
    writer.write([rollout(number)]).add_done_callback(on_done(number))
    time.sleep(0.002)
"""


def launch(program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kills", sizes([6], [20]))
def test_the_reader_is_killed(kills: int, tmp_path: Path) -> None:
    random.seed(1)
    lake, spool = Lake(tmp_path / "lake"), tmp_path / "spool"
    with serving(tmp_path / "redis") as server:
        server.wait()
        writer = LabelWriter(LabelStream(server.url), spool)
        writing = Acknowledged(writer, pause_s=0.01)
        for number in range(kills):
            reader = launch(READER.format(root=str(ROOT), url=server.url, lake=str(lake.root)))
            # An entry over which more than five readers die in a row is taken for poison.
            lives_on_s = 1.0 if number % 4 == 3 else 0.0
            time.sleep(random.uniform(0.0, 0.6) + lives_on_s)
            reader.kill()
            reader.wait()
            lake.shards()
        acknowledged = writing.finish()
        drain_all(server.url, lake, spool)
        writer.close()
    assert len(acknowledged) == writing.sent > 25 * kills
    check(lake, acknowledged)
    assert sum(s.rollouts for s in lake.shards()) > len(
        acknowledged
    )  # some were killed between the lake and the ack


@pytest.mark.parametrize("kills", sizes([4], [10]))
def test_the_proposer_is_killed_and_redis_now_and_then(kills: int, tmp_path: Path) -> None:
    """A killed proposer's spool is delivered by the next one, and at the end by a living writer."""
    random.seed(2)
    lake, spool = Lake(tmp_path / "lake"), tmp_path / "spool"
    acknowledged: set[int] = set()
    with serving(tmp_path / "redis") as server:
        server.wait()
        for life in range(kills):
            process = launch(
                PROPOSER.format(
                    root=str(ROOT), url=server.url, spool=str(spool), first=life * 10**6
                )
            )
            time.sleep(random.uniform(0.05, 0.4))
            if life % 2:
                server.kill()
                time.sleep(
                    random.uniform(0.1, 0.4)
                )  # what it acknowledges now is in its spool only
            process.kill()
            assert process.stdout is not None
            text = process.stdout.read()
            process.wait()
            acknowledged |= {
                int(line) for line in text.splitlines(keepends=True) if line.endswith("\n")
            }
            if life % 2:
                assert not empty(spool)
                server.start()
                server.wait()
        last = LabelWriter(LabelStream(server.url), spool)
        drain_all(server.url, lake, spool)
        last.close()
    assert len(acknowledged) > 20 * kills
    check(lake, acknowledged)
    assert list(spool.iterdir()) == [spool / ".lock"]


def test_nothing_is_acknowledged_that_nobody_keeps(tmp_path: Path) -> None:
    """No Redis, and a spool without room: the future says so."""
    writer = LabelWriter(
        LabelStream(f"redis://127.0.0.1:{free_port()}"), tmp_path / "spool", spool_bytes=100
    )
    with pytest.raises(StoreError, match="labels dropped"):
        writer.write([rollout(1)]).result(10.0)
    writer.close()
    assert writer.dropped.total() == 2
