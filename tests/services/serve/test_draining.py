"""Servers that stop: balancers hear of it first, what is under way ends by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from s2t_shared.config import SecurityConfig, SelectorConfig, load_config
from s2t_shared.errors import ServiceUnavailableError
from s2t_shared.labels.lake import Lake
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.pb.v1 import selection_pb2_grpc
from s2t_shared.versions.live import LiveVersions
from services.app import STOP_MARGIN_S, build_application
from services.rpc import channels, wire
from services.serve.admin_servicer import AdminServicer
from services.serve.gateway_server import GatewayServer
from services.serve.remote_selector import RemoteSelector
from services.serve.selector_server import SERVICES, SelectorServer
from services.serve.selector_thread import SelectorThread
from tests.helpers.serving import becomes, gateway_config, proposer_service, slow_slm
from tests.services.serve.test_selector_server import INFO, GatedLLM, query

STATUS = health_pb2.HealthCheckResponse


@asynccontextmanager
async def running(
    folder: Path, **settings: Any
) -> AsyncIterator[tuple[GatewayServer, grpc.aio.Channel]]:
    service = proposer_service(slow_slm())
    config = gateway_config(folder, **settings)
    admin = AdminServicer(
        versions=LiveVersions(config.versions), lake=Lake(config.lake), proposers=service
    )
    server = GatewayServer(config, service, admin)
    await server.start()
    async with channels.open_channel(f"127.0.0.1:{server.port}", None) as channel:
        yield server, channel
    await server.stop(0.0)
    service.close()


async def readiness(server: GatewayServer) -> int:
    """The status of /readyz."""

    def ask() -> int:
        try:
            return int(urlopen(f"{server.url}/readyz").status)
        except HTTPError as error:
            return error.code

    return await asyncio.to_thread(ask)


def begin(channel: grpc.aio.Channel, tokens: int) -> Any:
    parameters = pb.GenerationParameters(
        text="a", mode=pb.MODE_GREEDY, max_new_tokens=tokens, timeout_seconds=30
    )
    stub = pb_grpc.GenerationServiceStub(channel)
    return stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters))


async def describe(channel: grpc.aio.Channel) -> None:
    stub = pb_grpc.GenerationServiceStub(channel)
    await stub.DescribeService(pb.DescribeServiceRequest(), timeout=5)


async def status_of(channel: grpc.aio.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest())).status)


def test_a_gateway_says_so_before_it_stops(tmp_path: Path) -> None:
    """While the lag lasts, calls that come are answered; then they are refused, and streams that
    are under way run to their end."""

    async def main() -> None:
        settings = {"gateway.drain_lag_s": 0.5, "gateway.drain_grace_s": 20.0}
        settings |= {"gateway.http": True, "gateway.http_port": 0}
        async with running(tmp_path, **settings) as (server, channel):
            assert await status_of(channel) == STATUS.SERVING
            assert await readiness(server) == 200
            call = begin(channel, 400)
            pieces = [await call.read()]
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.05)
            assert await status_of(channel) == STATUS.NOT_SERVING
            assert await readiness(server) == 503
            await describe(channel)
            while True:
                try:
                    await describe(channel)
                except grpc.aio.AioRpcError as error:
                    refusal = wire.error_of(error)
                    break
            assert type(refusal) is ServiceUnavailableError and refusal.retry_after_s == 1.0
            assert not stopping.done(), "the stream was cut"
            while (piece := await call.read()) is not grpc.aio.EOF:
                pieces.append(piece)
            assert len(pieces[-1].answer.token_ids) == 400
            assert await call.code() is grpc.StatusCode.OK
            await stopping

    asyncio.run(main())


def test_the_grace_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, **{"gateway.drain_grace_s": 0.2}) as (server, channel):
            call = begin(channel, 3000)  # six seconds
            await call.read()
            began = time.monotonic()
            await server.stop()
            assert time.monotonic() - began < 4.0
            with pytest.raises(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_who_watches_the_health_holds_nothing_up(tmp_path: Path) -> None:
    """A balancer's stream never ends; each stop took the whole grace."""

    async def main() -> None:
        async with running(tmp_path, **{"gateway.drain_grace_s": 30.0}) as (server, channel):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == STATUS.SERVING
            call = begin(channel, 100)
            await call.read()
            stopping = asyncio.create_task(server.stop())
            assert (await watch.read()).status == STATUS.NOT_SERVING
            while (piece := await call.read()) is not grpc.aio.EOF:
                last = piece
            assert len(last.answer.token_ids) == 100
            await asyncio.wait_for(stopping, 10.0)

    asyncio.run(main())


# -- selectors ------------------------------------------------------------------------------------


def test_a_selector_answers_as_long_as_it_is_asked(tmp_path: Path) -> None:
    """Where everything stops, answers under way still need it. Then the LLM ends too."""
    llm = GatedLLM()
    llm.gate.set()

    async def main() -> None:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        server = SelectorServer(thread, SecurityConfig(), SelectorConfig(), quiet_s=0.5)
        await server.start()
        address = f"127.0.0.1:{server.port}"

        async def find() -> list[str]:
            return [address]

        client = RemoteSelector(find, SecurityConfig(), "tok", INFO)
        await client.wait_until_reachable(10.0)
        async with channels.open_channel(address, None) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in SERVICES:
                reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert reply.status == STATUS.SERVING
            await asyncio.wrap_future(client.submit([query(1)])[0])
            stopping = asyncio.create_task(server.stop())
            for _ in range(8):
                await asyncio.sleep(0.1)
                await asyncio.wrap_future(client.submit([query(1)])[0])
                assert await status_of(channel) == STATUS.NOT_SERVING
            assert not stopping.done() and thread.is_alive
            await stopping
        assert not thread.is_alive
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize("hangs", [False, True])
def test_a_selector_that_nobody_asks_stops_at_once_and_one_that_hangs_in_time(hangs: bool) -> None:
    llm = GatedLLM()

    async def main() -> None:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        server = SelectorServer(thread, SecurityConfig(), SelectorConfig(), drain_grace_s=0.3)
        await server.start()
        if hangs:
            client = RemoteSelector(_at(server.port), SecurityConfig(), "tok", INFO)
            await client.wait_until_reachable(10.0)
            client.submit([query(1)])
            await asyncio.sleep(0.1)
        await asyncio.wait_for(server.stop(), 5.0)
        if hangs:
            await client.close()

    asyncio.run(main())
    llm.gate.set()


def _at(port: int) -> Any:
    async def find() -> list[str]:
        return [f"127.0.0.1:{port}"]

    return find


def test_an_llm_that_ends_fails_its_queries() -> None:
    """Nobody waits for a reply that cannot come, neither of those under way nor of later ones."""
    llm = GatedLLM()

    def fail() -> Any:
        llm.gate.wait(10)
        raise MemoryError("out of memory")

    llm.step = fail  # type: ignore[method-assign]

    async def main() -> list[BaseException | Any]:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        calls = [asyncio.create_task(thread.score(query(i + 1))) for i in range(3)]
        await asyncio.sleep(0.05)
        llm.gate.set()
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        thread._thread.join(5)
        late = asyncio.gather(thread.score(query(9)), return_exceptions=True)
        return [*outcomes, *await asyncio.wait_for(late, 5)]

    outcomes = asyncio.run(main())
    assert {type(outcome).__name__ for outcome in outcomes} == {"SelectorUnavailableError"}


def test_an_llm_that_hangs_is_unhealthy() -> None:
    llm = GatedLLM()

    async def main() -> None:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        server = SelectorServer(thread, SecurityConfig(), SelectorConfig(stall_timeout_s=0.2))
        await asyncio.sleep(0.3)
        server.check_health()  # at rest it is well, however long
        call = asyncio.create_task(thread.score(query(1)))
        await asyncio.sleep(0.4)
        with pytest.raises(RuntimeError, match="hangs"):
            server.check_health()
        llm.gate.set()
        await call
        assert await becomes(lambda: thread.silent_s == 0)
        server.check_health()
        thread.shutdown()
        with pytest.raises(RuntimeError, match="died"):
            server.check_health()

    asyncio.run(main())


def test_a_bug_in_the_llm_shows_nothing_of_our_insides() -> None:
    llm = GatedLLM()

    def check(_: Any) -> None:
        raise KeyError("/secret/path")

    llm.check = check  # type: ignore[method-assign]

    async def main() -> str:
        thread = SelectorThread(llm)  # type: ignore[arg-type]
        server = SelectorServer(thread, SecurityConfig(), SelectorConfig(), quiet_s=0.0)
        await server.start()
        async with channels.open_channel(f"127.0.0.1:{server.port}", None) as channel:
            stub = selection_pb2_grpc.SelectionServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Score(wire.write_query(query(1)))
        await server.stop()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        return str(caught.value.details())

    assert "secret" not in asyncio.run(main())


# -- Serve's own patience -------------------------------------------------------------------------


def test_serve_waits_for_what_drains(tmp_path: Path) -> None:
    """It kills a replica that takes longer to stop than it was told."""
    config = load_config(
        overrides={
            "data_dir": str(tmp_path),
            "gateway.drain_lag_s": 7.0,
            "gateway.drain_grace_s": 80.0,
        },
        environment={},
    )
    gateway = build_application(config)._bound_deployment
    proposers = gateway.init_args[1]._bound_deployment
    selectors = proposers.init_args[1]._bound_deployment
    for deployment in (gateway, proposers, selectors):
        waits = deployment._deployment_config.graceful_shutdown_timeout_s
        assert waits == 87.0 + STOP_MARGIN_S, deployment.name
