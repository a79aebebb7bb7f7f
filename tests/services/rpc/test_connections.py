"""Connections of our servers and channels: both sides agree on pings, notice a peer that is gone,
and keep the limits."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from services.rpc import channels
from tests.helpers.serving import (
    becomes,
    gateway,
    gateway_address,
    gateway_config,
    proposer_service,
    scripted_slm,
    slow_slm,
)

PARAMETERS = pb.GenerationParameters(text="a prompt", mode=pb.MODE_GREEDY)
FEW = pb.GenerationParameters(text="a prompt", mode=pb.MODE_GREEDY, max_new_tokens=1)
PING = b"\0\0\x08\6\0\0\0\0\0" + b"12345678"
PONG = b"\0\0\x08\6\1\0\0\0\0" + b"12345678"
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty SETTINGS


def test_metadata_have_a_limit(tmp_path: Path) -> None:
    async def work(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        call = stub.Generate(pb.GenerateRequest(parameters=FEW), metadata=[("x", "a" * (64 << 10))])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(tmp_path, scripted_slm(), work)


def run(
    folder: Path,
    slm: Any,
    work: Callable[[pb_grpc.GenerationServiceStub, grpc.aio.Channel], Awaitable[None]],
    **settings: Any,
) -> None:
    service = proposer_service(slm)

    async def main() -> None:
        async with gateway(gateway_config(folder, **settings), service) as channel:
            await work(pb_grpc.GenerationServiceStub(channel), channel)

    asyncio.run(main())
    service.close()


def open_stream(stub: pb_grpc.GenerationServiceStub) -> Any:
    return stub.StreamGenerate(pb.StreamGenerateRequest(parameters=PARAMETERS))


def test_a_client_may_ping_as_often_as_ours_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our client pinged every 10 s, our server allowed one ping in 5 minutes: a call without data
    for longer ended as UNAVAILABLE "Too many pings", and all of its connection with it. Here by
    hand, because gRPC's own clients ping once a second at most."""
    monkeypatch.setattr(channels, "KEEPALIVE_S", 0.1)
    received = said_to_a_client(tmp_path, lambda connection: ping(connection, 10, every_s=0.1))
    assert b"too_many_pings" not in received and received.count(PONG) == 10


def test_a_client_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers no ping, as behind a cut network, does not hold its connection for ever;
    by gRPC's defaults it holds it for hours, and for a minute where only keepalive is set."""
    monkeypatch.setattr(channels, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(channels, "KEEPALIVE_TIMEOUT_S", 0.2)
    assert b"ping_timeout" in said_to_a_client(tmp_path, wait_for_the_end)


def said_to_a_client(folder: Path, talk: Callable[[socket.socket], bytes]) -> bytes:
    """What a gateway sends to a client that says hello in HTTP/2, and then what `talk` says."""
    service = proposer_service()

    def connect(address: str) -> bytes:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5.0) as connection:
            connection.sendall(HTTP2_HELLO)
            return talk(connection)

    async def main() -> bytes:
        async with gateway_address(gateway_config(folder), service) as address:
            return await asyncio.to_thread(connect, address)

    try:
        return asyncio.run(main())
    finally:
        service.close()


def ping(connection: socket.socket, count: int, every_s: float) -> bytes:
    received = b""
    for _ in range(count):
        connection.sendall(PING)
        time.sleep(every_s)
        received += connection.recv(1 << 16)
    return received


def wait_for_the_end(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed. Raises TimeoutError: it is not."""
    received = b""
    while more := connection.recv(4096):
        received += more
    return received


def test_calls_of_one_connection_are_bounded(tmp_path: Path) -> None:
    """One more waits until one of them ends."""

    async def three(stub: pb_grpc.GenerationServiceStub, _: grpc.aio.Channel) -> None:
        first, second = open_stream(stub), open_stream(stub)
        await first.read()
        await second.read()
        third = asyncio.ensure_future(open_stream(stub).read())
        await asyncio.wait([third], timeout=0.2)
        assert not third.done()
        first.cancel()
        assert (await asyncio.wait_for(third, 5)).text

    run(tmp_path, slow_slm(), three, **{"gateway.max_concurrent_streams": 2})


def test_an_idle_connection_is_closed_and_opens_again(tmp_path: Path) -> None:
    async def idle(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        for _ in range(2):
            await stub.Generate(pb.GenerateRequest(parameters=FEW))
            assert channel.get_state() is grpc.ChannelConnectivity.READY
            assert await becomes(lambda: channel.get_state() is grpc.ChannelConnectivity.IDLE)

    run(tmp_path, scripted_slm(), idle, **{"gateway.max_connection_idle_s": 0.3})


def test_an_old_connection_ends_no_call(tmp_path: Path) -> None:
    """A stream that is longer than its connection may be old comes to its end; others go on over a
    new one."""

    async def outlive(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        streaming = open_stream(stub)
        pieces = [piece async for piece in streaming]
        assert pieces[-1].answer.text
        assert await becomes(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY), (
            "the connection is as old as ever"
        )
        await stub.Generate(pb.GenerateRequest(parameters=FEW))

    settings = {"gateway.max_connection_age_s": 0.3, "gateway.max_connection_age_grace_s": 30.0}
    run(tmp_path, scripted_slm(step_s=0.1), outlive, **settings)
