"""Large requests beside streams: while one is read, the others must go on."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from s2t_shared.pb.v1 import generation_pb2 as pb
from services.launch.redis_server import free_port
from tests.faults import figures
from tests.faults.clients import asking
from tests.faults.processes import HOST, context
from tests.faults.stage import Stage, address_of

LONG = 2_000_000  # bytes, nearly as many as a message may have
GENERATE = "/s2t.v1.GenerationService/Generate"
BODIES = {  # of HTTP: what took longest to parse, and what is parsed still
    "lists": b'{"model":"m","prompt":[' + LONG // 4 * b"[1]," + b"[1]]}",
    "nothing": b'{"model":"m","prompt":"x","user":[' + LONG // 3 * b"[]," + b"[]]}",
    "strings": b'{"model":"m","prompt":[' + LONG // 3 * b'"",' + b'""]}',
    "ids": b'{"model":"m","prompt":[' + 260_000 * b"1," + b"1]}",
    "text": b'{"model":"m","prompt":"' + LONG * b"x" + b'"}',
}
MESSAGES = {  # of gRPC
    "messages": pb.GenerationParameters(
        messages=pb.Messages(messages=[pb.Message()] * (LONG // 2))
    ),
    "stop": pb.GenerationParameters(text="x", stop=[""] * (LONG // 2)),
    "ids": pb.GenerationParameters(token_ids=pb.TokenIds(ids=[1] * 262_144)),
}


async def post(port: int, body: bytes) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    assert (await reader.read()).startswith(b"HTTP/1.1 4")
    writer.close()


async def call(channel: grpc.aio.Channel, message: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary(GENERATE)(message, timeout=30.0)


async def attack(address: str, http_port: int, rounds: int) -> None:
    """All large requests, one after the other, some rounds."""
    sent = [
        pb.GenerateRequest(parameters=parameters).SerializeToString()
        for parameters in MESSAGES.values()
    ]
    async with grpc.aio.insecure_channel(address) as channel:
        for _ in range(rounds):
            for body in BODIES.values():
                await post(http_port, body)
            for message in sent:
                await call(channel, message)


def attack_from_elsewhere(address: str, http_port: int, rounds: int) -> None:
    """The same in a process of its own: who makes 2 MB is not who reads the streams."""
    process = context.Process(target=run_attack, args=(address, http_port, rounds))
    process.start()
    process.join()
    assert process.exitcode == 0


def run_attack(address: str, http_port: int, rounds: int) -> None:
    asyncio.run(attack(address, http_port, rounds))


@pytest.mark.parametrize("rounds", figures.sizes([1], [20]))
def test_streams_go_on_beside_large_requests(stage: Stage, rounds: int) -> None:
    """S4. A body of two million values stopped every stream of its gateway for two seconds."""
    http_port = free_port()
    overrides = {"gateway.http": True, "gateway.http_port": http_port}
    proposer = stage.proposer(overrides=overrides)

    async def main() -> None:
        clients = stage.clients(proposer)
        await clients.ask("greedy")
        async with asking(lambda: clients.ask("greedy", max_new_tokens=400), 2):
            await asyncio.sleep(0.5)
            stage.fault("nothing yet")
            await asyncio.sleep(rounds)
            stage.fault("large requests")
            address = address_of(proposer)
            await asyncio.to_thread(attack_from_elsewhere, address, http_port, rounds)
            stage.fault("no more")
        await clients.close()

    asyncio.run(main())
    quiet, begun, ended = [r["t"] for r in stage.records if r["kind"] == "fault"]
    alone, beside = gaps(stage, quiet, begun), gaps(stage, begun, ended)
    what = f"{rounds * (len(BODIES) + len(MESSAGES))} requests of 2 MB beside 2 streams: "
    figures.at_most("S4", f"{what}longest gap", 1000 * max(beside), 100.0, " ms")
    figures.report("S4", f"{what}longest gap before", f"{1000 * max(alone):.3g} ms", "", None)
    stage.check()


def gaps(stage: Stage, since: float, until: float) -> list[float]:
    """Seconds between pieces of a stream, in a span of time."""
    found = []
    for request in stage.requests:
        times = [piece["t"] for piece in request.pieces if since <= piece["t"] <= until]
        found += [b - a for a, b in zip(times, times[1:], strict=False)]
    return found
