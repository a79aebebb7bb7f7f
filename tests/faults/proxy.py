"""A TCP proxy that does to a connection what networks do.

Runs on a loop and a thread of its own, so that a busy test does not delay it. `fault` may be
changed at any time and holds for what passes from then on, in both directions.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

CHUNK = 1 << 16
TICK_S = 0.02
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: close sends RST


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to bytes on their way.

    latency_s, jitter_s: each chunk comes so much later. bytes_per_s: no more pass; 0: any number.
    slice_bytes: chunks are cut to so many. is_black_hole: nothing passes, nothing is refused.
    flip_share: of the chunks, one byte of which is changed.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: int = 0
    slice_bytes: int = 0
    is_black_hole: bool = False
    flip_share: float = 0.0


NO_FAULT = Fault()


class FaultProxy:
    """Listens on `port` of loopback and passes everything on to `target_port`, and back."""

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.fault = NO_FAULT
        self.port = 0
        self.passed = 0  # bytes
        self._target_port = target_port
        self._drawn = random.Random(seed)
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen())

    def reset(self) -> None:
        """End every connection with RST."""
        self._call(self._reset())

    def close(self) -> None:
        self.reset()
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    # -- on the loop ------------------------------------------------------------------------------

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _reset(self) -> None:
        for writer in list(self._writers):
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
                )
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        target: asyncio.StreamWriter | None = None
        try:
            await self._hole_is_gone()
            back, target = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(target)
            ways = [self._pass_on(reader, target), self._pass_on(back, writer)]
            tasks = [asyncio.ensure_future(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            pass  # the target is away: the caller's connection ends, as it would there
        finally:
            for end in filter(None, (writer, target)):
                self._writers.discard(end)
                end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one end closes. What is delayed does not hold up what is read behind it."""
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.ensure_future(self._send(late, writer))
        try:
            while data := await reader.read(self._chunk_bytes()):
                await self._hole_is_gone()
                fault = self.fault
                delay_s = fault.latency_s + fault.jitter_s * self._drawn.random()
                late.put_nowait((self._loop.time() + delay_s, self._flipped(data)))
                if fault.bytes_per_s:
                    await asyncio.sleep(len(data) / fault.bytes_per_s)
            await late.join()
        except OSError:
            pass
        finally:
            sending.cancel()

    async def _send(
        self, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            at, data = await late.get()
            await asyncio.sleep(max(0.0, at - self._loop.time()))
            writer.write(data)
            with suppress(OSError):
                await writer.drain()
            self.passed += len(data)
            late.task_done()

    def _chunk_bytes(self) -> int:
        fault = self.fault
        if fault.slice_bytes:
            return fault.slice_bytes
        return max(64, round(fault.bytes_per_s * TICK_S)) if fault.bytes_per_s else CHUNK

    def _flipped(self, data: bytes) -> bytes:
        if self._drawn.random() >= self.fault.flip_share:
            return data
        changed = bytearray(data)
        changed[self._drawn.randrange(len(data))] ^= 1 << self._drawn.randrange(8)
        return bytes(changed)

    async def _hole_is_gone(self) -> None:
        while self.fault.is_black_hole:
            await asyncio.sleep(TICK_S)
