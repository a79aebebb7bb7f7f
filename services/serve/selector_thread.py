"""The LLM as an asyncio service: torch's LLM selector on a thread of its own, and what any other
runtime must offer instead. Knows the LLM selector's interface; no network."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from s2t_shared.decode.heartbeat import Heartbeat
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import LLMSelector, PendingQuery
from s2t_shared.errors import SelectorUnavailableError
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import call_record, tracing

log = logging.getLogger(__name__)
JOIN_S = 1.0


class AsyncSelector(Protocol):
    """An LLM that answers queries on an asyncio loop."""

    @property
    def info(self) -> LLMInfo: ...

    @property
    def is_alive(self) -> bool:
        """Whether anything can still be answered."""
        ...

    @property
    def silent_s(self) -> float:
        """Seconds since the LLM has moved on; 0 while nobody asks."""
        ...

    @property
    def kv_usage(self) -> float | None:
        """Share of the LLM's KV memory in use, 0..1; None: the runtime does not say. From any
        thread."""
        ...

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        """The reply to a query. time_left_s: how long its caller waits; None for no limit.

        Raises:
            InvalidRequestError: the query is wrong.
            SelectorUnavailableError: the time was up, or the LLM has died.
        """
        ...

    def shutdown(self) -> None:
        """End the LLM. Queries under way fail."""
        ...


@dataclass(frozen=True)
class QueuedQuery:
    """A query on its way to the LLM's thread, and the future of its reply.

    deadline: a `time.monotonic()` value in seconds, None for none. span: of the call that brought
    it.
    """

    query: ScoreQuery
    future: asyncio.Future[ScoreReply]
    loop: asyncio.AbstractEventLoop
    deadline: float | None
    span: tracing.Span = tracing.NOTHING

    def is_wanted(self) -> bool:
        """Whether its caller still waits."""
        if self.future.cancelled():
            return False
        return self.deadline is None or time.monotonic() < self.deadline

    def complete(self, outcome: ScoreReply | SelectorUnavailableError) -> None:
        """Tell the caller. Called on the LLM's thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self.loop.call_soon_threadsafe(_complete, self.future, outcome)


def _complete(
    future: asyncio.Future[ScoreReply], outcome: ScoreReply | SelectorUnavailableError
) -> None:
    if future.done():  # its caller has given up
        return
    if isinstance(outcome, SelectorUnavailableError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


class SelectorThread:
    """Owns the LLM selector on one thread.

    Queries join before any forward. Those that nobody waits for any more are dropped. When the
    thread ends, by a bug or by `shutdown`, all others fail.
    """

    def __init__(self, llm: LLMSelector) -> None:
        self._llm = llm
        self._inbox: queue.SimpleQueue[QueuedQuery | None] = queue.SimpleQueue()  # None: the end
        self._in_progress: dict[PendingQuery, QueuedQuery] = {}
        self._ended = False
        self._heartbeat = Heartbeat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="llm")
        self._thread.start()

    @property
    def info(self) -> LLMInfo:
        return self._llm.info

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still answer queries."""
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """Seconds since the thread's loop has turned; 0 while there is nothing to do."""
        return self._heartbeat.silent_s

    @property
    def kv_usage(self) -> float:
        return self._llm.runtime.pool.usage

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        """The reply to a query. time_left_s: how long its caller waits; None for no limit.

        Raises:
            InvalidRequestError: the query is wrong.
            SelectorUnavailableError: the time was up before the LLM came to it, or it has failed.
        """
        self._llm.check(query)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ScoreReply] = loop.create_future()
        deadline = time.monotonic() + time_left_s if time_left_s is not None else None
        span = call_record.current().span
        self._inbox.put(QueuedQuery(query, future, loop, deadline, span))
        if self._ended:
            self._fail_all()
        return await future

    def shutdown(self) -> None:
        """End the thread. Queries under way fail."""
        self._inbox.put(None)
        self._thread.join(JOIN_S)

    # -- on the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ended:
                self._turn()
        except Exception:  # the thread's own border: nobody is above
            log.exception("the LLM's thread ends")
        finally:
            self._ended = True
            self._fail_all()

    def _turn(self) -> None:
        if self._llm.idle:
            self._heartbeat.rest()
            queued = self._inbox.get()
            self._heartbeat.beat()
            self._add(queued)
        while not self._inbox.empty():
            self._add(self._inbox.get())
        if self._ended:
            return
        span = self._batch_span()
        answered = self._llm.step()
        span.end()
        for pending, reply in answered:
            late = SelectorUnavailableError("the deadline passed before the LLM came to it")
            self._in_progress.pop(pending).complete(reply or late)
        self._heartbeat.beat()

    def _batch_span(self) -> tracing.Span:
        """Of one forward: a child of one query that it serves, linked with the others."""
        if not tracing.is_on():
            return tracing.NOTHING
        spans = [queued.span for queued in self._in_progress.values() if queued.span.is_recorded]
        if not spans:
            return tracing.NOTHING
        first, *others = spans
        queries = len(self._in_progress)
        return tracing.start("llm.forward", first.headers, links=others, queries=queries)

    def _add(self, queued: QueuedQuery | None) -> None:
        if queued is None:
            self._ended = True
            return
        pending = self._llm.add(queued.query, queued.is_wanted)
        self._in_progress[pending] = queued

    def _fail_all(self) -> None:
        waiting: list[QueuedQuery | None] = list(self._in_progress.values())
        self._in_progress.clear()
        with suppress(queue.Empty):
            while True:
                waiting.append(self._inbox.get_nowait())
        for queued in waiting:
            if queued is not None:
                queued.complete(SelectorUnavailableError("the LLM has failed"))
