"""Proposers in processes of their own behind one gateway: what Ray Serve does between them, in
little.

A gateway calls a proposer over a Unix socket, one connection for each call; messages are pickles of
our own objects, as in Serve. A connection that ends before its call has is a proposer that was
lost.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2t_shared.errors import ProposerLostError, S2TError
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.serve import build_gateway
from services.serve.proposer_service import ProposerService
from tests.faults.processes import DRAIN_S, Control, ProposerSettings, scripted_service, vitals_of

SIZE_BYTES = 8
LOST = "the proposer that answered was lost; send the request again"


@dataclass(frozen=True)
class ReplicaSettings(ProposerSettings):
    """socket: where it is called."""

    socket: str = ""


async def replica(settings: ReplicaSettings, control: Control) -> None:
    """A proposer."""
    service = await scripted_service(settings)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await _serve(service, reader, writer)
        writer.close()

    Path(settings.socket).unlink(missing_ok=True)
    server = await asyncio.start_unix_server(serve, settings.socket)
    await control.serve(lambda: vitals_of(service))
    server.close()  # as Serve does: no new calls, and those under way are finished
    give_up_at = time.monotonic() + DRAIN_S
    while service.ongoing_requests and time.monotonic() < give_up_at:
        await asyncio.sleep(0.02)
    service.close()


async def _serve(
    service: ProposerService, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One call. A caller that closes its connection is cancelled."""
    method, arguments = await _read(reader)
    gone = asyncio.ensure_future(reader.read())
    working = asyncio.ensure_future(_work(service, method, arguments, writer))
    await asyncio.wait([gone, working], return_when=asyncio.FIRST_COMPLETED)
    for task in (gone, working):
        task.cancel()
    await asyncio.gather(gone, working, return_exceptions=True)


async def _work(
    service: ProposerService, method: str, arguments: Any, writer: asyncio.StreamWriter
) -> None:
    try:
        if method == "stream":
            async for piece in service.stream(*arguments):
                await _write(writer, ("piece", piece))
            await _write(writer, ("result", None))
        else:
            await _write(writer, ("result", await getattr(service, method)(*arguments)))
    except S2TError as error:
        await _write(writer, ("error", error))


@dataclass(frozen=True)
class GatewaySettings(ProposerSettings):
    """sockets: of the proposers."""

    sockets: tuple[str, ...] = ()


async def gateway(settings: GatewaySettings, control: Control) -> None:
    """A gateway before several proposers."""
    server = build_gateway.gateway_server(settings.config, Replicas(settings.sockets))
    await server.start()
    await control.serve(dict)
    await server.stop()


class Replicas:
    """`Proposers` behind sockets, in turns, those that are away left out."""

    def __init__(self, sockets: Sequence[str]) -> None:
        self._sockets = sockets
        self._turn = itertools.count()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        async with self._call("stream", request) as replies:
            async for kind, value in replies:
                if kind == "piece":
                    yield value

    async def answer(self, request: GenerateRequest) -> Answer:
        answer: Answer = await self._result("answer", request)
        return answer

    async def describe(self) -> ServiceDescription:
        description: ServiceDescription = await self._result("describe")
        return description

    async def count_dropped_labels(self) -> int:
        return int(await self._result("count_dropped_labels"))

    async def _result(self, method: str, *arguments: Any) -> Any:
        async with self._call(method, *arguments) as replies:
            return [value async for _, value in replies][-1]

    @asynccontextmanager
    async def _call(self, method: str, *arguments: Any) -> AsyncIterator[AsyncIterator[Any]]:
        """What a proposer replies. Raises what it raised, and ProposerLostError."""
        reader, writer = await self._connect()
        try:
            await _write(writer, (method, arguments))
            yield _replies(reader)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise ProposerLostError(LOST) from error
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        first = next(self._turn)
        for i in range(len(self._sockets)):
            with suppress(OSError):
                return await asyncio.open_unix_connection(
                    self._sockets[(first + i) % len(self._sockets)]
                )
        raise ProposerLostError(LOST)


async def _replies(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, Any]]:
    """Up to the result. Raises the error of an answer that failed."""
    kind = ""
    while kind != "result":
        kind, value = await _read(reader)
        if kind == "error":
            raise value
        yield kind, value


async def _read(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(SIZE_BYTES), "big")
    return pickle.loads(await reader.readexactly(size))  # noqa: S301 - our own processes


async def _write(writer: asyncio.StreamWriter, message: Any) -> None:
    content = pickle.dumps(message)
    writer.write(len(content).to_bytes(SIZE_BYTES, "big") + content)
    await writer.drain()
