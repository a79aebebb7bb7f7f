"""Our servers: the token, the limits, a taken port. One small server on loopback per test."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from s2t_shared.config import Config, GatewayConfig, SecurityConfig
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import ConfigError, UnauthenticatedError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from services.cli.options import target
from services.launch.local import check_security
from services.rpc import channels
from services.rpc.tokens import Role
from services.serve.remote_selector import RemoteSelector
from tests.helpers.selection_server import OPEN, start_selection_server

TOKEN = "0123456789abcdef"


async def no_addresses() -> list[str]:
    return []


async def code_of(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_calls_need_the_token_except_health(tmp_path: Path) -> None:
    """Default deny: no token, a wrong one and a prefix of it are refused; a load balancer may ask
    for health."""
    (tmp_path / "token").write_text(f"{TOKEN}\n", encoding="utf-8")
    security = SecurityConfig(token_file=tmp_path / "token")

    async def main() -> list[grpc.StatusCode]:
        server, address = await start_selection_server(security)
        async with channels.open_channel(address, None) as channel:
            stub = pb_grpc.SelectionServiceStub(channel)
            codes = [
                await code_of(
                    stub.DescribeModel(
                        pb.DescribeModelRequest(), metadata=channels.call_metadata(token)
                    )
                )
                for token in (None, "wrong", TOKEN[:-1], TOKEN)
            ]
            codes.append(
                await code_of(
                    health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                )
            )
        await server.stop(0)
        return codes

    denied = grpc.StatusCode.UNAUTHENTICATED
    assert asyncio.run(main()) == [denied, denied, denied, grpc.StatusCode.OK, grpc.StatusCode.OK]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no token in it"),
        (b" \n", "no token in it"),
        (b"admin:", "0 bytes, at least 16"),
        (b" 123456789012345\n", "15 bytes, at least 16"),
        (b"two words 20 bytes..", "one word"),
        (b"\xff" * 16, "printable ASCII"),
        (None, "cannot be read"),
    ],
)
def test_a_token_file_without_a_token_never_opens_a_server(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    """`: > token` switched authentication off. Servers, proposers and commands all read it
    alike."""
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    security = SecurityConfig(token_file=file)
    config = Config(
        gateway=GatewayConfig(host="0.0.0.0"),
        data_dir=tmp_path,
        security=SecurityConfig(token_file=file, certificate=file, key=file, authority=file),
    )
    for start_or_ask in (
        lambda: channels.new_server(security),
        lambda: RemoteSelector(no_addresses, security, "tok", LLMInfo("", "", frozenset(), 9)),
        lambda: target("127.0.0.1:1", None, file),
        lambda: check_security(config),
    ):
        with pytest.raises(ConfigError, match=rf"token'.*{message}"):
            start_or_ask()


def test_whether_a_token_is_demanded_never_follows_from_its_content() -> None:
    assert channels.read_token(None, Role.SCORE) is None and channels.call_metadata(None) == ()


def test_large_messages_are_refused_before_they_are_read() -> None:
    async def main() -> list[grpc.StatusCode]:
        server, address = await start_selection_server(OPEN, limit=2000)
        async with channels.open_channel(address, None) as channel:
            stub = pb_grpc.SelectionServiceStub(channel)
            codes = [
                await code_of(stub.Score(pb.ScoreRequest(token_ids=[1] * n))) for n in (100, 5000)
            ]
        await server.stop(0)
        return codes

    assert asyncio.run(main()) == [grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED]


def test_a_taken_port_names_the_setting() -> None:
    async def main() -> None:
        server, address = await start_selection_server(OPEN)
        try:
            channels.bind(
                channels.new_server(OPEN),
                "127.0.0.1",
                int(address.rpartition(":")[2]),
                OPEN,
                "gateway.port",
            )
        finally:
            await server.stop(0)

    with pytest.raises(ConfigError, match=r"the port is taken.*gateway\.port"):
        asyncio.run(main())


def test_unauthenticated_reaches_clients_as_its_own_error(tmp_path: Path) -> None:
    from services.client import Client

    (tmp_path / "token").write_text(TOKEN, encoding="utf-8")

    async def main() -> None:
        server, address = await start_selection_server(
            SecurityConfig(token_file=tmp_path / "token")
        )
        with pytest.raises(UnauthenticatedError, match="authorization"):
            await asyncio.to_thread(lambda: Client(address, token="wrong", timeout_s=5).describe())
        await server.stop(0)

    asyncio.run(main())
