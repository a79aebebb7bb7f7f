"""Answers of one HTTP request: one or several at once, whole or streamed, ended when their client
goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, Step
from services.http.door import Door

Result = TypeVar("Result")
Pieces = AsyncGenerator[tuple[int, AnswerPiece], None]
CLIENT_CLOSED = 499  # nobody reads it, but for logs


class ClientGoneError(Exception):
    """The client hung up before its answer was there."""


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` gives; it is cancelled when the client hangs up. The request was read to its end.

    Raises:
        ClientGoneError: it did.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait((working, gone))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def all_answers(
    door: Door, requests: Sequence[GenerateRequest]
) -> list[tuple[Answer, Sequence[Step]]]:
    """Whole answers, in order, with the Steps that were streamed: the prompt's, then the answer's.
    The first error ends all."""
    tasks = [asyncio.ensure_future(_answer(door, request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _answer(door: Door, request: GenerateRequest) -> tuple[Answer, Sequence[Step]]:
    if not request.stream_steps:
        return await door.answer(request), ()
    steps: list[Step] = []
    async with aclosing(door.stream(request)) as pieces:
        async for piece in pieces:
            steps += (*piece.prompt, *piece.steps)
            if piece.answer is not None:
                return piece.answer, steps
    raise AssertionError("a stream ends with its answer")


async def all_pieces(door: Door, requests: Sequence[GenerateRequest]) -> Pieces:
    """Pieces of all answers as they come, each with the place of its request. The first error ends
    all; so does closing."""
    if len(requests) == 1:
        async with aclosing(door.stream(requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, AnswerPiece] | Exception | None] = asyncio.Queue()

    async def follow(place: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(door.stream(request)) as pieces:
                async for piece in pieces:
                    arrived.put_nowait((place, piece))
            arrived.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised again where the pieces are read
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(*numbered)) for numbered in enumerate(requests)]
    try:
        unfinished = len(tasks)
        while unfinished:
            found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                unfinished -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class EventStream(Response):
    """Server-sent events from a generator, which is closed when they end or the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            with suppress(ClientGoneError):
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
