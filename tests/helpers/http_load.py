"""What the transports cost: the same streams from the engine itself, by gRPC and by HTTP, in turns.

    python -m tests.helpers.http_load [--step-ms 20] [--batch 16] [--tokens 64] [--bundled]

The service is one process (a proposer behind a gateway, no Ray), the clients are another. A
scripted SLM sleeps for its steps, as one on a GPU would seem to; `--bundled` decodes with the
bundled pair on the CPU. `engine` are pieces of `ProposerService.stream` in the service's process.
Streams begin one after another, over several steps: those that came at once would begin with the
same step in the engine's process, and by a network some with the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

from s2t_shared.pair import Pair
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.requests import new_request
from services.metrics.decode_meter import DecodeMeter
from services.rpc import channels
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from tests.helpers.serving import (
    CALIBRATION,
    FixedVersions,
    gateway_config,
    gateway_server,
    proposer_service,
    scripted_slm,
)

Arrivals = list[list[float]]  # of each stream: seconds from its start to each of its pieces
APART_S = 0.0075  # no divisor of a step
PROMPT = "Mia has 19 coins . Prices are 11 , 15 , 19 , 4 , 12 . Which two cost 19 ?"


# -- the service ----------------------------------------------------------------------------------


def serve(commands: Connection, step_s: float, tokens: int, bundled: bool) -> None:
    """Run the service. Each number that comes is a batch to be streamed here, 0 asks for the CPU
    seconds so far, None ends."""
    service = bundled_service() if bundled else scripted_service(step_s, tokens)

    async def main() -> None:
        folder = Path(tempfile.mkdtemp())
        async with gateway_server(gateway_config(folder, **{"gateway.http": True}), service) as s:
            commands.send((s.url, f"127.0.0.1:{s.port}"))
            while (batch := await asyncio.to_thread(commands.recv)) is not None:
                if batch:
                    found = await gathered(batch, lambda i: in_process(service, i, tokens))
                commands.send(found if batch else time.process_time())

    asyncio.run(main())
    service.close()


def scripted_service(step_s: float, tokens: int) -> ProposerService:
    return proposer_service(scripted_slm(["word"] * (2 * tokens), step_s=step_s))


def bundled_service(counts: bool = True) -> ProposerService:
    pair = Pair.open("bundled", batch_size=64, threads=1)

    class NoSelector:
        info = pair.engine.proposer.info
        reachable = False

    return ProposerService(
        engine=EngineThread(pair.engine, pair.tokenizer, meter=DecodeMeter() if counts else None),
        tokenizer=pair.tokenizer,
        selector=NoSelector(),  # type: ignore[arg-type]
        versions=FixedVersions(),
        labels=LabelRecorder(None),
        calibration=lambda: CALIBRATION,
    )


async def in_process(service: ProposerService, number: int, tokens: int) -> AsyncIterator[bool]:
    request = new_request(
        PROMPT, "greedy", max_new_tokens=tokens, request_id=str(number), version=""
    )
    async for piece in service.stream(request):
        yield bool(piece.text)


# -- the clients ----------------------------------------------------------------------------------


async def by_grpc(address: str, number: int, tokens: int) -> AsyncIterator[bool]:
    parameters = pb.GenerationParameters(
        text=PROMPT, mode=pb.MODE_GREEDY, max_new_tokens=tokens, version="none"
    )
    async with channels.open_channel(address, None) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        await channel.channel_ready()
        yield False
        async for piece in stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters)):
            yield bool(piece.text)


async def by_http(url: str, number: int, tokens: int) -> AsyncIterator[bool]:
    host, _, port = url.removeprefix("http://").partition(":")
    asked = {
        "model": "bundled:greedy",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "stream": True,
        "s2t": {"version": "none"},
    }
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    yield False
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    async for line in reader:
        if line.startswith(b"data: {"):
            yield bool(json.loads(line[6:])["choices"][0]["text"])
    writer.close()


async def gathered(batch: int, stream: Callable[[int], AsyncIterator[bool]]) -> Arrivals:
    """All streams at once. A stream may first yield False when it is connected: its time begins
    then."""

    async def follow(number: int) -> list[float]:
        await asyncio.sleep(number * APART_S)
        started = time.perf_counter()
        arrivals: list[float] = []
        async for has_text in stream(number):
            if has_text:
                arrivals.append(time.perf_counter() - started)
            elif not arrivals:
                started = time.perf_counter()
        return arrivals

    return list(await asyncio.gather(*map(follow, range(batch))))


# -- figures --------------------------------------------------------------------------------------


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def figures(arrivals: Arrivals, tokens: int) -> dict[str, float]:
    """Of one turn: seconds to the first piece and between pieces, median and p99; tokens/s."""
    firsts = [stream[0] for stream in arrivals]
    gaps = [b - a for stream in arrivals for a, b in zip(stream, stream[1:], strict=False)]
    return {
        "first token": statistics.median(firsts),
        "first token, p99": percentile(firsts, 0.99),
        "between tokens": statistics.fmean(gaps),
        "between tokens, p99": percentile(gaps, 0.99),
        "tokens/s": len(arrivals) * tokens / max(stream[-1] for stream in arrivals),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bundled", action="store_true")
    given = parser.parse_args()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve,
        args=(theirs, given.step_ms / 1000, given.tokens, given.bundled),
        daemon=True,
    )
    process.start()
    url, address = ours.recv()

    def engine() -> Arrivals:
        ours.send(given.batch)
        found: Arrivals = ours.recv()
        return found

    def client(work: Callable[[int], AsyncIterator[bool]]) -> Callable[[], Arrivals]:
        made: Callable[[], Awaitable[Arrivals]] = lambda: gathered(given.batch, work)  # noqa: E731
        return lambda: asyncio.run(made())  # type: ignore[arg-type]

    def cpu() -> float:
        ours.send(0)
        return float(ours.recv())

    sides = {
        "engine": engine,
        "gRPC": client(lambda i: by_grpc(address, i, given.tokens)),
        "HTTP": client(lambda i: by_http(url, i, given.tokens)),
    }
    for side in sides.values():
        side()  # warm

    def turn(side: Callable[[], Arrivals]) -> dict[str, float]:
        before = cpu()
        found = figures(side(), given.tokens)
        return {**found, "service's CPU": (cpu() - before) / (given.batch * given.tokens)}

    turns = [{name: turn(side) for name, side in sides.items()} for _ in range(given.rounds)]
    ours.send(None)
    for name in turns[0]["engine"]:
        for a, b in (("gRPC", "engine"), ("HTTP", "engine"), ("HTTP", "gRPC")):
            ratios = [each[a][name] / each[b][name] for each in turns]
            print(
                f"{name:>20}  {a:>4} / {b:6} {statistics.median(ratios):6.3f} "
                f"({min(ratios):.3f} - {max(ratios):.3f})"
            )
    for side in sides:
        plain = {n: statistics.median(each[side][n] for each in turns) for n in turns[0][side]}
        print(f"{side}:", {name: round(value, 6) for name, value in plain.items()})
    process.join(10)


if __name__ == "__main__":
    main()
