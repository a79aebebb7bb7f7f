"""Calls that end early: whatever way a client goes, Serve and the proposer learn of it, everything
is freed and no task leaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.config import Config, load_config
from s2t_shared.decode.engine import EngineLoad
from s2t_shared.errors import SelectorUnavailableError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import (
    AnswerPiece,
    DecodeOptions,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
    Sampling,
    Trigger,
)
from services.rpc import channels
from services.serve import build
from services.serve.generation_servicer import GenerationServicer
from services.serve.proposer_service import ProposerService
from services.serve.serve_proposers import ServeProposers
from tests.helpers.serving import becomes

NOTHING = EngineLoad(running=0, waiting=0, kv_slots=0)


def long_request(number: int, **options: Any) -> GenerateRequest:
    settings = {"policy": Policy(mode=Mode.SAMPLE), "sampling": Sampling(100.0, seed=number)}
    return GenerateRequest(
        request_id=str(number),
        prompt=Prompt(token_ids=(6, 7, 8)),
        options=DecodeOptions(**{**settings, "max_new_tokens": 200, **options}),
    )


# -- the gateway: an RPC's end reaches Serve ------------------------------------------------------


class ServeResponse:
    """Stands for Serve's response objects: it streams pieces for ever, or never answers."""

    def __init__(self, piece: str) -> None:
        self._piece = piece
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Generator[Any, None, None]:
        yield from asyncio.sleep(60).__await__()

    def __aiter__(self) -> ServeResponse:
        return self

    async def __anext__(self) -> AnswerPiece:
        await asyncio.sleep(0.001)
        return AnswerPiece(self._piece)


class ServeHandle:
    """Stands for Serve's handle of the proposers."""

    def __init__(self, piece: str) -> None:
        self._piece = piece
        self.responses: list[ServeResponse] = []
        self.stream = self.answer = self

    def options(self, stream: bool) -> ServeHandle:
        return self

    def remote(self, request: GenerateRequest) -> ServeResponse:
        self.responses.append(ServeResponse(self._piece))
        return self.responses[-1]


@asynccontextmanager
async def gateway_of(handle: ServeHandle) -> AsyncIterator[str]:
    config = Config()
    server = channels.new_server(config.security)
    servicer = GenerationServicer(config, ServeProposers(handle))
    pb_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = channels.bind(server, "127.0.0.1", 0, config.security, "gateway.port")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


async def cancel_stream(channel: grpc.aio.Channel, responses: list[ServeResponse]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).StreamGenerate(
        pb.StreamGenerateRequest(parameters={"text": "x"})
    )
    await call.read()
    call.cancel()


async def cancel_unread_stream(channel: grpc.aio.Channel, responses: list[ServeResponse]) -> None:
    """The handler waits for room to send, not for its next piece."""
    call = pb_grpc.GenerationServiceStub(channel).StreamGenerate(
        pb.StreamGenerateRequest(parameters={"text": "x"})
    )
    await call.read()
    await asyncio.sleep(0.3)
    call.cancel()


async def cancel_unary(channel: grpc.aio.Channel, responses: list[ServeResponse]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).Generate(
        pb.GenerateRequest(parameters={"text": "x"})
    )
    waiting, before = asyncio.ensure_future(call), len(responses)
    assert await becomes(lambda: len(responses) > before, 10)
    call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def expire(channel: grpc.aio.Channel, responses: list[ServeResponse]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).Generate(
        pb.GenerateRequest(parameters={"text": "x"}), timeout=0.2
    )
    with pytest.raises(grpc.RpcError):
        await call


async def disconnect(channel: grpc.aio.Channel, responses: list[ServeResponse]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).StreamGenerate(
        pb.StreamGenerateRequest(parameters={"text": "x"})
    )
    await call.read()
    await channel.close()


@pytest.mark.parametrize(
    "leave",
    [cancel_stream, cancel_unread_stream, cancel_unary, expire, disconnect],
    ids=lambda f: f.__name__,
)
def test_a_client_that_leaves_cancels_the_serve_call(
    leave: Callable[[grpc.aio.Channel, list[ServeResponse]], Awaitable[None]],
) -> None:
    async def run() -> None:
        handle = ServeHandle("x" * 10_000 if leave is cancel_unread_stream else "x")
        async with gateway_of(handle) as address:
            before = len(asyncio.all_tasks())
            for _ in range(3):
                async with channels.open_channel(address, None) as channel:
                    await leave(channel, handle.responses)
                assert await becomes(lambda: handle.responses[-1].cancelled, 0.25)
            assert len(handle.responses) == 3
            assert await becomes(lambda: len(asyncio.all_tasks()) <= before, 5), asyncio.all_tasks()

    asyncio.run(run())


class HeldContext:
    """Stands for gRPC's context of a call whose handler somebody keeps."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[object], None]] = []

    def time_remaining(self) -> None:
        return None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5000"

    def invocation_metadata(self) -> None:
        return None

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self.callbacks.append(callback)


def test_a_handler_that_is_kept_between_two_messages_still_cancels() -> None:
    """Python closes a suspended handler when it is collected, and that may be never."""

    async def run() -> None:
        handle, context = ServeHandle("x"), HeldContext()
        servicer = GenerationServicer(Config(), ServeProposers(handle))
        request = pb.StreamGenerateRequest(parameters={"text": "x"})
        handler = servicer.StreamGenerate(request, context)
        await anext(handler)
        assert not handle.responses[0].cancelled
        for callback in context.callbacks:
            callback(context)
        assert await becomes(lambda: handle.responses[0].cancelled, 0.25)

    asyncio.run(run())


# -- a proposer with a model: a cancelled call frees its place ------------------------------------


@asynccontextmanager
async def proposer_of(models: dict[str, Path], folder: Path) -> AsyncIterator[ProposerService]:
    """As a replica builds it, without any selector."""
    config = load_config(
        overrides={
            "slm.model": str(models["slm"]),
            "data_dir": str(folder),
            "selector.replicas": 0,
            "calibration.count": 8,
            "proposer.max_num_seqs": 4,
        },
        environment={},
    )
    service = await build.proposer_service(config)
    yield service
    service.close()


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
def test_cancelled_calls_leave_nothing_in_a_proposer(
    models: dict[str, Path], tmp_path: Path, unary: bool
) -> None:
    """More than fit the batch, so that some are cancelled while they run and some while they
    wait."""

    async def run() -> None:
        async with proposer_of(models, tmp_path) as service:
            before = len(asyncio.all_tasks())

            async def ask(number: int) -> None:
                if unary:
                    await service.answer(long_request(number))
                async for _ in service.stream(long_request(number)):
                    pass

            for _ in range(5):
                calls = [asyncio.create_task(ask(i)) for i in range(10)]
                assert await becomes(lambda: service.load.waiting > 0 < service.load.running, 10)
                for call in calls:
                    call.cancel()
                assert await becomes(lambda: service.load == NOTHING, 0.25)
                await asyncio.gather(*calls, return_exceptions=True)
            assert await becomes(lambda: len(asyncio.all_tasks()) <= before, 1), asyncio.all_tasks()
            assert service.ongoing_requests == 0

    asyncio.run(run())


def test_mode_llm_without_an_llm_is_unavailable(models: dict[str, Path], tmp_path: Path) -> None:
    """The LLM's own answer cannot be the SLM's; a mode where the LLM only selects goes on without
    it and says so."""

    async def run() -> None:
        async with proposer_of(models, tmp_path) as service:
            with pytest.raises(SelectorUnavailableError, match="mode llm"):
                await service.answer(long_request(1, policy=Policy(mode=Mode.LLM)))
            policy = Policy(mode=Mode.S2T, trigger=Trigger.ALWAYS)
            answer = await service.answer(long_request(2, policy=policy, max_new_tokens=5))
            assert answer.usage.degraded_steps == len(answer.token_ids)

    asyncio.run(run())
