"""The LLM behind a gRPC server: joins the queries of many proposers in one forward.

What runs the LLM is behind `AsyncSelector`: torch on a thread of its own, or vLLM.

Proposers call this server directly. A Serve handle or proxy would cost 7-12 ms a selection, this
hop about one. Knows gRPC and the LLM selector's interface; no Ray.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from s2t_shared.config import SecurityConfig, SelectorConfig
from s2t_shared.errors import S2TError
from s2t_shared.pb.v1 import selection_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2_grpc as pb_grpc
from services.metrics.registry import Reading, Registry
from services.metrics.table import Role
from services.rpc import channels, wire
from services.serve.client_quota import ClientQuota
from services.serve.request_limits import check_score_request
from services.serve.selector_thread import AsyncSelector

SERVICES = ("", pb.DESCRIPTOR.services_by_name["SelectionService"].full_name)
# Proposers look for selectors every two seconds. One that stops is not asked any more then, unless
# everything stops: then answers under way still need it.
QUIET_S = 3.0
POLL_S = 0.1
STOP_GRACE_S = 1.0


class SelectionServicer(pb_grpc.SelectionServiceServicer):
    """`SelectionService` over an `AsyncSelector`. queries: that wait for their reply now."""

    def __init__(
        self,
        selector: AsyncSelector,
        settings: SelectorConfig,
        registry: Registry | None = None,
    ) -> None:
        self._selector = selector
        self._info = selector.info
        self.queries = 0
        self._quota = ClientQuota(settings.max_queries_per_client, settings.max_queries)
        self._last_asked = -math.inf
        registry = registry or Registry(Role.SELECTOR)
        self._ended = registry.counter("s2t_selector_queries_total")
        self._positions = registry.counter("s2t_selector_positions_total")
        self._seconds = registry.histogram("s2t_selector_query_seconds")

    @property
    def quiet_for_s(self) -> float:
        """Seconds since the last query; 0 while one is being answered."""
        return 0.0 if self.queries else time.monotonic() - self._last_asked

    def add_to(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_SelectionServiceServicer_to_server(self, server)

    async def Score(
        self, message: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        started = time.monotonic()
        with self._counted():
            self._quota.count(context)
            self.queries += 1
            try:
                check_score_request(message, self._info.max_length)
                query = wire.read_query(message)
                reply = await self._selector.score(query, context.time_remaining())
                self._positions.inc(len(query.positions))
                self._seconds.observe(time.monotonic() - started)
                return wire.write_reply(reply, self._info.tokenizer_digest)
            finally:
                self.queries -= 1
                self._last_asked = time.monotonic()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a query by how it ends."""
        status = grpc.StatusCode.CANCELLED
        try:
            yield
            status = grpc.StatusCode.OK
        except S2TError as error:
            status = wire.status_of(error)
            raise
        except Exception:
            status = grpc.StatusCode.INTERNAL
            raise
        finally:
            self._ended.labels(status.name).inc()

    async def DescribeModel(
        self, message: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        return pb.DescribeModelResponse(
            digest=self._info.digest,
            tokenizer_digest=self._info.tokenizer_digest,
            eos_ids=sorted(self._info.eos_ids),
            max_length=self._info.max_length,
        )


class SelectorServer:
    """One server with one LLM. Created, started and stopped on one loop."""

    def __init__(
        self,
        selector: AsyncSelector,
        security: SecurityConfig,
        settings: SelectorConfig,
        *,
        drain_grace_s: float = 30.0,
        quiet_s: float = QUIET_S,
    ) -> None:
        """Listen on the configured host and port (0: a free one), but answer nothing yet.

        drain_grace_s: seconds that a server which stops still answers, at most. quiet_s: seconds
        without a query after which it need not.

        Raises:
            ConfigError: the address is not this machine's, or a security file cannot be used.
        """
        self.llm_digest = selector.info.digest
        self.registry = Registry(Role.SELECTOR)
        self.registry.add(self._readings)
        self._is_draining = False
        self._selector = selector
        self._stall_timeout_s = settings.stall_timeout_s
        self._drain_grace_s = drain_grace_s
        self._quiet_s = quiet_s
        self._health = health.aio.HealthServicer()
        # More than are answered: one that waits in gRPC would not hear that there is no room.
        limits = channels.ConnectionLimits(max_streams=2 * settings.max_queries)
        self._server = channels.new_server(security, connections=limits)
        self._servicer = SelectionServicer(selector, settings, self.registry)
        self._servicer.add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = channels.bind(
            self._server, settings.host, settings.port, security, "selector.port"
        )

    @property
    def queries(self) -> int:
        """Queries that are being answered or wait for it."""
        return self._servicer.queries

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()
        for name in SERVICES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Say NOT_SERVING, answer until nobody asks any more, then end the LLM and what runs it."""
        self._is_draining = True
        await self._health.enter_graceful_shutdown()
        give_up_at = time.monotonic() + self._drain_grace_s
        while self._servicer.quiet_for_s < self._quiet_s and time.monotonic() < give_up_at:
            await asyncio.sleep(POLL_S)
        await self._server.stop(STOP_GRACE_S)
        await asyncio.to_thread(self._selector.shutdown)

    def _readings(self) -> Iterator[Reading]:
        yield Reading("s2t_selector_queries_in_progress", self.queries)
        yield Reading("s2t_selector_draining", self._is_draining)
        usage = self._selector.kv_usage
        if usage is not None:
            yield Reading("s2t_selector_kv_usage_ratio", usage)

    def check_health(self) -> None:
        """Raises RuntimeError: nothing can be answered any more."""
        if not self._selector.is_alive:
            raise RuntimeError("what runs the LLM has died")
        silent_s = self._selector.silent_s
        if silent_s > self._stall_timeout_s:
            raise RuntimeError(f"the LLM has not moved on for {silent_s:.0f} s: it hangs")
