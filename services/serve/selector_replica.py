"""A selector replica: the LLM behind its own gRPC server. Its jobs: 1. batch the queries of many
proposers, 2. say its address, 3. report its health. What a query means is `scorer.LLMSelector`'s
business.

Proposers call this server directly: a Serve handle or proxy would cost 7-12 ms a selection, this
hop about one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from dataclasses import dataclass

import grpc
import grpc.aio
import ray
import torch

from s2t_shared.config import LOOPBACK, Config
from s2t_shared.decode.llm_selector import LLMSelector, PendingQuery
from s2t_shared.errors import S2TError, SelectorUnavailableError
from s2t_shared.model.runtime import ModelRuntime, resolve_model
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import channels, wire

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A query on its way to the LLM's thread, and where its answer goes."""

    query: ScoreQuery
    future: asyncio.Future[ScoreReply]
    loop: asyncio.AbstractEventLoop
    deadline: float | None

    def is_wanted(self) -> bool:
        return not self.future.cancelled() and (
            self.deadline is None or time.monotonic() < self.deadline
        )


class SelectorThread:
    """One thread owns the scorer. Queries join before any forward; those nobody waits for any more
    are dropped."""

    def __init__(self, scorer: LLMSelector) -> None:
        self._scorer = scorer
        self._inbox: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._answering: dict[PendingQuery, _Asked] = {}
        self.thread = threading.Thread(target=self._run, daemon=True, name="llm")
        self.thread.start()

    async def score(self, query: ScoreQuery, time_left_s: float | None = None) -> ScoreReply:
        """Raises InvalidRequestError."""
        self._scorer.check(query)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ScoreReply] = loop.create_future()
        deadline = time.monotonic() + time_left_s if time_left_s is not None else None
        self._inbox.put(_Asked(query, future, loop, deadline))
        return await future

    def _run(self) -> None:
        while True:
            if self._scorer.idle:
                self._take(self._inbox.get())
            while not self._inbox.empty():
                self._take(self._inbox.get())
            for pending, reply in self._scorer.step():
                asked = self._answering.pop(pending)
                asked.loop.call_soon_threadsafe(_complete, asked.future, reply)

    def _take(self, asked: _Asked) -> None:
        self._answering[self._scorer.add(asked.query, asked.is_wanted)] = asked


def _complete(future: asyncio.Future[ScoreReply], reply: ScoreReply | None) -> None:
    if not future.done():
        if reply is None:
            future.set_exception(
                SelectorUnavailableError("the deadline passed before the LLM came to it")
            )
        else:
            future.set_result(reply)


class SelectionServicer(pb_grpc.SelectionServiceServicer):
    """The wire around a `SelectorThread`."""

    def __init__(self, batcher: SelectorThread, scorer: LLMSelector) -> None:
        self._batcher, self._info = batcher, scorer.info

    def add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_SelectionServiceServicer_to_server(self, server)

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        try:
            query = wire.read_query(request)
            return wire.write_reply(await self._batcher.score(query, context.time_remaining()))
        except S2TError as error:
            await wire.abort(context, error)
            raise AssertionError("abort raises") from error

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(
            digest=self._info.digest,
            tokenizer_digest=self._info.tokenizer_digest,
            eos_ids=sorted(self._info.eos_ids),
            max_length=self._info.max_length,
        )


class Selector:
    """The Serve deployment."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        torch.set_num_threads(config.llm.threads)
        runtime = ModelRuntime.load(
            config.llm_model, config.llm.dtype, config.llm.device, config.llm.kv_bytes
        )
        tokenizer = Tokenizer.load(resolve_model(config.llm_model))
        scorer = LLMSelector(runtime, tokenizer.digest)
        self._batcher = SelectorThread(scorer)
        self._server = channels.new_server(config.security)
        SelectionServicer(self._batcher, scorer).add_to(self._server)
        host = config.selector.host
        port = channels.bind(self._server, host, 0, config.security, "selector.host")
        await self._server.start()
        self._address = f"{host if host in LOOPBACK else ray.util.get_node_ip_address()}:{port}"
        log.info("selector ready: llm %s", scorer.info.digest)

    async def address(self) -> str:
        return self._address

    def check_health(self) -> None:
        if not self._batcher.thread.is_alive():
            raise RuntimeError("the LLM thread has died")
