"""Calls that end early: whatever way a client goes, its proposer hears of it, frees everything and
leaks no task."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.config import Config, load_config
from s2t_shared.errors import SelectorUnavailableError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import DecodeOptions, GenerateRequest, Mode, Policy, Prompt, Sampling, Trigger
from services.bench.harvest import Load
from services.rpc import channels
from services.serve.gateway import GenerationServicer
from services.serve.proposer_replica import ProposerReplica, Reply

NOTHING = Load(running=0, waiting=0, live_kv_slots=0)
LONG = GenerateRequest(
    request_id="long",
    prompt=Prompt(token_ids=(6, 7, 8)),
    options=DecodeOptions(
        policy=Policy(mode=Mode.SAMPLE), sampling=Sampling(100.0), max_new_tokens=200
    ),
)


async def becomes(holds: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    return holds()


# -- the gateway: an RPC's end reaches Serve ------------------------------------------------------


class Answering:
    """Stands for Serve's response objects: one that streams pieces for ever, or never answers."""

    def __init__(self, piece: str) -> None:
        self._piece = piece
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Generator[Any, None, Reply]:
        yield from asyncio.sleep(60).__await__()
        return Reply()

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> Reply:
        await asyncio.sleep(0.001)
        return Reply(text=self._piece)


class Proposers:
    """Stands for Serve's handle of the proposers."""

    def __init__(self, piece: str) -> None:
        self._piece = piece
        self.responses: list[Answering] = []
        self.stream = self.answer = self

    def options(self, stream: bool) -> Proposers:
        return self

    def remote(self, request: GenerateRequest) -> Answering:
        self.responses.append(Answering(self._piece))
        return self.responses[-1]


@asynccontextmanager
async def gateway_of(proposers: Proposers) -> AsyncIterator[str]:
    config = Config()
    server = channels.new_server(config.security)
    pb_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(config, proposers), server)
    port = channels.bind(server, "127.0.0.1", 0, config.security, "gateway.port")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


async def cancel_stream(channel: grpc.aio.Channel, responses: list[Answering]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).StreamGenerate(
        pb.StreamGenerateRequest(parameters={"text": "x"})
    )
    await call.read()
    call.cancel()


async def cancel_unread_stream(channel: grpc.aio.Channel, responses: list[Answering]) -> None:
    """The handler waits for room to send, not for its next piece."""
    call = pb_grpc.GenerationServiceStub(channel).StreamGenerate(
        pb.StreamGenerateRequest(parameters={"text": "x"})
    )
    await call.read()
    await asyncio.sleep(0.3)
    call.cancel()


async def cancel_unary(channel: grpc.aio.Channel, responses: list[Answering]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).Generate(
        pb.GenerateRequest(parameters={"text": "x"})
    )
    waiting, before = asyncio.ensure_future(call), len(responses)
    assert await becomes(lambda: len(responses) > before, 10)
    call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def expire(channel: grpc.aio.Channel, responses: list[Answering]) -> None:
    call = pb_grpc.GenerationServiceStub(channel).Generate(
        pb.GenerateRequest(parameters={"text": "x"}), timeout=0.2
    )
    with pytest.raises(grpc.RpcError):
        await call


async def disconnect(channel: grpc.aio.Channel, responses: list[Answering]) -> None:
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
    leave: Callable[[grpc.aio.Channel, list[Answering]], Awaitable[None]],
) -> None:
    async def run() -> None:
        proposers = Proposers("x" * 10_000 if leave is cancel_unread_stream else "x")
        async with gateway_of(proposers) as address:
            before = len(asyncio.all_tasks())
            for _ in range(3):
                async with channels.open_channel(address, None) as channel:
                    await leave(channel, proposers.responses)
                assert await becomes(lambda: proposers.responses[-1].cancelled, 0.25)
            assert len(proposers.responses) == 3
            assert await becomes(lambda: len(asyncio.all_tasks()) <= before, 5), asyncio.all_tasks()

    asyncio.run(run())


# -- the proposer: a cancelled call frees its place -----------------------------------------------


@asynccontextmanager
async def replica_of(models: dict[str, Path], folder: Path) -> AsyncIterator[Any]:
    """A proposer replica in this process, without any selector."""
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
    replica: Any = ProposerReplica.__new__(ProposerReplica)
    await replica.__init__(config)
    yield replica


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
def test_cancelled_calls_leave_nothing_in_a_proposer(
    models: dict[str, Path], tmp_path: Path, unary: bool
) -> None:
    """More than fit the batch, so that some are cancelled while they run and some while they
    wait."""

    async def run() -> None:
        async with replica_of(models, tmp_path) as replica:
            before = len(asyncio.all_tasks())

            async def ask(number: int) -> None:
                request = replace(
                    LONG, request_id=str(number), sampling=Sampling(100.0, seed=number)
                )
                if unary:
                    await replica.answer(request)
                async for _ in replica.stream(request):
                    pass

            for _ in range(5):
                calls = [asyncio.create_task(ask(i)) for i in range(10)]
                assert await becomes(
                    lambda: replica._engine.load.waiting > 0 < replica._engine.load.running, 10
                )
                for call in calls:
                    call.cancel()
                assert await becomes(lambda: replica._engine.load == NOTHING, 0.25)
                await asyncio.gather(*calls, return_exceptions=True)
            assert await becomes(lambda: len(asyncio.all_tasks()) <= before, 1), asyncio.all_tasks()
            assert replica._ongoing == 0 and not replica._engine._jobs

    asyncio.run(run())


def test_mode_llm_without_an_llm_is_unavailable(models: dict[str, Path], tmp_path: Path) -> None:
    """The LLM's own answer cannot be the SLM's; a mode where the LLM only selects goes on without
    it and says so."""

    async def run() -> None:
        async with replica_of(models, tmp_path) as replica:
            with pytest.raises(SelectorUnavailableError, match="mode llm"):
                await replica.answer(replace(LONG, policy=Policy(mode=Mode.LLM)))
            reply = await replica.answer(
                replace(
                    LONG, policy=Policy(mode=Mode.S2T, trigger=Trigger.ALWAYS), max_new_tokens=5
                )
            )
            assert reply.answer.usage.degraded_steps == len(reply.answer.token_ids)

    asyncio.run(run())
