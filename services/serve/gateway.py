"""The only door for clients: our own `grpc.aio` server inside a Serve deployment. Its jobs: 1. the
wire (types, defaults, errors), 2. passing requests to proposers, 3. versions and label counts for
operators, 4. the label drain.

Serve's own gRPC proxy has no TLS, no authentication, no grpc.health.v1, and turns a dead replica
into INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from s2t_shared.config import Config, check_exposure
from s2t_shared.errors import DeadlineExceededError, S2TError, StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.pb.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc
from s2t_shared.types import GenerateRequest
from s2t_shared.versions.registry import Registry
from services.rpc import channels, wire
from services.serve.proposer_replica import Description, Reply

log = logging.getLogger(__name__)
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


async def refuse(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the status and text of `error`; a stranger's error shows nothing of our
    insides."""
    cause = getattr(error, "cause", error)  # Ray wraps what a replica raised
    if isinstance(cause, S2TError):
        await wire.abort(context, cause)
    if isinstance(cause, BackPressureError):
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED, "all proposers are busy; try again in a moment"
        )
    if isinstance(cause, (RayError, DeploymentUnavailableError)):
        log.warning("proposer lost: %s", type(cause).__name__)
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            "the proposer that answered was lost; send the request again",
        )
    log.error("unexpected error", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "an unexpected error; it is in the service's log")


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Wire in, proposer handle out."""

    def __init__(self, config: Config, proposers: Any) -> None:
        self._defaults, self._replicas, self._proposers = (
            config.defaults,
            config.proposer.replicas,
            proposers,
        )

    def _read(self, request: Any, context: grpc.aio.ServicerContext) -> GenerateRequest:
        return wire.read_request(
            request.request_id, request.parameters, self._defaults, _time_remaining(context)
        )

    async def StreamGenerate(
        self, request: generation_pb2.StreamGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.StreamGenerateResponse]:
        try:
            asked = self._read(request, context)
            replies = self._proposers.options(stream=True).stream.remote(asked)
            _cancel_with(context, replies)
            async for reply in replies:
                yield generation_pb2.StreamGenerateResponse(
                    request_id=asked.request_id, text=reply.text, answer=_answer(reply)
                )
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await refuse(context, error)

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.GenerateResponse:
        try:
            asked = self._read(request, context)
            response = self._proposers.answer.remote(asked)
            _cancel_with(context, response)
            reply = await response
            return generation_pb2.GenerateResponse(
                request_id=asked.request_id, answer=_answer(reply)
            )
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await refuse(context, error)
            raise AssertionError("abort raises") from error

    async def DescribeService(
        self, request: generation_pb2.DescribeServiceRequest, context: grpc.aio.ServicerContext
    ) -> generation_pb2.DescribeServiceResponse:
        try:
            d: Description = await self._proposers.describe.remote()
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await refuse(context, error)
            raise AssertionError("abort raises") from error
        return generation_pb2.DescribeServiceResponse(
            slm_digest=d.slm_digest,
            tokenizer_digest=d.tokenizer_digest,
            template_digest=d.template_digest,
            llm_digest=d.llm_digest,
            proposers=self._replicas,
            max_length=d.max_length,
            live_version=d.live_version,
            canary_version=d.canary[0],
            canary_share=d.canary[1],
            calibrated_triggers=[f"TRIGGER_{t.name}" for t in d.calibrated],
            running_sequences=d.load.running,
            waiting_sequences=d.load.waiting,
            live_kv_slots=d.load.live_kv_slots,
        )


def _cancel_with(context: grpc.aio.ServicerContext, response: Any) -> None:
    """Cancel a Serve call when its RPC ends. Serve itself lets a replica work on for a client that
    has gone away.

    Not a `finally` of the handler: one that was cancelled between two messages is closed only when
    it is collected. A call that has finished ignores it.
    """
    context.add_done_callback(lambda _: response.cancel())


def _answer(reply: Reply) -> generation_pb2.Answer | None:
    if reply.answer is None:
        return None
    return wire.write_answer(
        reply.answer, list(reply.step_texts), reply.labels_stored, reply.rollout
    )


def _time_remaining(context: grpc.aio.ServicerContext) -> float | None:
    """Seconds the client still waits, or None. gRPC gives a huge number for a call without a
    deadline."""
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise DeadlineExceededError("the call's deadline had passed when it arrived")
    return remaining if remaining is not None and remaining < 1e6 else None


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """The registry and the label store, over the wire."""

    def __init__(
        self, config: Config, proposers: Any, store: LabelStream | None, drain: Drain | None
    ) -> None:
        self._registry, self._lake = Registry(config.versions), Lake(config.lake)
        self._proposers, self._store, self._drain = proposers, store, drain

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.ListVersionsResponse:
        return await _guarded(context, self._list)

    def _list(self) -> admin_pb2.ListVersionsResponse:
        state = self._registry.state()
        manifests, broken = self._registry.manifests()
        for text in broken.values():
            log.error("%s", text)
        return admin_pb2.ListVersionsResponse(
            versions=[
                admin_pb2.Version(
                    name=m.version,
                    kind=m.kind.value,
                    reads=m.reads.value,
                    live=m.version == state.version,
                    created_at=m.created_at,
                    metrics=m.metrics,
                    share=state.share(m.version),
                )
                for m in manifests
            ]
        )

    async def PromoteVersion(
        self, request: admin_pb2.PromoteVersionRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.PromoteVersionResponse:
        def promote() -> admin_pb2.PromoteVersionResponse:
            self._registry.promote(
                request.name, request.share if request.HasField("share") else None
            )
            state = self._registry.state()
            return admin_pb2.PromoteVersionResponse(
                live=state.version or "", canary=state.canary.version if state.canary else ""
            )

        return await _guarded(context, promote)

    async def RollbackVersion(
        self, request: admin_pb2.RollbackVersionRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.RollbackVersionResponse:
        return await _guarded(
            context, lambda: admin_pb2.RollbackVersionResponse(live=self._registry.rollback() or "")
        )

    async def CountLabels(
        self, request: admin_pb2.CountLabelsRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.CountLabelsResponse:
        try:
            dropped = sum((await self._proposers.describe.remote()).labels_dropped.values())
        except (S2TError, RayError, DeploymentUnavailableError):
            dropped = 0

        def count() -> admin_pb2.CountLabelsResponse:
            if self._store is None:
                raise StoreError("no Redis is configured (redis.url), so there are no labels")
            if request.flush and self._drain is not None:
                self._drain.flush()
            counts = self._store.counts()
            return admin_pb2.CountLabelsResponse(
                queued=counts.rollouts,
                in_lake=sum(s.labels for s in self._lake.shards()),
                dead_letters=counts.dead_letters,
                dropped=dropped,
            )

        return await _guarded(context, count)


async def _guarded(context: grpc.aio.ServicerContext, work: Any) -> Any:
    """Run blocking work off the loop; translate its errors."""
    try:
        return await asyncio.to_thread(work)
    except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
        await refuse(context, error)


class Gateway:
    """The Serve deployment."""

    async def __init__(self, config: Config, proposers: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        check_exposure(config)
        store = LabelStream(config.redis.url) if config.redis.url else None
        labels = config.labels
        self._drain = (
            Drain(
                store,
                Lake(config.lake),
                labels.shard_rows,
                labels.shard_age_s,
                labels.max_age_days,
                labels.max_gib,
            )
            if store
            else None
        )
        if self._drain is not None:
            self._drain.start()
        self._server = channels.new_server(config.security, config.gateway.max_message_bytes)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(config, proposers), self._server
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(config, proposers, store, self._drain), self._server
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._port = channels.bind(
            self._server, config.gateway.host, config.gateway.port, config.security, "gateway.port"
        )
        await proposers.describe.remote()  # open the door when somebody is behind it
        await self._server.start()
        for name in ("", *SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def port(self) -> int:
        return self._port

    async def __del__(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace=5)
        if self._drain is not None:
            self._drain.stop()
