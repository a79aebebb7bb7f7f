"""A small selection server on loopback that needs no LLM."""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc

from s2t_shared.config import SecurityConfig
from s2t_shared.errors import TokenizerMismatchError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from services.rpc import channels, wire

OPEN = SecurityConfig()


class FixedSelection(pb_grpc.SelectionServiceServicer):
    """Says that the first candidate has log-probability -1; fails when asked about id 13."""

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        if 13 in request.token_ids:
            await wire.abort(context, TokenizerMismatchError("thirteen"))
        return pb.ScoreResponse(log_probs=[-1.0] * len(request.candidate_ids), top_ids=[7])

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(
            digest="llm", tokenizer_digest="tok", eos_ids=[1], max_length=99
        )


async def start_selection_server(
    security: SecurityConfig, limit: int = channels.MAX_MESSAGE_BYTES
) -> tuple[grpc.aio.Server, str]:
    server = channels.new_server(security, limit)
    pb_grpc.add_SelectionServiceServicer_to_server(FixedSelection(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = channels.bind(server, "127.0.0.1", 0, security, "test.port")
    await server.start()
    return server, f"127.0.0.1:{port}"
