"""What a client learns of a failure that nobody expected, and of a message that is none."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.config import SecurityConfig
from s2t_shared.errors import OverloadedError
from services.rpc import channels, wire
from tests.helpers.serving import gateway_address, gateway_config, proposer_service

SECRET = "canary-of-a-prompt at 10.1.2.3:6379 in /data/s2t/labels"
ROOT = Path(__file__).parents[3]
ENDS = ("abort", "abort_with_status", "set_details")


async def broken(request: Any, context: grpc.aio.ServicerContext) -> bytes:
    raise RuntimeError(SECRET)


async def broken_stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    yield b"first"
    raise RuntimeError(SECRET)


async def overloaded(request: Any, context: grpc.aio.ServicerContext) -> bytes:
    raise OverloadedError(f"full: {SECRET}", retry_after_s=3.0)


HANDLERS = {
    "UnaryUnary": grpc.unary_unary_rpc_method_handler(broken),
    "UnaryStream": grpc.unary_stream_rpc_method_handler(broken_stream),
    "StreamUnary": grpc.stream_unary_rpc_method_handler(broken),
    "StreamStream": grpc.stream_stream_rpc_method_handler(broken_stream),
    "Overloaded": grpc.unary_unary_rpc_method_handler(overloaded),
}


async def failure(channel: grpc.aio.Channel, method: str, sent: bytes) -> grpc.aio.AioRpcError:
    call = channel.stream_stream(method)(iter([sent]), timeout=5.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


def test_an_unexpected_error_shows_nothing_of_our_insides(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Clients read "Unexpected <class 'KeyError'>: ..." with status UNKNOWN. The log says where
    it was, and not its text: that may quote a prompt."""

    async def main() -> dict[str, grpc.aio.AioRpcError]:
        server = channels.new_server(SecurityConfig())
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Broken", HANDLERS),)
        )
        port = channels.bind(server, "127.0.0.1", 0, SecurityConfig(), "test.port")
        await server.start()
        async with channels.open_channel(f"127.0.0.1:{port}", None) as channel:
            errors = {
                name: await failure(channel, f"/test.Broken/{name}", b"x") for name in HANDLERS
            }
        await server.stop(0)
        return errors

    errors = asyncio.run(main())
    retry = errors.pop("Overloaded")
    assert retry.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert wire.error_of(retry).retry_after_s == 3.0 and "10.1.2.3" not in retry.details()
    for name, error in errors.items():
        assert error.code() is grpc.StatusCode.INTERNAL, name
        assert error.details() == "an unexpected error; it is in the service's log"
    assert caplog.text.count("unexpected RuntimeError") == len(errors)
    assert "in broken_stream" in caplog.text and "canary" not in caplog.text


def test_a_stream_of_messages_that_are_none_is_the_clients_mistake(tmp_path: Path) -> None:
    """Reflection answered UNKNOWN with the decoder's error."""
    service = proposer_service()

    async def main() -> grpc.aio.AioRpcError:
        async with gateway_address(gateway_config(tmp_path), service) as address:
            async with channels.open_channel(address, None) as channel:
                method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
                return await failure(channel, method, b"\xff\xff\xff")

    try:
        assert asyncio.run(main()).code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        service.close()


def test_one_place_ends_calls_with_a_text() -> None:
    """`wire.abort_with` bounds and cleans the text; who calls gRPC's own `abort` goes past it."""
    found = []
    for file in sorted((ROOT / "services").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                is_known = called in ("wire.abort", "self.transport.abort")  # the latter: a socket
                if node.func.attr in ENDS and not is_known:
                    found.append(f"{file.relative_to(ROOT)}: {called}")
    assert found == ["services/rpc/wire/errors.py: context.abort"]
