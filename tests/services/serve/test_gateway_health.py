"""grpc.health.v1 of a gateway says whether what is behind it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from s2t_shared.config import SecurityConfig
from s2t_shared.errors import ProposerLostError
from s2t_shared.types import ServiceDescription
from services.rpc import channels
from services.serve.gateway_health import ADMIN, GENERATION, LLM, GatewayHealth

OVERALL = ""
NAMES = (OVERALL, GENERATION, LLM, ADMIN)


class Behind:
    """Stands for the proposers. state: up, down, hung."""

    def __init__(self) -> None:
        self.state = "up"
        self.llm_reachable = True
        self.asked = 0

    async def describe(self) -> ServiceDescription:
        self.asked += 1
        if self.state == "hung":
            await asyncio.sleep(60)
        if self.state == "down":
            raise ProposerLostError("dead")
        return ServiceDescription(
            slm_digest="s",
            tokenizer_digest="t",
            template_digest="",
            llm_digest="l",
            max_length=9,
            llm_reachable=self.llm_reachable,
        )


@asynccontextmanager
async def serving(behind: Behind) -> AsyncIterator[tuple[GatewayHealth, Any]]:
    health = GatewayHealth(behind, period_s=0.005, timeout_s=0.02)  # type: ignore[arg-type]
    security = SecurityConfig()
    server: grpc.aio.Server = channels.new_server(security)
    health.add_to(server)
    port = channels.bind(server, "127.0.0.1", 0, security, "test.port")
    await server.start()
    await health.start()
    async with channels.open_channel(f"127.0.0.1:{port}", None) as channel:
        yield health, health_pb2_grpc.HealthStub(channel)
    await health.stop()
    await server.stop(0)


async def statuses(stub: Any) -> dict[str, bool]:
    found = {}
    for name in NAMES:
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        found[name] = reply.status == health_pb2.HealthCheckResponse.SERVING
    return found


async def becomes(stub: Any, expected: dict[str, bool]) -> None:
    for _ in range(1000):
        if await statuses(stub) == expected:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(await statuses(stub))


@pytest.mark.parametrize("state", ["down", "hung"])
def test_health_follows_the_proposers(state: str) -> None:
    """A balancer takes the gateway out while none answers; its administration goes on."""

    async def main() -> None:
        behind = Behind()
        async with serving(behind) as (_, stub):
            assert await statuses(stub) == dict.fromkeys(NAMES, True)
            behind.state = state
            await becomes(stub, {**dict.fromkeys(NAMES, False), ADMIN: True})
            behind.state = "up"
            await becomes(stub, dict.fromkeys(NAMES, True))

    asyncio.run(main())


def test_one_proposer_that_hangs_is_not_all_of_them() -> None:
    """Serve asks another the next time."""

    async def main() -> None:
        behind = Behind()
        async with serving(behind) as (health, stub):
            watching = health._watching
            assert watching is not None
            watching.cancel()
            behind.state = "down"
            for _ in range(2):
                await health._look()
            assert (await statuses(stub))[GENERATION]
            await health._look()
            assert not (await statuses(stub))[GENERATION]

    asyncio.run(main())


def test_whether_the_llm_can_be_asked_is_told_beside() -> None:
    async def main() -> None:
        behind = Behind()
        async with serving(behind) as (_, stub):
            behind.llm_reachable = False
            await becomes(stub, {**dict.fromkeys(NAMES, True), LLM: False})
            behind.llm_reachable = True
            await becomes(stub, dict.fromkeys(NAMES, True))

    asyncio.run(main())


def test_a_gateway_that_stops_serves_nothing_any_more() -> None:
    """Whatever the proposers say then."""

    async def main() -> None:
        behind = Behind()
        async with serving(behind) as (health, stub):
            await health.stop()
            await health._look()
            assert await statuses(stub) == dict.fromkeys(NAMES, False)
            asked = behind.asked
            await asyncio.sleep(0.05)
            assert behind.asked == asked

    asyncio.run(main())
