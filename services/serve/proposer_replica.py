"""The Serve deployment of the proposer: the SLM's decode loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from s2t_shared.config import Config
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.metrics.exports import MetricsExports
from services.rpc import logs, tracing
from services.serve import build
from services.serve.proposer_service import ProposerService


class ProposerReplica:
    """A `ProposerService` that Serve runs.

    Serve awaits `__init__`, and cancels the calls of callers that go away.
    """

    async def __init__(self, config: Config, selectors: Any = None) -> None:  # type: ignore[misc]
        """selectors: Serve's handle of the selector deployment, None where there is none."""
        logs.begin(config.log, "proposer")
        tracing.begin(config.traces, "proposer")
        self._service = await build.proposer_service(config, selectors)
        self._exports = MetricsExports(self._service.registry, config)

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        async with aclosing(self._service.stream(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def answer(self, request: GenerateRequest) -> Answer:
        return await self._service.answer(request)

    async def describe(self) -> ServiceDescription:
        return await self._service.describe()

    async def count_dropped_labels(self) -> int:
        return await self._service.count_dropped_labels()

    async def metrics_url(self) -> str:
        """Where Prometheus reads its metrics; "" for nowhere."""
        return self._exports.url

    def check_health(self) -> None:
        self._service.check_health()

    def __del__(self) -> None:
        exports: MetricsExports | None = getattr(self, "_exports", None)
        if exports is not None:
            exports.close()
        service: ProposerService | None = getattr(self, "_service", None)
        if service is not None:  # None after a failed start
            service.close()
