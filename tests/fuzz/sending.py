"""Sends malformed requests to a server, and judges how each ended."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence

import grpc
import grpc.aio

from services.rpc import channels
from tests.fuzz.malformed import CANARY, Call

CALL_TIMEOUT_S = 30.0
MAX_DETAILS = 1024
S = grpc.StatusCode
DOCUMENTED = {
    S.OK,
    S.INVALID_ARGUMENT,
    S.NOT_FOUND,
    S.FAILED_PRECONDITION,
    S.RESOURCE_EXHAUSTED,
    S.DEADLINE_EXCEEDED,
    S.UNAVAILABLE,  # labels that are wanted durable, and no Redis; mode llm without the LLM
    S.UNIMPLEMENTED,
    S.PERMISSION_DENIED,  # a method that has no rule
}
INSIDES = re.compile(
    r"Traceback|\bFile \"|(?<![\w.])/(?:tmp|home|root|usr|work|data|etc)/|\d+\.\d+\.\d+\.\d+"
    r"|\bpid\b|0x[0-9a-f]{6}|<class|\.py\b|torch|ray\.|grpc\._"
)


def judge(code: grpc.StatusCode, details: str) -> str:
    """What is wrong with an end of a call, "" for nothing."""
    if code not in DOCUMENTED:
        return f"{code.name}: {details}"
    if len(details.encode()) > MAX_DETAILS:
        return f"{len(details.encode())} bytes of details"
    if INSIDES.search(details) or CANARY in details:
        return f"tells of our insides or of a prompt: {details}"
    return ""


class Sender:
    """Keeps a connection, and counts ends by status."""

    def __init__(self, address: str, token: str | None) -> None:
        self.address = address
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._metadata = channels.call_metadata(token)
        self._channel = channels.open_channel(address, None)

    async def close(self) -> None:
        await self._channel.close()

    async def send(self, calls: Sequence[Call]) -> None:
        """All at once."""
        await asyncio.gather(*map(self._send, calls))

    async def _send(self, call: Call) -> None:
        code, details = await self.end_of(call)
        self.ends[code.name] += 1
        wrong = judge(code, details)
        if wrong:
            self.wrong.append(f"{call.method} {call.sent[:200]!r}: {wrong}")

    async def end_of(self, call: Call) -> tuple[grpc.StatusCode, str]:
        # One message, whatever the method is. With a stream of them grpc.aio makes its own INTERNAL
        # where a call is refused before it has written.
        started = self._channel.unary_stream(call.method)(
            call.sent, metadata=self._metadata, timeout=CALL_TIMEOUT_S
        )
        async for _ in _quietly(started):
            pass
        return await started.code(), await started.details() or ""

    async def send_raw(self, sent: bytes) -> None:
        """Over a connection of its own, below gRPC; whatever the server says to it."""
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            writer.write_eof()
            async with asyncio.timeout(2.0):
                while await reader.read(1 << 16):
                    pass
            self.ends["closed"] += 1
        except (OSError, TimeoutError) as error:
            self.ends[type(error).__name__] += 1
        finally:
            writer.close()


async def _quietly(call: grpc.aio.UnaryStreamCall):  # type: ignore[no-untyped-def]
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError:
        return
