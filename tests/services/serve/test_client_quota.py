"""A client's quota at the gateway: what counts as one client, and when a place is free again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from services.rpc import wire
from services.serve.client_quota import ClientQuota
from tests.helpers.serving import becomes, gateway, gateway_config, proposer_service, slow_slm

PARAMETERS = pb.GenerationParameters(text="a prompt", mode=pb.MODE_GREEDY)
FEW = pb.GenerationParameters(text="a prompt", mode=pb.MODE_GREEDY, max_new_tokens=1)
TOKENS = ("greedy", "modest", "one", "two", "t")
Work = Callable[[pb_grpc.GenerationServiceStub], Awaitable[Any]]


def settings(folder: Path) -> dict[str, str]:
    """That demand one of the tokens."""
    file = folder / "tokens"
    file.write_text("".join(f"generate: {padded(token)}\n" for token in TOKENS), encoding="utf-8")
    return {"security.token_file": str(file)}


def padded(token: str) -> str:
    return token + "-" * 16


def with_quota(folder: Path, limit: int, work: Work, *, secured: bool = True) -> None:
    service = proposer_service(slow_slm())
    given = settings(folder) if secured else {}

    async def main() -> None:
        config = gateway_config(folder, **{"gateway.max_requests_per_client": limit}, **given)
        async with gateway(config, service) as channel:
            await work(pb_grpc.GenerationServiceStub(channel))

    asyncio.run(main())
    service.close()


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {padded(token)}"),)


async def open_streams(stub: pb_grpc.GenerationServiceStub, count: int, token: str) -> list[Any]:
    streams = []
    for _ in range(count):
        request = pb.StreamGenerateRequest(parameters=PARAMETERS)
        streams.append(stub.StreamGenerate(request, metadata=metadata(token)))
        await streams[-1].read()
    return streams


async def ask(stub: pb_grpc.GenerationServiceStub, token: str) -> str:
    """ "" for an answer, else the refusal's text."""
    try:
        await stub.Generate(pb.GenerateRequest(parameters=FEW), metadata=metadata(token))
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert wire.error_of(error).retry_after_s
        return str(error.details())
    return ""


def test_one_clients_requests_are_bounded_and_anothers_are_not(tmp_path: Path) -> None:
    async def work(stub: pb_grpc.GenerationServiceStub) -> None:
        streams = await open_streams(stub, 3, "greedy")
        assert "3 of your requests are being answered, at most 3" in await ask(stub, "greedy")
        assert not await ask(stub, "modest")
        for stream in streams:
            stream.cancel()

    with_quota(tmp_path, 3, work)


def test_a_token_that_nobody_checks_is_no_client_of_its_own(tmp_path: Path) -> None:
    """Where none is demanded, whoever sent another with each call had no quota at all."""

    async def work(stub: pb_grpc.GenerationServiceStub) -> None:
        streams = await open_streams(stub, 2, "greedy")
        streams += await open_streams(stub, 1, "modest")
        assert "at most 3" in await ask(stub, "one")
        for stream in streams:
            stream.cancel()

    with_quota(tmp_path, 3, work, secured=False)


def test_a_place_is_free_when_its_call_has_ended_in_whatever_way(tmp_path: Path) -> None:
    """Answered, refused, cancelled between two messages, or too late."""

    async def work(stub: pb_grpc.GenerationServiceStub) -> None:
        for _ in range(3):
            assert not await ask(stub, "t")
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Generate(pb.GenerateRequest(), metadata=metadata("t"))
        for _ in range(3):
            [stream] = await open_streams(stub, 1, "t")
            stream.cancel()
            assert await becomes_free(stub)
        with pytest.raises(grpc.aio.AioRpcError):
            request = pb.GenerateRequest(parameters=PARAMETERS)
            await stub.Generate(request, metadata=metadata("t"), timeout=0.05)
        assert await becomes_free(stub)

    with_quota(tmp_path, 1, work)


async def becomes_free(stub: pb_grpc.GenerationServiceStub) -> bool:
    for _ in range(25):
        if not await ask(stub, "t"):
            return True
        await asyncio.sleep(0.01)
    return False


def test_no_quota_is_none(tmp_path: Path) -> None:
    async def work(stub: pb_grpc.GenerationServiceStub) -> None:
        streams = await open_streams(stub, 20, "t")
        assert not await ask(stub, "t")
        for stream in streams:
            stream.cancel()

    with_quota(tmp_path, 0, work)


class Call:
    """What of a call tells its client."""

    def __init__(self, peer: str, token: str | None = None) -> None:
        self._peer = peer
        self._metadata = metadata(token) if token else ()

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Any:
        return self._metadata


def test_a_client_is_a_token_from_a_host() -> None:
    """Whatever its connection; and its name, which is logged, does not tell the token."""
    client_of = ClientQuota(1, tokens_are_checked=True).client_of
    one = client_of(Call("ipv4:10.0.0.1:5000", "secret"))
    assert one == client_of(Call("ipv4:10.0.0.1:6000", "secret")) and "secret" not in one
    others = [
        client_of(Call("ipv4:10.0.0.2:5000", "secret")),
        client_of(Call("ipv4:10.0.0.1:5000", "other")),
        client_of(Call("ipv4:10.0.0.1:5000")),
        client_of(Call("ipv6:%5B::1%5D:5000", "secret")),
        client_of(Call("unix:/run/s2t.sock", "secret")),
    ]
    assert len({one, *others}) == 6


def test_a_token_is_one_client_however_its_header_is_spelt() -> None:
    """Each spelling that is accepted was a client with a quota of its own."""
    name_of = ClientQuota(1, tokens_are_checked=True).name_of
    spelt = [b"Bearer secret", b"bearer secret", b"BEARER   secret ", b"Bearer  secret"]
    assert len({name_of("ipv4:10.0.0.1", header) for header in spelt}) == 1


def test_the_proposer_is_told_who_asks(tmp_path: Path) -> None:
    """So that its queue is fair."""
    service = proposer_service()
    seen: list[str] = []
    answer = service.answer

    async def spy(request: Any) -> Any:
        seen.append(request.client)
        return await answer(request)

    service.answer = spy  # type: ignore[method-assign]

    async def main() -> None:
        async with gateway(gateway_config(tmp_path, **settings(tmp_path)), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            assert not await ask(stub, "one") and not await ask(stub, "two")
            assert await becomes(lambda: len(set(seen)) == 2)

    asyncio.run(main())
    service.close()
    assert all("127.0.0.1" in client for client in seen)
