"""Many questions at once to a running service: the async side of harvest, evaluation and the demo.

Bounded concurrency, answers in input order, a question's own error in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from s2t_shared.errors import S2TError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import Answer, GenerateRequest, Prompt
from services.rpc import channels, wire

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Target:
    """A service to ask: its address, the caller's token, and the authority its certificate is
    checked against."""

    address: str
    token: str | None = None
    authority: str | None = None


def answer_all(
    target: Target,
    requests: Iterable[GenerateRequest],
    concurrency: int = 32,
    timeout_s: float = 300.0,
    on_answer: Callable[[Answer | S2TError], None] = lambda answer: None,
) -> list[Answer | S2TError]:
    """Ask requests; `on_answer` is called as each is done."""

    async def ask(
        stub: pb_grpc.GenerationServiceStub, request: GenerateRequest
    ) -> Answer | S2TError:
        try:
            response = await stub.Generate(
                wire.write_request(request),
                timeout=timeout_s,
                metadata=channels.call_metadata(target.token),
            )
            result: Answer | S2TError = wire.read_answer(response.answer)
        except grpc.RpcError as error:
            result = wire.error_of(error)
        on_answer(result)
        return result

    async def main() -> list[Answer | S2TError]:
        from pathlib import Path

        async with channels.open_channel(
            target.address, Path(target.authority) if target.authority else None
        ) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            return await bounded(list(requests), lambda item: ask(stub, item), concurrency)

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


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """The wire's prompt field of a prompt."""
    if prompt.text is not None:
        return {"text": prompt.text}
    if prompt.messages:
        return {
            "messages": pb.Messages(
                messages=[pb.Message(role=m.role, content=m.content) for m in prompt.messages]
            )
        }
    return {"token_ids": pb.TokenIds(ids=prompt.token_ids)}
