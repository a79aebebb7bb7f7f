"""Proposer replicas behind a Ray Serve handle, as the gateway sees them.

Owns Serve's response objects: a call that is given up is cancelled in Serve, which by itself lets a
replica work on for a client that has gone away. The errors of Ray and Serve end here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from s2t_shared.errors import OverloadedError, ProposerLostError
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription

log = logging.getLogger(__name__)
# Serve's one controller answers, and its answer costs this process 0.2 s to read.
COUNT_EVERY_S = 10.0


class ServeProposers:
    """`Proposers` over the handle of the proposer deployment."""

    def __init__(self, handle: Any, count_replicas: Callable[[], int] = lambda: 1) -> None:
        """count_replicas: those that run now; may take a while."""
        self._handle = handle
        self._count_replicas = count_replicas
        self._counted = (-math.inf, 1)  # when, how many

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        with _translated_errors():
            response = self._handle.options(stream=True).stream.remote(request)
            try:
                async for piece in response:
                    yield piece
            finally:
                response.cancel()  # a call that has finished ignores it

    async def answer(self, request: GenerateRequest) -> Answer:
        answer: Answer = await self._call(self._handle.answer, request)
        return answer

    async def describe(self) -> ServiceDescription:
        """What one proposer says, and how many of them run."""
        description: ServiceDescription = await self._call(self._handle.describe)
        return replace(description, proposers=await self._replicas())

    async def _replicas(self) -> int:
        counted_at, replicas = self._counted
        if time.monotonic() - counted_at > COUNT_EVERY_S:
            replicas = await asyncio.to_thread(self._count_replicas)
            self._counted = (time.monotonic(), replicas)
        return replicas

    async def count_dropped_labels(self) -> int:
        """Of one proposer, whichever Serve chooses."""
        return int(await self._call(self._handle.count_dropped_labels))

    async def _call(self, method: Any, *arguments: Any) -> Any:
        with _translated_errors():
            response = method.remote(*arguments)
            try:
                return await response
            finally:
                response.cancel()


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Raises what a replica raised, OverloadedError, or ProposerLostError."""
    try:
        yield
    except (RayError, BackPressureError, DeploymentUnavailableError) as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what a replica raised
        if isinstance(cause, BackPressureError):
            raise OverloadedError("all proposers are busy; try again in a moment") from error
        if isinstance(cause, (RayError, DeploymentUnavailableError)):
            log.warning("proposer lost: %s", type(cause).__name__)
            raise ProposerLostError(
                "the proposer that answered was lost; send the request again"
            ) from error
        raise cause from error
