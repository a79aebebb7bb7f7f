"""What `grpc.health.v1` says of a gateway: whether what is behind it answers.

""                            SERVING while a proposer answers
s2t.v1.GenerationService      the same
s2t.v1.GenerationService/llm  SERVING while that proposer can also ask the LLM
s2t.v1.AdminService           SERVING while the gateway runs
"""

from __future__ import annotations

import asyncio
import logging

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from s2t_shared.pb.v1 import admin_pb2, generation_pb2
from services.serve.generation_servicer import Proposers

log = logging.getLogger(__name__)
GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
LLM = f"{GENERATION}/llm"
PERIOD_S = 1.0
TIMEOUT_S = 2.0
HEAR_S = 0.05
MAX_MISSES = 3  # in a row: one of several proposers may hang, and each asks another


class EndingHealth(health.aio.HealthServicer):
    """As gRPC's own, whose watches would hold up a server that stops until its grace is over."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()
        self._watches = 0

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        self._watches += 1
        watching = asyncio.ensure_future(super().Watch(request, context))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ended.cancel()
            self._watches -= 1

    async def end_watches(self) -> None:
        """Let those go who watch, once they have heard how it ends."""
        if self._watches:
            await asyncio.sleep(HEAR_S)
        self._ended.set()


class GatewayHealth:
    """Asks the proposers every `period_s` seconds. Lives on one loop."""

    def __init__(
        self, proposers: Proposers, period_s: float = PERIOD_S, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._proposers = proposers
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._misses = 0
        self._servicer = EndingHealth()
        self._watching: asyncio.Task[None] | None = None

    @property
    def serves(self) -> bool:
        """Whether a proposer has answered lately."""
        return self._misses < MAX_MISSES

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Say how it is now, and from now on."""
        await self._set(True, ADMIN)
        await self._look()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Say NOT_SERVING from now on."""
        if self._watching is not None:
            self._watching.cancel()
        await self._servicer.enter_graceful_shutdown()

    async def end_watches(self) -> None:
        """Let those go who watch: they would hold up a server that stops."""
        await self._servicer.end_watches()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._look()

    async def _look(self) -> None:
        try:
            description = await asyncio.wait_for(self._proposers.describe(), self._timeout_s)
        except Exception as error:  # noqa: BLE001 - whatever it is, this proposer does not answer
            self._misses += 1
            if self._misses == MAX_MISSES:
                log.warning("no proposer answers (%s): NOT_SERVING", type(error).__name__)
            if self._misses >= MAX_MISSES:
                await self._set(False, "", GENERATION, LLM)
            return
        self._misses = 0
        await self._set(True, "", GENERATION)
        await self._set(description.llm_reachable, LLM)

    async def _set(self, serves: bool, *names: str) -> None:
        status = health_pb2.HealthCheckResponse
        for name in names:
            await self._servicer.set(name, status.SERVING if serves else status.NOT_SERVING)
