"""The LLM behind a gRPC server: joins the queries of many proposers in one forward.

What runs the LLM is behind `AsyncSelector`: torch on a thread of its own, or vLLM.

Proposers call this server directly. A Serve handle or proxy would cost 7-12 ms a selection, this
hop about one. Knows gRPC and the LLM selector's interface; no Ray.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from s2t_shared.config import SecurityConfig, SelectorConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.llm_selector import LLMSelector, PendingQuery
from s2t_shared.errors import SelectorUnavailableError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import channels, wire
from services.serve.client_quota import ClientQuota
from services.serve.request_limits import check_score_request


@dataclass(frozen=True)
class QueuedQuery:
    """A query on its way to the LLM's thread, and the future of its reply.

    deadline: a `time.monotonic()` value in seconds, None for none.
    """

    query: ScoreQuery
    future: asyncio.Future[ScoreReply]
    loop: asyncio.AbstractEventLoop
    deadline: float | None

    def is_wanted(self) -> bool:
        """Whether its caller still waits."""
        if self.future.cancelled():
            return False
        return self.deadline is None or time.monotonic() < self.deadline


class AsyncSelector(Protocol):
    """An LLM that answers queries on an asyncio loop."""

    @property
    def info(self) -> LLMInfo: ...

    @property
    def is_alive(self) -> bool:
        """Whether anything can still be answered."""
        ...

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        """The reply to a query. time_left_s: how long its caller waits; None for no limit.

        Raises:
            InvalidRequestError: the query is wrong.
            SelectorUnavailableError: the time was up, or the LLM has died.
        """
        ...


class SelectorThread:
    """Owns the LLM selector on one thread.

    Queries join before any forward. Those that nobody waits for any more are dropped.
    """

    def __init__(self, llm: LLMSelector) -> None:
        self._llm = llm
        self._inbox: queue.SimpleQueue[QueuedQuery] = queue.SimpleQueue()
        self._in_progress: dict[PendingQuery, QueuedQuery] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="llm")
        self._thread.start()

    @property
    def info(self) -> LLMInfo:
        return self._llm.info

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still answer queries."""
        return self._thread.is_alive()

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        """The reply to a query. time_left_s: how long its caller waits; None for no limit.

        Raises:
            InvalidRequestError: the query is wrong.
            SelectorUnavailableError: the time was up before the LLM came to it.
        """
        self._llm.check(query)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ScoreReply] = loop.create_future()
        deadline = time.monotonic() + time_left_s if time_left_s is not None else None
        self._inbox.put(QueuedQuery(query, future, loop, deadline))
        return await future

    def _run(self) -> None:
        while True:
            if self._llm.idle:
                self._add(self._inbox.get())
            while not self._inbox.empty():
                self._add(self._inbox.get())
            for pending, reply in self._llm.step():
                queued = self._in_progress.pop(pending)
                queued.loop.call_soon_threadsafe(_complete, queued.future, reply)

    def _add(self, queued: QueuedQuery) -> None:
        pending = self._llm.add(queued.query, queued.is_wanted)
        self._in_progress[pending] = queued


def _complete(future: asyncio.Future[ScoreReply], reply: ScoreReply | None) -> None:
    if future.done():  # its caller has given up
        return
    if reply is None:
        late = SelectorUnavailableError("the deadline passed before the LLM came to it")
        future.set_exception(late)
    else:
        future.set_result(reply)


class SelectionServicer(pb_grpc.SelectionServiceServicer):
    """`SelectionService` over an `AsyncSelector`. queries: that wait for their reply now."""

    def __init__(self, selector: AsyncSelector, settings: SelectorConfig) -> None:
        self._selector = selector
        self._info = selector.info
        self.queries = 0
        self._quota = ClientQuota(settings.max_queries_per_client, settings.max_queries)

    def add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_SelectionServiceServicer_to_server(self, server)

    async def Score(
        self, message: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        self._quota.count(context)
        self.queries += 1
        try:
            check_score_request(message, self._info.max_length)
            query = wire.read_query(message)
            reply = await self._selector.score(query, context.time_remaining())
            return wire.write_reply(reply, self._info.tokenizer_digest)
        finally:
            self.queries -= 1

    async def DescribeModel(
        self, message: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(
            digest=self._info.digest,
            tokenizer_digest=self._info.tokenizer_digest,
            eos_ids=sorted(self._info.eos_ids),
            max_length=self._info.max_length,
        )


class SelectorServer:
    """One server with one LLM. Created and started on one loop."""

    def __init__(
        self, selector: AsyncSelector, security: SecurityConfig, settings: SelectorConfig
    ) -> None:
        """Listen on the configured host and port (0: a free one), but answer nothing yet.

        Raises:
            ConfigError: the address is not this machine's, or a security file cannot be used.
        """
        self.llm_digest = selector.info.digest
        self._selector = selector
        # More than are answered: one that waits in gRPC would not hear that there is no room.
        limits = channels.ConnectionLimits(max_streams=2 * settings.max_queries)
        self._server = channels.new_server(security, connections=limits)
        self._servicer = SelectionServicer(selector, settings)
        self._servicer.add_to(self._server)
        self.port = channels.bind(
            self._server, settings.host, settings.port, security, "selector.port"
        )

    @property
    def queries(self) -> int:
        """Queries that are being answered or wait for it."""
        return self._servicer.queries

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()

    async def stop(self) -> None:
        """Take no more calls, and end those under way."""
        await self._server.stop(None)

    def check_health(self) -> None:
        """Raises RuntimeError: nothing can be answered any more."""
        if not self._selector.is_alive:
            raise RuntimeError("what runs the LLM has died")
