"""The exact-match cache of LLM selections in Redis: a `SelectorClient` around another one.

Knows queries, replies and keys; not who asks, nor where the LLM is. Holds no text: keys are hashes,
values numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from s2t_shared.decode.interfaces import LLMInfo, SelectorClient
from s2t_shared.decode.llm_calls import check_reply
from s2t_shared.decode.lookup_breaker import LookupBreaker
from s2t_shared.errors import SelectorUnavailableError, StoreError
from s2t_shared.redis_connection import open_client, redis_errors
from s2t_shared.redis_url import place_of
from s2t_shared.types import PositionScores, ScoreQuery, ScoreReply

log = logging.getLogger(__name__)

CACHE_PREFIX = "s2t:selection:"
LOOKUP_TIMEOUT_S = 0.05  # a lookup that takes longer is worth less than the forward it may save
SLOW_SHARE = 0.1  # of the timeout; lookups that take longer, several in a row, end the looking
WRITE_PAUSE_S = 1.0  # after an error nothing is written back for so long
MAX_UNWRITTEN = 1000  # replies waiting to be written back; beyond, they are not cached


class CachedSelector:
    """A `SelectorClient` that adds one thing to another: a question asked before is answered from
    Redis.

    Only questions about one position are cached; a harvest's whole rollout is never asked twice.
    One thread looks up and asks `inner` (whose calls therefore never overlap), another writes back.
    Redis slow or away: all are misses, and nobody waits for it (`LookupBreaker`). A full one
    answers, and takes no more. hits, misses: of questions that may be cached, since the start.
    """

    def __init__(
        self,
        inner: SelectorClient,
        redis_url: str,
        ttl_s: int = 86_400,
        lookup_timeout_s: float = LOOKUP_TIMEOUT_S,
    ) -> None:
        self._inner = inner
        self._place = place_of(redis_url)
        self._redis = open_client(redis_url, lookup_timeout_s)
        self._ttl_s = ttl_s
        self.hits = 0
        self.misses = 0
        self._asked: queue.SimpleQueue[tuple[Sequence[ScoreQuery], list[Future[ScoreReply]]] | None]
        self._asked = queue.SimpleQueue()
        self._unwritten: queue.Queue[tuple[str, ScoreReply] | None] = queue.Queue(MAX_UNWRITTEN)
        self._breaker = LookupBreaker(self._ping, SLOW_SHARE * lookup_timeout_s)
        self._threads = [
            threading.Thread(target=self._answer_all, name="selection-lookup", daemon=True),
            threading.Thread(target=self._write_all, name="selection-write", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def info(self) -> LLMInfo:
        return self._inner.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        """Returns at once. A hit has `cached` set; the inner selector's errors arrive unchanged."""
        futures: list[Future[ScoreReply]] = [Future() for _ in queries]
        self._asked.put((tuple(queries), futures))
        return futures

    def close(self) -> None:
        """Finish what was asked and end the threads; nothing may be submitted after it."""
        self._asked.put(None)
        self._threads[0].join()
        self._unwritten.put(None)
        self._threads[1].join()
        self._breaker.close()
        self._redis.close()

    def _ping(self) -> None:
        with redis_errors(self._place):
            self._redis.ping()

    def _answer_all(self) -> None:
        while (asked := self._asked.get()) is not None:
            queries, futures = asked
            try:
                self._answer(queries, futures)
            except Exception as error:  # noqa: BLE001 - a thread's border: someone waits for these futures
                for future in futures:
                    if not future.done():
                        _settle(future, error)

    def _answer(self, queries: Sequence[ScoreQuery], futures: Sequence[Future[ScoreReply]]) -> None:
        info = self._inner.info
        keys = [selection_key(q, info) if cacheable(q) else "" for q in queries]
        found = self._look_up([key for key in keys if key])
        misses: list[tuple[ScoreQuery, str, Future[ScoreReply]]] = []
        for query, key, future in zip(queries, keys, futures, strict=True):
            hit = decode_selection(found.get(key), query, info.digest)
            self.hits += hit is not None
            self.misses += hit is None and key != ""
            if hit is not None or future.cancelled():
                _settle(future, hit)
            else:
                misses.append((query, key, future))
        if not misses:
            return
        answers = self._inner.submit([query for query, _, _ in misses])
        assert len(answers) == len(misses)
        for answer, (_, key, future) in zip(answers, misses, strict=True):
            future.add_done_callback(partial(_cancel_too, answer))
            answer.add_done_callback(partial(self._pass_on, future, key, info.digest))

    def _look_up(self, keys: Sequence[str]) -> dict[str, bytes | None]:
        if not keys or not self._breaker.is_closed:
            return {}
        started = time.monotonic()
        try:
            with redis_errors(self._place):
                values: Any = self._redis.mget([CACHE_PREFIX + key for key in keys])
        except StoreError as error:
            self._breaker.failed(error)
            return {}
        self._breaker.looked(time.monotonic() - started)
        return dict(zip(keys, values, strict=True))

    def _pass_on(
        self, future: Future[ScoreReply], key: str, digest: str, answer: Future[ScoreReply]
    ) -> None:
        if answer.cancelled():
            future.cancel()
            _settle(future, None)
            return
        reply = answer.exception() or answer.result()
        _settle(future, reply)
        # While the LLM is being replaced, an answer can come from another one than the key names:
        # not to be kept.
        if key and isinstance(reply, ScoreReply) and reply.llm_digest == digest:
            with suppress(queue.Full):
                self._unwritten.put_nowait((key, reply))

    def _write_all(self) -> None:
        resume = 0.0
        while (unwritten := self._unwritten.get()) is not None:
            key, reply = unwritten
            if time.monotonic() < resume or not self._breaker.is_closed:
                continue
            try:
                with redis_errors(self._place):
                    value = encode_selection(reply)
                    self._redis.set(CACHE_PREFIX + key, value, ex=self._ttl_s)
            except StoreError as error:
                log.info("selections are not kept for %.0f s: %s", WRITE_PAUSE_S, error)
                resume = time.monotonic() + WRITE_PAUSE_S


def cacheable(query: ScoreQuery) -> bool:
    """Single selections only: a whole rollout would fill the cache with answers nobody asks for
    again."""
    return not query.fresh and len(query.positions) == len(query.candidate_ids) == 1


def _settle(future: Future[ScoreReply], outcome: ScoreReply | BaseException | None) -> None:
    """Complete a future; one that its owner has cancelled (the only case for None) is left so."""
    if future.set_running_or_notify_cancel():
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            assert outcome is not None
            future.set_result(outcome)


def _cancel_too(answer: Future[ScoreReply], future: Future[ScoreReply]) -> None:
    if future.cancelled():
        answer.cancel()


def selection_key(query: ScoreQuery, info: LLMInfo) -> str:
    """A hash of everything that the reply depends on."""
    parts = [
        query.token_ids,
        query.positions,
        query.candidate_ids,
        query.excluded_ids,
        query.vocab_size,
        info.digest,
        info.tokenizer_digest,
    ]
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def encode_selection(reply: ScoreReply) -> str:
    """Compact JSON; its floats read back bit for bit."""
    positions = [[[float(x) for x in p.log_probs], p.top_id] for p in reply.positions]
    return json.dumps(positions, separators=(",", ":"))


def decode_selection(value: bytes | None, query: ScoreQuery, digest: str) -> ScoreReply | None:
    """The cached reply to a one-position query; None if there is none or it cannot be one."""
    try:
        [[log_probs, top_id]] = json.loads(value or b"")
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(log_probs, list) or type(top_id) is not int:
        return None
    if not all(type(x) is float for x in log_probs):
        return None
    reply = ScoreReply((PositionScores(tuple(log_probs), top_id),), digest, cached=True)
    try:
        check_reply(query, reply)
    except SelectorUnavailableError:
        return None
    return reply
