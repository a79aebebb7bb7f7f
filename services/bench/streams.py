"""Streams of a running service, by gRPC and by HTTP, and when their pieces come."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import urlsplit

from s2t_shared.errors import ServiceUnavailableError
from s2t_shared.types import GenerateRequest
from services.bench.measure import Figure, figure, ratios
from services.rpc.ask_many import AsyncCaller, Target

TIMEOUT_S = 600.0
Pieces = AsyncGenerator[int, None]  # 0 for a piece of text; at the end the answer's tokens


@dataclass(frozen=True)
class Streamed:
    """Several streams at once. firsts: seconds from a stream's request to its first piece. gaps:
    seconds between pieces. seconds: of all together."""

    seconds: float
    tokens: int
    firsts: tuple[float, ...]
    gaps: tuple[float, ...]


def by_grpc(address: str, requests: Sequence[GenerateRequest]) -> Streamed:
    """The answers, streamed over one channel. Raises S2TError."""

    async def main() -> Streamed:
        target = Target(address)
        async with target.open_channel() as channel:
            caller = AsyncCaller(target, channel)
            await channel.channel_ready()

            async def pieces(request: GenerateRequest) -> Pieces:
                async for piece in caller.stream(request, TIMEOUT_S):
                    if piece.text:
                        yield 0
                    if piece.answer is not None:
                        yield piece.answer.usage.completion_tokens

            return await _gathered(pieces, requests)

    return asyncio.run(main())


def by_http(url: str, model: str, requests: Sequence[GenerateRequest]) -> Streamed:
    """The greedy answers as server-sent events, each over a connection of its own.

    Raises:
        ServiceUnavailableError: the service refused one.
    """
    place = urlsplit(url)

    async def main() -> Streamed:
        connections = [await asyncio.open_connection(place.hostname, place.port) for _ in requests]
        free = iter(connections)

        async def pieces(request: GenerateRequest) -> Pieces:
            reader, writer = next(free)
            writer.write(_posted(place.netloc, model, request))
            async for event in _events(reader):
                if any(choice["text"] for choice in event["choices"]):
                    yield 0
                if event.get("usage"):
                    yield event["usage"]["completion_tokens"]
            writer.close()

        return await _gathered(pieces, requests)

    return asyncio.run(main())


def _posted(host: str, model: str, request: GenerateRequest) -> bytes:
    asked = {
        "model": f"{model}:greedy",
        "prompt": request.prompt.token_ids,
        "max_tokens": request.options.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict]:
    """The JSON of each event.

    Raises:
        ServiceUnavailableError: the service refused the request.
    """
    status = await reader.readline()
    if b" 200 " not in status:
        raise ServiceUnavailableError(f"HTTP: {status.decode('latin-1').strip()}")
    async for line in reader:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


async def _gathered(
    pieces: Callable[[GenerateRequest], Pieces], requests: Sequence[GenerateRequest]
) -> Streamed:
    began = time.perf_counter()

    async def follow(request: GenerateRequest) -> tuple[list[float], int]:
        arrivals = [time.perf_counter()]
        tokens = 0
        async with aclosing(pieces(request)) as stream:
            async for tokens in stream:
                if not tokens:
                    arrivals.append(time.perf_counter())
        return arrivals, tokens

    followed = await asyncio.gather(*map(follow, requests))
    seconds = time.perf_counter() - began
    firsts, gaps = [], []
    for arrivals, _ in followed:
        waits = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
        firsts += waits[:1]
        gaps += waits[1:]
    tokens = sum(tokens for _, tokens in followed)
    return Streamed(seconds, tokens, tuple(firsts), tuple(gaps))


def compared(http: Sequence[Streamed], grpc: Sequence[Streamed]) -> list[Figure]:
    """HTTP over gRPC, turn by turn."""
    measures: dict[str, Callable[[Streamed], float]] = {
        "tokens per second": lambda turn: turn.tokens / turn.seconds,
        "time to first token": lambda turn: statistics.median(turn.firsts),
        "the same, p99": lambda turn: _p99(turn.firsts),
        "time between tokens": lambda turn: statistics.fmean(turn.gaps),
        "time between tokens, p99": lambda turn: _p99(turn.gaps),
    }
    return [
        figure(
            f"HTTP / gRPC, {name}",
            ratios([measure(turn) for turn in http], [measure(turn) for turn in grpc]),
            "x",
        )
        for name, measure in measures.items()
    ]


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
