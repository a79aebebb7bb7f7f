"""A small selection server on loopback that needs no LLM."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc

from s2t_shared.config import SecurityConfig
from s2t_shared.errors import TokenizerMismatchError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from services.rpc import channels, wire

OPEN = SecurityConfig()


@dataclass(eq=False)
class FixedSelection(pb_grpc.SelectionServiceServicer):
    """Says that each candidate has log-probability -1; fails when asked about id 13.

    delay_s: before each reply. hung: nothing is answered until it is set again. only_scores_hang:
    a hung one still says which LLM it runs, as a server does whose GPU hangs. status: fails with
    it. asked: the sequences that were scored for, in order; probes are not among them.
    """

    digest: str = "llm"
    tokenizer_digest: str = "tok"
    eos_ids: tuple[int, ...] = (1,)
    delay_s: float = 0.0
    only_scores_hang: bool = True
    status: grpc.StatusCode | None = None
    reply: pb.ScoreResponse | None = None
    asked: list[str] = field(default_factory=list)
    probes: int = 0
    _runs: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._runs.set()

    def hang(self) -> None:
        self._runs.clear()

    def go_on(self) -> None:
        self._runs.set()

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        if request.sequence_id == "probe":
            self.probes += 1
        else:
            self.asked.append(request.sequence_id)
        await self._runs.wait()
        await asyncio.sleep(self.delay_s)
        if self.status is not None:
            await context.abort(self.status, "as the test wants it")
        if 13 in request.token_ids:
            await wire.abort(context, TokenizerMismatchError("thirteen"))
        if self.reply is not None:
            return self.reply
        return pb.ScoreResponse(
            log_probs=[-1.0] * len(request.candidate_ids),
            top_ids=[7],
            llm_digest=self.digest,
            tokenizer_digest=self.tokenizer_digest,
        )

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        if not self.only_scores_hang:
            await self._runs.wait()
        return pb.DescribeModelResponse(
            digest=self.digest,
            tokenizer_digest=self.tokenizer_digest,
            eos_ids=self.eos_ids,
            max_length=99,
        )


async def start_selection_server(
    security: SecurityConfig,
    limit: int = channels.MAX_MESSAGE_BYTES,
    selection: FixedSelection | None = None,
    port: int = 0,
) -> tuple[grpc.aio.Server, str]:
    server = channels.new_server(security, limit)
    pb_grpc.add_SelectionServiceServicer_to_server(selection or FixedSelection(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = channels.bind(server, "127.0.0.1", port, security, "test.port")
    await server.start()
    return server, f"127.0.0.1:{port}"
