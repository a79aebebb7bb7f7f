"""The client's door to the proposers: messages in, requests to a proposer, messages out.

Knows the wire and what proposers offer; no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

import grpc
import grpc.aio

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import wire
from services.serve.intake import Intake

log = logging.getLogger(__name__)
NO_DEADLINE_S = 1e6  # gRPC gives a call without a deadline a huge number of seconds


class Proposers(Protocol):
    """Who answers: a `ProposerService` in this process, or the replicas behind a Serve handle.

    Whoever is done with a stream before its end closes it. Methods raise S2TError.
    """

    def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]: ...

    async def answer(self, request: GenerateRequest) -> Answer: ...

    async def describe(self) -> ServiceDescription: ...

    async def count_dropped_labels(self) -> int: ...


async def refuse(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the status and text of `error`; one that is unexpected is raised, for the
    server's border."""
    if isinstance(error, S2TError):
        if wire.public_text(error) != str(error):
            log.warning("told a client less than this: %s", error)
        await wire.abort(context, error)
    raise error


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """`GenerationService` over proposers."""

    def __init__(self, config: Config, proposers: Proposers, intake: Intake | None = None) -> None:
        """intake: shared with the gateway's other transports; None: it has no others."""
        self._intake = intake or Intake(config)
        self._proposers = proposers

    async def StreamGenerate(
        self, message: pb.StreamGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        try:
            request = self._read(message, context)
            pieces = self._proposers.stream(request)
            _close_with(context, pieces)
            async for piece in pieces:
                yield wire.write_piece(request.request_id, piece)
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await self._refuse(context, error)

    async def Generate(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        try:
            request = self._read(message, context)
            answer = await self._proposers.answer(request)
            return pb.GenerateResponse(
                request_id=request.request_id, answer=wire.write_answer(answer)
            )
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await self._refuse(context, error)
            raise AssertionError("abort raises") from error

    async def DescribeService(
        self, message: pb.DescribeServiceRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeServiceResponse:
        try:
            return wire.write_description(await self._proposers.describe())
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await self._refuse(context, error)
            raise AssertionError("abort raises") from error

    async def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        if isinstance(error, S2TError):  # others the server's border sees
            self._intake.refused(error)
        await refuse(context, error)

    def _read(
        self,
        message: pb.StreamGenerateRequest | pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
    ) -> GenerateRequest:
        client = self._intake.quota.count(context)
        return self._intake.read(message, client, _time_remaining(context))


def _close_with(
    context: grpc.aio.ServicerContext, pieces: AsyncGenerator[AnswerPiece, None]
) -> None:
    """Close a stream of pieces when its RPC ends, so that its answer is cancelled.

    A `finally` of the handler would not do: a handler that is cancelled between two messages is
    closed only when it is collected. A stream that has ended ignores it.
    """
    loop = asyncio.get_running_loop()
    closing: set[asyncio.Task[None]] = set()  # the loop itself holds tasks only weakly

    def close(_: object) -> None:
        task = loop.create_task(pieces.aclose())
        closing.add(task)
        task.add_done_callback(closing.discard)

    context.add_done_callback(close)


def _time_remaining(context: grpc.aio.ServicerContext) -> float | None:
    """Seconds the client still waits, or None where it does not say."""
    remaining = context.time_remaining()
    if remaining is None or remaining >= NO_DEADLINE_S:
        return None
    return float(remaining)
