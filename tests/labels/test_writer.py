"""The label writer against a real server: nothing that was accepted is lost, nothing waits for
Redis."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from s2t_shared.errors import StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.packed import pack, read_rollout
from s2t_shared.labels.spool import read_records
from s2t_shared.labels.stream import LABELS, Entry, LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.redis_connection import open_client
from services.launch.redis_server import RedisServer, find_program, free_port, open_redis
from tests.helpers.lake import ids_in, names, rollout
from tests.helpers.redis import eventually


@pytest.fixture
def writer(store: LabelStream, tmp_path: Path) -> Iterator[LabelWriter]:
    writer = LabelWriter(store, tmp_path / "spool")
    yield writer
    writer.close()


def stored(url: str) -> set[str]:
    """Ids of the rollouts in the stream; none where Redis does not answer."""
    try:
        entries = open_client(url, 2.0).xrange(LABELS)
    except redis.RedisError:
        return set()
    return {read_rollout(fields[b"rollout"]).rollout_id for _, fields in entries}


def segments(spool: Path) -> list[Path]:
    return list(spool.glob("*/*.entries"))


def spooled(spool: Path) -> set[str]:
    """Ids of the rollouts in the spool's files, read without the writer."""
    return {
        read_rollout(text).rollout_id
        for s in segments(spool)
        for text in read_records(s.read_bytes())
    }


def test_durable_in_redis_without_touching_the_spool(
    writer: LabelWriter, server: RedisServer, tmp_path: Path
) -> None:
    futures = [writer.write([rollout(n)]) for n in range(50)] + [writer.write([])]
    for future in futures:
        assert future.result(5.0) is None
    assert stored(server.url) == names(*range(50)) and segments(tmp_path / "spool") == []
    assert (writer.written, sum(writer.dropped.values())) == (100, 0)


def test_durable_in_the_spool_while_redis_is_away_then_delivered(tmp_path: Path) -> None:
    port = free_port()
    with open_redis(None, tmp_path / "redis", port) as server:
        store = LabelStream(server.url)
    writer = LabelWriter(store, tmp_path / "spool")
    started = time.monotonic()
    futures = [writer.write([rollout(n)]) for n in range(100)]
    assert time.monotonic() - started < 0.2
    for future in futures:
        future.result(5.0)
    assert spooled(tmp_path / "spool") == names(*range(100))
    with open_redis(None, tmp_path / "redis", port) as server:
        eventually(lambda: segments(tmp_path / "spool") == [])
        assert stored(server.url) == names(*range(100))
        writer.write([rollout(100)]).result(5.0)  # directly again
        assert segments(tmp_path / "spool") == [] and writer.writes_to_redis
        writer.close()
    assert writer.dropped == {} and list((tmp_path / "spool").glob("*")) == [
        tmp_path / "spool/.lock"
    ]


def test_a_frozen_redis_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike a stopped one it accepts connections and never answers."""
    monkeypatch.setattr("s2t_shared.labels.writer.WRITE_TIMEOUT_S", 0.5)
    with open_redis(None, tmp_path / "redis") as server:
        assert server.process is not None
        writer = LabelWriter(LabelStream(server.url), tmp_path / "spool")
        os.kill(server.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        futures = [writer.write([rollout(n)]) for n in range(200)]
        assert time.monotonic() - started < 0.2
        for future in futures:
            future.result(5.0)  # in the spool
        assert time.monotonic() - started < 3.0
        os.kill(server.process.pid, signal.SIGCONT)
        eventually(lambda: segments(tmp_path / "spool") == [])
        assert stored(server.url) == names(*range(200))
        writer.close()


@pytest.fixture
def start_plain(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """Starts servers that are not configured by us."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
        port = port or free_port()
        process = subprocess.Popen(
            [find_program(), "--port", str(port), "--dir", str(tmp_path), "--save", "", *arguments],
            stdout=subprocess.DEVNULL,
        )
        started.append(process)
        return process, f"redis://127.0.0.1:{port}/0"

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_server_without_waitaof_gets_time_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_plain: Callable[..., Any]
) -> None:
    """Durable in the spool at once; removed there once the same run of the server has had it for
    some time."""
    monkeypatch.setattr("s2t_shared.labels.writer.SETTLED_S", 1.5)
    _, url = start_plain("--appendonly", "yes", "--rename-command", "WAITAOF", "")
    writer = LabelWriter(LabelStream(url), tmp_path / "spool")
    writer.write([rollout(1)]).result(5.0)
    assert spooled(tmp_path / "spool") == names(1)
    eventually(lambda: stored(url) == names(1))
    time.sleep(0.5)
    assert spooled(tmp_path / "spool") == names(1)
    eventually(lambda: segments(tmp_path / "spool") == [])
    assert stored(url) == names(1)
    writer.close()


@pytest.mark.parametrize(
    "arguments", [("--appendonly", "no"), ("--appendonly", "yes", "--appendfsync", "no")]
)
def test_a_server_that_syncs_nothing_is_trusted_when_the_drain_has_it(
    arguments: tuple[str, ...],
    lake: Lake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_plain: Callable[..., Any],
) -> None:
    monkeypatch.setattr("s2t_shared.labels.writer.SETTLED_S", 0.1)
    monkeypatch.setattr("s2t_shared.labels.writer.WRITE_TIMEOUT_S", 1.0)
    _, url = start_plain(*arguments)
    writer = LabelWriter(LabelStream(url), tmp_path / "spool")
    writer.write([rollout(1)]).result(5.0)
    eventually(lambda: stored(url) == names(1))
    time.sleep(1.5)
    assert spooled(tmp_path / "spool") == names(1)
    Drain(LabelStream(url), lake).flush()
    eventually(lambda: segments(tmp_path / "spool") == [])
    assert ids_in(lake) == names(1)
    writer.close()


def test_what_a_server_lost_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_plain: Callable[..., Any]
) -> None:
    """It had taken the rollout, and came back without it: its run_id tells."""
    monkeypatch.setattr("s2t_shared.labels.writer.SETTLED_S", 60.0)
    process, url = start_plain("--appendonly", "no")
    writer = LabelWriter(LabelStream(url), tmp_path / "spool")
    writer.write([rollout(1)]).result(5.0)
    eventually(lambda: stored(url) == names(1))
    process.kill()
    process.wait()
    start_plain("--appendonly", "no", port=int(url.split(":")[-1].removesuffix("/0")))
    eventually(lambda: stored(url) == names(1))
    writer.close()


def test_full_redis_and_full_spool_drop_count_and_say_so(
    server: RedisServer,
    store: LabelStream,
    client: redis.Redis,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """redis-py quotes the failed command, with the label, in the errors of a pipeline."""
    caplog.set_level(logging.DEBUG)
    writer = LabelWriter(store, tmp_path / "spool", spool_bytes=3 * len(pack(rollout(1))))
    client.config_set("maxmemory", "1")
    try:
        writer.write([replace(rollout(1), request_id="canary")]).result(5.0)
        assert spooled(tmp_path / "spool") == names(1)
        lost = writer.write([rollout(n) for n in range(2, 5)])
        with pytest.raises(
            StoreError, match="labels dropped: Redis at .*OutOfMemoryError: command not allowed"
        ):
            lost.result(5.0)
        assert writer.dropped == {"no room in Redis and the spool": 6} and writer.written == 2
        with pytest.raises(StoreError, match="OutOfMemoryError: command not allowed") as caught:
            store.append(
                [b'{"context_ids":["canary"]}']
            )  # short: redis-py shortens long words to nothing
        assert "canary" not in f"{caplog.text}{caught.value}"
        with pytest.raises(StoreError, match="OutOfMemoryError") as caught:
            store.dead_letter(Entry(b"1-1", {b"rollout": b"canary"}), "why")
        assert "canary" not in str(caught.value)
    finally:
        client.config_set("maxmemory", "0")
    eventually(lambda: stored(server.url) == names(1) and segments(tmp_path / "spool") == [])
    writer.close()


def test_redis_is_used_again_although_the_spool_had_no_room(
    server: RedisServer,
    store: LabelStream,
    client: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is in the spool then whose delivery would tell that Redis is well."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    writer = LabelWriter(store, tmp_path / "spool")
    client.config_set("maxmemory", "1")
    monkeypatch.setattr("s2t_shared.labels.spool.os.fsync", full)
    with pytest.raises(StoreError, match="dropped"):
        writer.write([rollout(1)]).result(5.0)
    client.config_set("maxmemory", "0")
    writer.write([rollout(2)]).result(5.0)
    assert stored(server.url) == names(2)
    monkeypatch.undo()
    writer.close()


def test_a_full_queue_drops_the_newest(tmp_path: Path) -> None:
    with open_redis(None, tmp_path / "redis") as server:
        assert server.process is not None
        writer = LabelWriter(LabelStream(server.url), tmp_path / "spool", queue_bytes=50_000)
        os.kill(server.process.pid, signal.SIGSTOP)
        futures = [writer.write([rollout(n)]) for n in range(100)]
        refused = [n for n, f in enumerate(futures) if f.done()]
        assert refused == list(range(refused[0], 100)) and 20 < refused[0] < 50
        assert writer.dropped == {"queue full": 2 * len(refused)}
        with pytest.raises(StoreError, match="queue full"):
            futures[-1].result()
        os.kill(server.process.pid, signal.SIGCONT)
        for future in futures[: refused[0]]:
            future.result(8.0)
        writer.close()
    assert (
        writer.write([rollout(1)]).exception() is not None
        and writer.dropped["the writer is closed"] == 2
    )


def test_closing_while_redis_is_away_leaves_it_to_the_next(tmp_path: Path) -> None:
    port = free_port()
    writer = LabelWriter(LabelStream(f"redis://127.0.0.1:{port}"), tmp_path / "spool")
    future = writer.write([rollout(1)])
    writer.close()
    assert future.result(0) is None and spooled(tmp_path / "spool") == names(1)
    with open_redis(None, tmp_path / "redis", port) as server:
        writer = LabelWriter(LabelStream(server.url), tmp_path / "spool")
        eventually(lambda: stored(server.url) == names(1))
        writer.close()


def test_an_unserialisable_rollout_does_not_stop_the_others(
    writer: LabelWriter, server: RedisServer
) -> None:
    broken = replace(rollout(2), created_at=object())  # type: ignore[arg-type]
    futures = [writer.write([r]) for r in (rollout(1), broken, rollout(3))]
    with pytest.raises(StoreError, match="cannot be serialised"):
        futures[1].result(5.0)
    assert futures[0].result(5.0) is None and futures[2].result(5.0) is None
    assert stored(server.url) == names(1, 3) and writer.dropped == {"not serialisable": 2}


def test_a_caller_that_gives_up_breaks_nothing(writer: LabelWriter, server: RedisServer) -> None:
    assert not writer.write([rollout(1)]).cancel()
    writer.write([rollout(2)]).result(5.0)
    assert stored(server.url) == names(1, 2)


def test_a_living_writer_delivers_what_a_dead_one_left(
    server: RedisServer, store: LabelStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2t_shared.labels.writer.ADOPT_EVERY_S", 0.1)
    living = LabelWriter(store, tmp_path / "spool")
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from s2t_shared.labels.stream import LabelStream\nfrom s2t_shared.labels.writer import "
        "LabelWriter\n"
        "from tests.helpers.lake import rollout\n"
        f"writer = LabelWriter(LabelStream('redis://127.0.0.1:{free_port()}'), Path(sys.argv[1]))\n"
        "writer.write([rollout(7)]).result(10.0)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spool")],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    eventually(lambda: stored(server.url) == names(7) and segments(tmp_path / "spool") == [])
    living.close()


def test_an_outage_leaves_few_files(tmp_path: Path) -> None:
    """Each append looks at all of them."""
    writer = LabelWriter(LabelStream(f"redis://127.0.0.1:{free_port()}"), tmp_path / "spool")
    for n in range(20):
        writer.write([rollout(n)]).result(5.0)
        time.sleep(0.05)  # the spool's thread tries meanwhile
    assert len(segments(tmp_path / "spool")) <= 2 and spooled(tmp_path / "spool") == names(
        *range(20)
    )
    writer.close()
