"""The operator's door: versions of the local selector, and counts of labels.

Knows the wire, the versions and the label store; no Ray, no models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.labels.drain import Drain
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.stream import LabelStream
from s2t_shared.pb.v1 import admin_pb2 as pb
from s2t_shared.pb.v1 import admin_pb2_grpc
from s2t_shared.types import LabelCounts, PublishedVersion
from s2t_shared.versions.live import LiveVersions
from services.rpc import wire
from services.serve.generation_servicer import Proposers, refuse

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """`AdminService` over the published versions and the label store.

    stream, drain: None where no Redis is configured.
    """

    def __init__(
        self,
        *,
        versions: LiveVersions,
        lake: Lake,
        proposers: Proposers,
        stream: LabelStream | None = None,
        drain: Drain | None = None,
    ) -> None:
        self._live_versions = versions
        self._lake = lake
        self._proposers = proposers
        self._stream = stream
        self._drain = drain

    async def ListVersions(
        self, message: pb.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListVersionsResponse:
        versions = await _in_thread(context, self._versions)
        return pb.ListVersionsResponse(versions=[wire.write_version(v) for v in versions])

    async def PromoteVersion(
        self, message: pb.PromoteVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.PromoteVersionResponse:
        share = message.share if message.HasField("share") else None
        return await _in_thread(context, lambda: self._promote(message.name, share))

    async def RollbackVersion(
        self, message: pb.RollbackVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.RollbackVersionResponse:
        live = await _in_thread(context, self._live_versions.rollback)
        return pb.RollbackVersionResponse(live=live or "")

    async def CountLabels(
        self, message: pb.CountLabelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.CountLabelsResponse:
        try:
            dropped = await self._proposers.count_dropped_labels()
        except S2TError:
            dropped = 0
        counts = await _in_thread(context, lambda: self._count(message.flush, dropped))
        return wire.write_label_counts(counts)

    # -- blocking, on another thread --------------------------------------------------------------

    def published(self) -> tuple[list[PublishedVersion], dict[str, dict[str, Any]]]:
        """All published versions, and of those that the gate has judged its last verdict."""
        judged = [e for e in self._live_versions.events() if e.get("event") == "gate"]
        return self._versions(), {str(event.get("version")): event for event in judged}

    def _versions(self) -> list[PublishedVersion]:
        state = self._live_versions.state()
        manifests, broken = self._live_versions.registry.manifests()
        for reason in broken.values():
            log.error("%s", reason)
        versions = []
        for manifest in manifests:
            version = PublishedVersion(
                name=manifest.version,
                kind=manifest.kind.value,
                reads=manifest.reads.value,
                live=manifest.version == state.version,
                created_at=manifest.created_at,
                metrics=manifest.metrics,
                share=state.share(manifest.version),
            )
            versions.append(version)
        return versions

    def _promote(self, version: str, share: float | None) -> pb.PromoteVersionResponse:
        self._live_versions.promote(version, share)
        state = self._live_versions.state()
        canary = state.canary.version if state.canary is not None else ""
        return pb.PromoteVersionResponse(live=state.version or "", canary=canary)

    def _count(self, flush: bool, dropped: int) -> LabelCounts:
        if self._stream is None:
            raise StoreError("no Redis is configured (redis.url), so there are no labels")
        if flush and self._drain is not None:
            self._drain.flush()
        in_stream = self._stream.counts()
        return LabelCounts(
            queued=in_stream.rollouts,
            in_lake=sum(shard.labels for shard in self._lake.shards()),
            dead_letters=in_stream.dead_letters,
            dropped=dropped,
        )


async def _in_thread(context: grpc.aio.ServicerContext, work: Callable[[], Result]) -> Result:
    """Run blocking work off the loop. Its error ends the call."""
    try:
        return await asyncio.to_thread(work)
    except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
        await refuse(context, error)
        raise AssertionError("abort raises") from error
