"""The cache of LLM selections: a hit equals the fresh reply, nothing is stale, Redis away is a
miss."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.lookup_breaker import SLOW_LOOKS
from s2t_shared.decode.selection_cache import (
    CACHE_PREFIX,
    CachedSelector,
    decode_selection,
    selection_key,
)
from s2t_shared.errors import InvalidRequestError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply
from services.launch.redis_server import RedisServer, open_redis
from tests.helpers.redis import eventually

INFO = LLMInfo("llm-1", "tokenizer-1", frozenset({0}), 4096)


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
def cached(inner: CountingSelector, server: RedisServer) -> Iterator[CachedSelector]:
    selector = CachedSelector(inner, server.url, lookup_timeout_s=2.0)
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
        b"[[[-1.0,-1.0],1]]",
        b"[[[-1.0,-1.0,NaN],1]]",
        b'[[[-1.0,-1.0,"x"],1]]',
        b"[[[-1.0,-1.0,-1.0],1.5]]",
        b"[[[-1.0,-1.0,-1.0],null]]",
        b"[" * 100_000,
    ],
)
def test_an_undecodable_value_is_a_miss(
    value: bytes, cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    assert decode_selection(b"[[[-1.0,-1.0,-1.0],1]]", QUERY, "") is not None
    assert decode_selection(b"[[[-1.0,-1.0,-1.0],-1]]", QUERY, "") is None
    client.set(CACHE_PREFIX + selection_key(QUERY, INFO), value)
    assert ask(cached, QUERY) == [inner.reply(QUERY)]


def counted_lookups(selector: CachedSelector, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all lookups from now on."""
    mget = selector._redis.mget
    sizes: list[int] = []

    def counting(keys: list[str]) -> object:
        sizes.append(len(keys))
        return mget(keys)

    monkeypatch.setattr(selector._redis, "mget", counting)
    return sizes


def ask_for(seconds: float, selector: CachedSelector, inner: CountingSelector) -> int:
    """Ask for so long, check every answer, and return how many there were."""
    asked = 0
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        assert ask(selector, QUERY) == [inner.reply(QUERY)]
        asked += 1
        time.sleep(0.005)
    return asked


def test_a_frozen_redis_makes_one_answer_wait_and_not_one_every_second(
    inner: CountingSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lookup costs its whole timeout: once a second for as long as the fault lasted, for all
    sequences of the proposer."""
    with open_redis(None, tmp_path) as server:
        selector = CachedSelector(inner, server.url, lookup_timeout_s=0.3)
        lookups = counted_lookups(selector, monkeypatch)
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGSTOP)
        assert ask_for(2.5, selector, inner) > 20
        assert len(lookups) == 1
        os.kill(server.process.pid, signal.SIGCONT)
        eventually(lambda: ask(selector, QUERY)[0].cached)
        selector.close()


def test_a_killed_redis_is_a_miss_and_used_again_when_it_is_back(
    inner: CountingSelector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_redis(None, tmp_path) as server:
        selector = CachedSelector(inner, server.url, lookup_timeout_s=2.0)
        lookups = counted_lookups(selector, monkeypatch)
        killed = server.process
        assert killed is not None
        killed.kill()
        killed.wait()
        assert ask(selector, QUERY, QUERY) == [inner.reply(QUERY)] * 2
        eventually(lambda: server.process is not killed)
        eventually(lambda: ask(selector, QUERY)[0].cached)
        assert lookups
        selector.close()
    assert not ask(selector := CachedSelector(inner, server.url), QUERY)[0].cached
    selector.close()


def test_a_slow_redis_is_left_alone_after_a_few_lookups(
    cached: CachedSelector, inner: CountingSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers in time, every time, and makes every selection wait."""
    ping, mget = cached._redis.ping, cached._redis.mget
    slow = threading.Event()
    slow.set()

    def late(call: Callable[..., object]) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            if slow.is_set():
                time.sleep(0.25)  # of 2 s that a lookup may take
            return call(*arguments)

        return called

    monkeypatch.setattr(cached._redis, "ping", late(ping))
    monkeypatch.setattr(cached._redis, "mget", late(mget))
    lookups = counted_lookups(cached, monkeypatch)
    for _ in range(20):
        ask(cached, replace(QUERY, vocab_size=len(lookups)))
    assert len(lookups) == SLOW_LOOKS and inner.asked == 20
    slow.clear()
    eventually(lambda: ask(cached, QUERY)[0].cached)


def test_a_full_redis_answers_from_what_it_has(
    cached: CachedSelector, inner: CountingSelector, client: redis.Redis
) -> None:
    """Writing fails then; looking must go on."""
    ask(cached, QUERY)
    keys_reach(client, 1)
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", "1")
    try:
        for size in range(3):
            assert not ask(cached, replace(QUERY, vocab_size=size))[0].cached
            assert ask(cached, QUERY)[0].cached
    finally:
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "volatile-lru")


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
