"""Default deny: every method of every server, as it is registered, with no token, a wrong one, and
one of each role."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio._server import Server

from s2t_shared.config import SecurityConfig
from services.rpc import channels
from services.rpc.authorization import ALLOWED, OPEN_METHODS
from services.rpc.tokens import Role
from tests.helpers.servers import selector_address
from tests.helpers.serving import gateway_address, gateway_config, proposer_service

TOKEN = {role: f"{role.value}-0123456789abcdef" for role in Role}
DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods of every server that is made meanwhile, by what is registered with gRPC."""
    found: list[str] = []
    register = Server.add_generic_rpc_handlers

    def record(server: Any, handlers: Any) -> None:
        for handler in handlers:
            found.extend(handler._method_handlers)
        register(server, handlers)

    monkeypatch.setattr(Server, "add_generic_rpc_handlers", record)
    return found


@pytest.fixture
def security(tmp_path: Path) -> SecurityConfig:
    lines = [f"{role.value}: {token}" for role, token in TOKEN.items()]
    (tmp_path / "tokens").write_text("\n".join(lines), encoding="utf-8")
    return SecurityConfig(token_file=tmp_path / "tokens")


def test_every_method_of_every_server_needs_its_role(
    tmp_path: Path, registered: list[str], security: SecurityConfig
) -> None:
    """S2: the token that clients hold promoted versions and asked selectors. A method that is
    added without a rule is nobody's."""
    service = proposer_service()
    config = gateway_config(tmp_path, **{"security.token_file": str(security.token_file)})

    async def main() -> dict[str, list[grpc.StatusCode]]:
        codes = {}
        tokens = (None, "not-a-token-of-ours", *TOKEN.values())
        async with (
            gateway_address(config, service) as gateway,
            selector_address(security) as selector,
        ):
            for address in (gateway, selector):
                async with channels.open_channel(address, None) as channel:
                    for method in sorted(set(registered)):
                        asked = [code_of(channel, method, token) for token in tokens]
                        codes[f"{address} {method}"] = await asyncio.gather(*asked)
        return codes

    try:
        codes = asyncio.run(main())
    finally:
        service.close()
    served = [method for method in set(registered) if not method.startswith(OPEN_METHODS)]
    assert len(served) == 3 + 4 + 2 + 1, "generation, administration, selection, reflection"
    for where, (none, wrong, *by_role) in codes.items():
        method = where.partition(" ")[2]
        if method.startswith(OPEN_METHODS):
            assert not set(DENIED) & {none, wrong, *by_role}, where
            continue
        assert none is wrong is grpc.StatusCode.UNAUTHENTICATED, where
        allowed = ALLOWED[method.rpartition("/")[0].lstrip("/")]
        for role, code in zip(TOKEN, by_role, strict=True):
            if role in allowed:
                assert code not in DENIED, f"{where} {role}"
            else:
                assert code is grpc.StatusCode.PERMISSION_DENIED, f"{where} {role}"


async def code_of(channel: grpc.aio.Channel, method: str, token: str | None) -> grpc.StatusCode:
    """How a call without any message ends; OK: it waits for a message, so it was let in."""
    call = channel.stream_stream(method)(metadata=channels.call_metadata(token), timeout=0.2)
    try:
        if await call.read() is grpc.aio.EOF:
            return await call.code()
    except grpc.aio.AioRpcError as error:
        waits = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return grpc.StatusCode.OK if waits else error.code()
    finally:
        call.cancel()
    return grpc.StatusCode.OK


def test_what_has_no_rule_is_nobodys(security: SecurityConfig) -> None:
    """A service that is added and forgotten in the table."""

    async def main() -> None:
        async with selector_address(security) as address:
            async with channels.open_channel(address, None) as channel:
                for method in ("/s2t.v1.NewService/Get", "/other", "//", "/s2t.v1.AdminServiceX/A"):
                    for token in TOKEN.values():
                        code = await code_of(channel, method, token)
                        assert code is grpc.StatusCode.PERMISSION_DENIED, method

    asyncio.run(main())


def test_a_refusal_waits_for_no_message(security: SecurityConfig) -> None:
    """A caller without a token held a place on the server by sending nothing."""

    async def main() -> None:
        async with selector_address(security) as address:
            async with channels.open_channel(address, None) as channel:
                call = channel.stream_stream("/s2t.v1.SelectionService/Score")(timeout=20.0)
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


def test_health_is_open_to_everybody(security: SecurityConfig) -> None:
    assert not any(name.startswith("grpc.health") for name in ALLOWED)
    assert OPEN_METHODS == ("/grpc.health.v1.Health/",)
