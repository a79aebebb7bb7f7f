"""Asks a running service many requests at once, for harvest, evaluation and the demo.

Concurrency is bounded. Outcomes are in input order; a request that failed has its error there.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from s2t_shared.errors import OverloadedError, S2TError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import channels, wire
from services.rpc.tls import ClientTLS

DESCRIBE_TIMEOUT_S = 30.0
T = TypeVar("T")
R = TypeVar("R")
Outcome = Answer | S2TError


@dataclass(frozen=True)
class Target:
    """A service to ask.

    token: the caller's. tls: None for plain text.
    """

    address: str
    token: str | None = None
    tls: ClientTLS | None = None

    def open_channel(self, asynchronous: bool = True) -> Any:
        """A channel to the service."""
        return channels.open_channel(self.address, self.tls, asynchronous)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that each call must carry."""
        return channels.call_metadata(self.token)


class AsyncCaller:
    """Calls to one service on one open channel."""

    def __init__(self, target: Target, channel: Any) -> None:
        self._metadata = target.metadata
        self._stub = pb_grpc.GenerationServiceStub(channel)

    async def answer(self, request: GenerateRequest, timeout_s: float) -> Outcome:
        """The finished answer, or the request's error."""
        message = pb.GenerateRequest(
            request_id=request.request_id, parameters=wire.write_request(request)
        )
        try:
            response = await self._stub.Generate(
                message, timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            return wire.error_of(error)
        return wire.read_answer(response.answer)

    async def patient_answer(self, request: GenerateRequest, timeout_s: float) -> Outcome:
        """As `answer`; an overloaded service is asked again when it says so, within the timeout."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            outcome = await self.answer(request, max(0.0, give_up_at - time.monotonic()))
            pause_s = pause_before_retry(outcome)
            if pause_s is None or time.monotonic() + pause_s >= give_up_at:
                return outcome
            await asyncio.sleep(pause_s)

    async def stream(
        self, request: GenerateRequest, timeout_s: float
    ) -> AsyncIterator[AnswerPiece]:
        """Pieces of the answer; the last one carries it.

        Raises:
            S2TError: the request was refused or could not be answered.
        """
        message = pb.StreamGenerateRequest(
            request_id=request.request_id,
            parameters=wire.write_request(request),
            stream_steps=request.stream_steps,
        )
        call = self._stub.StreamGenerate(message, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield wire.read_piece(response)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
        finally:
            call.cancel()


def pause_before_retry(outcome: Outcome) -> float | None:
    """Seconds until an overloaded service wants to be asked again, and a little more, so that not
    all its callers come back at once. None for any other outcome."""
    if not isinstance(outcome, OverloadedError) or outcome.retry_after_s is None:
        return None
    return outcome.retry_after_s * random.uniform(1.0, 1.5)


def describe(target: Target) -> ServiceDescription:
    """What a service runs.

    Raises:
        S2TError: it cannot be asked.
    """
    with target.open_channel(asynchronous=False) as channel:
        try:
            response = pb_grpc.GenerationServiceStub(channel).DescribeService(
                pb.DescribeServiceRequest(), timeout=DESCRIBE_TIMEOUT_S, metadata=target.metadata
            )
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
    return wire.read_description(response)


def answer_all(
    target: Target,
    requests: Iterable[GenerateRequest],
    concurrency: int = 32,
    timeout_s: float = 300.0,
    on_answer: Callable[[GenerateRequest, Outcome], None] = lambda request, outcome: None,
) -> list[Outcome]:
    """Ask all requests; returns outcomes in input order.

    timeout_s: seconds of each request, those included in which an overloaded service lets it wait.
    on_answer: called with each request and its outcome when it is known.
    """

    async def main() -> list[Outcome]:
        async with target.open_channel() as channel:
            caller = AsyncCaller(target, channel)

            async def ask(request: GenerateRequest) -> Outcome:
                outcome = await caller.patient_answer(request, timeout_s)
                on_answer(request, outcome)
                return outcome

            return await bounded(list(requests), ask, concurrency)

    return asyncio.run(main())


async def bounded(
    items: Sequence[T], work: Callable[[T], Awaitable[R]], concurrency: int
) -> list[R]:
    """`work` on every item, at most `concurrency` at once; results in input order."""
    results: dict[int, R] = {}
    waiting = iter(enumerate(items))

    async def worker() -> None:
        for index, item in waiting:
            results[index] = await work(item)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(items)))))
    return [results[i] for i in range(len(items))]
