"""Two ordinary streams, again and again, in a process of their own:

    python -m tests.fuzz.streams ADDRESS TOKEN

Runs until its input ends; then prints, in milliseconds, gaps between pieces, and failures."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc.aio

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from services.rpc import channels

PARAMETERS = pb.GenerationParameters(
    text="Mia has 19 coins .", mode=pb.MODE_GREEDY, max_new_tokens=32
)


async def main(address: str, token: str) -> None:
    gaps: list[float] = []
    failed: list[str] = []
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))

    async def stream_on() -> None:
        async with channels.open_channel(address, None) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            metadata = channels.call_metadata(token)
            while not ended.done():
                last = 0.0
                message = pb.StreamGenerateRequest(parameters=PARAMETERS, stream_steps=True)
                try:
                    async for _ in stub.StreamGenerate(message, metadata=metadata, timeout=60.0):
                        now = time.monotonic()
                        if last:
                            gaps.append(1000 * (now - last))
                        last = now
                except grpc.aio.AioRpcError as error:
                    failed.append(f"{error.code().name}: {error.details()}")
                await asyncio.sleep(0.01)

    await asyncio.gather(stream_on(), stream_on())
    gaps.sort()
    figures = {"pieces": len(gaps), "max": gaps[-1], "p99": gaps[int(0.99 * (len(gaps) - 1))]}
    print(json.dumps({**figures, "failed": failed[:5]}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
