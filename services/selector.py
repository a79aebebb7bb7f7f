"""A selector replica: the LLM behind its own gRPC server. Its jobs: 1. batch the queries of many proposers,
2. say its address, 3. report its health. What a query means is `scorer.LLMScorer`'s business.

Proposers call this server directly: a Serve handle or proxy would cost 7-12 ms a selection, this hop about one.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import Any

import grpc
import grpc.aio
import ray
import torch

from s2t_shared.config import LOOPBACK, Config
from s2t_shared.errors import S2TError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from s2t_shared.runtime import ModelRuntime, resolve_model
from s2t_shared.scorer import LLMScorer
from s2t_shared.text import Tokenizer
from s2t_shared.types import ScoreQuery, ScoreReply
from services import net, wire

log = logging.getLogger(__name__)
MAX_BATCH = 64


class ScoreBatcher:
    """One thread owns the scorer; whatever queries have come in since the last forward make the next batch."""

    def __init__(self, scorer: LLMScorer) -> None:
        self._scorer = scorer
        self._inbox: queue.SimpleQueue[tuple[ScoreQuery, asyncio.Future[ScoreReply], Any]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="llm")
        self.thread.start()

    async def score(self, query: ScoreQuery) -> ScoreReply:
        """Raises InvalidRequestError. A caller that goes away before the forward costs nothing."""
        self._scorer.check(query)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ScoreReply] = loop.create_future()
        self._inbox.put((query, future, loop))
        return await future

    def _run(self) -> None:
        while True:
            batch = [self._inbox.get()]
            while len(batch) < MAX_BATCH and not self._inbox.empty():
                batch.append(self._inbox.get())
            batch = [item for item in batch if not item[1].cancelled()]
            if not batch:
                continue
            replies = self._scorer.score([query for query, _, _ in batch])
            for (_, future, loop), reply in zip(batch, replies, strict=True):
                loop.call_soon_threadsafe(_complete, future, reply)


def _complete(future: asyncio.Future[ScoreReply], reply: ScoreReply) -> None:
    if not future.done():
        future.set_result(reply)


class SelectionServicer(pb_grpc.SelectionServiceServicer):
    """The wire around a `ScoreBatcher`."""

    def __init__(self, batcher: ScoreBatcher, scorer: LLMScorer) -> None:
        self._batcher, self._info = batcher, scorer.info

    async def Score(self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext) -> pb.ScoreResponse:
        try:
            return wire.write_reply(await self._batcher.score(wire.read_query(request)))
        except S2TError as error:
            await wire.abort(context, error)
            raise AssertionError("abort raises") from error

    async def DescribeModel(self, request: pb.DescribeModelRequest,
                            context: grpc.aio.ServicerContext) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(digest=self._info.digest, tokenizer_digest=self._info.tokenizer_digest,
                                        eos_ids=sorted(self._info.eos_ids), max_length=self._info.max_length)


class Selector:
    """The Serve deployment."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        torch.set_num_threads(config.llm.threads)
        runtime = ModelRuntime.load(config.llm_model, config.llm.dtype, config.llm.device, config.llm.kv_bytes)
        tokenizer = Tokenizer.load(resolve_model(config.llm_model))
        scorer = LLMScorer(runtime, tokenizer.digest)
        self._batcher = ScoreBatcher(scorer)
        self._server = net.new_server(config.security)
        pb_grpc.add_SelectionServiceServicer_to_server(SelectionServicer(self._batcher, scorer), self._server)
        host = config.selector.host
        port = net.bind(self._server, host, 0, config.security, "selector.host")
        await self._server.start()
        self._address = f"{host if host in LOOPBACK else ray.util.get_node_ip_address()}:{port}"
        log.info("selector ready: llm %s", scorer.info.digest)

    async def address(self) -> str:
        return self._address

    def check_health(self) -> None:
        if not self._batcher.thread.is_alive():
            raise RuntimeError("the LLM thread has died")
