"""A minute of overload in real time: gRPC clients before a gateway and a proposer over a scripted
SLM, in this process. Prints goodput, latencies and how fast refusals come.

    python -m tests.helpers.open_load [SECONDS] [DEADLINE_S] [MAX_QUEUE_S]
"""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc.aio

from s2t_shared.decode.scripted import ScriptedSLM
from s2t_shared.errors import OverloadedError, S2TError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from services.rpc import wire
from tests.helpers.overload import LENGTHS, MAX_NEW_TOKENS, WORDS, Outcome
from tests.helpers.serving import gateway, gateway_config, proposer_service

SLOTS = 4
STEP_S = 0.025
CAPACITY = SLOTS / (sum(LENGTHS) / 2 * STEP_S)  # requests per second, were there no overhead


async def offer(times: float, seconds: float, deadline_s: float, max_queue_s: float) -> None:
    """So many times the capacity, for so long."""
    slm = ScriptedSLM(WORDS, step_s=STEP_S)
    service = proposer_service(slm, max_num_seqs=SLOTS, max_queue_s=max_queue_s)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        async with gateway(gateway_config(Path(folder)), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            started = time.monotonic()
            calls = []
            for at in arrivals(times * CAPACITY, seconds):
                await asyncio.sleep(max(0.0, started + at - time.monotonic()))
                calls.append(asyncio.create_task(ask(stub, deadline_s, outcomes)))
            await asyncio.gather(*calls)
            report(times, outcomes, time.monotonic() - started)
    service.close()


def arrivals(rate: float, seconds: float) -> Iterator[float]:
    drawn = random.Random(0)
    at = drawn.expovariate(rate)
    while at < seconds:
        yield at
        at += drawn.expovariate(rate)


async def ask(
    stub: pb_grpc.GenerationServiceStub, deadline_s: float, outcomes: list[Outcome]
) -> None:
    last_word = WORDS[random.randint(*LENGTHS) - 1]
    parameters = pb.GenerationParameters(
        text="a prompt", mode=pb.MODE_GREEDY, stop=[last_word], max_new_tokens=MAX_NEW_TOKENS
    )
    started = time.monotonic()
    error: S2TError | None = None
    try:
        await stub.Generate(pb.GenerateRequest(parameters=parameters), timeout=deadline_s)
    except grpc.aio.AioRpcError as failure:
        error = wire.error_of(failure)
    outcomes.append(Outcome("", started, time.monotonic() - started, error))


def report(times: float, outcomes: Sequence[Outcome], seconds: float) -> None:
    answered = sorted(o.seconds for o in outcomes if o.error is None)
    refused = sorted(o.seconds for o in outcomes if isinstance(o.error, OverloadedError))
    late = len(outcomes) - len(answered) - len(refused)
    resident_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{times:4.1f}x  {len(outcomes):5} requests  goodput {len(answered) / seconds:5.2f}/s  "
        f"answered p50 {at(answered, 0.5):5.2f} p99 {at(answered, 0.99):5.2f} s  "
        f"refused {len(refused):5} p50 {1000 * at(refused, 0.5):4.1f} "
        f"p99 {1000 * at(refused, 0.99):6.1f} max {1000 * at(refused, 1.0):6.1f} ms, "
        f"{sum(s > 0.1 for s in refused)} later than 100 ms  expired {late}  "
        f"RSS {resident_mb:.0f} MB",
        flush=True,
    )


def at(ordered: Sequence[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def main() -> None:
    given = [float(argument) for argument in sys.argv[1:]]
    seconds, deadline_s, max_queue_s = given + [60.0, 10.0, 0.0][len(given) :]
    print(f"capacity {CAPACITY:.1f}/s, {seconds:g} s each, deadlines of {deadline_s:g} s")
    for times in (0.5, 1.0, 5.0):
        asyncio.run(offer(times, seconds, deadline_s, max_queue_s))


if __name__ == "__main__":
    main()
