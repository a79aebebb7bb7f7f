"""Counts what a gateway's requests come to. Knows proposers and errors; no transport."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager

import grpc

from s2t_shared.errors import S2TError, StoreError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.metrics.registry import Reading, Registry
from services.rpc import wire
from services.serve.generation_servicer import Proposers


class RequestMeter:
    """A gateway's counts of requests and refusals."""

    def __init__(self, registry: Registry) -> None:
        self._requests = registry.counter("s2t_requests_total")
        self._refusals = registry.counter("s2t_refusals_total")
        self._finished = registry.counter("s2t_finished_answers_total")
        self._seconds = registry.histogram("s2t_request_duration_seconds")
        self._in_progress = registry.gauge("s2t_requests_in_progress")
        for reason in (
            *wire.REASONS.values(),
            wire.INTERNAL,
        ):  # at 0: else no query would see the first rise
            self._refusals.labels(reason)

    def refused(self, error: Exception) -> None:
        """A call has ended with an error that its client is told."""
        reason = wire.refusal_of(error).reason if isinstance(error, S2TError) else wire.INTERNAL
        self._refusals.labels(reason).inc()

    @contextmanager
    def answering(self, request: GenerateRequest) -> Iterator[Callable[[Answer], None]]:
        """Count a request while the block runs, and how it ends. Gives what is to be called with
        the answer."""
        mode = request.options.policy.mode.value
        started = time.monotonic()
        status = grpc.StatusCode.CANCELLED  # nobody waits for the answer any more

        def finish(answer: Answer) -> None:
            nonlocal status
            status = grpc.StatusCode.OK
            self._finished.labels(answer.finish_reason.value).inc()

        self._in_progress.inc()
        try:
            yield finish
        except S2TError as error:
            status = wire.status_of(error)
            raise
        except Exception:
            status = grpc.StatusCode.INTERNAL
            raise
        finally:
            self._in_progress.dec()
            self._requests.labels(mode, status.name).inc()
            self._seconds.labels(mode).observe(time.monotonic() - started)


class MeteredProposers:
    """`Proposers` whose answers are counted."""

    def __init__(self, proposers: Proposers, meter: RequestMeter) -> None:
        self._proposers = proposers
        self._meter = meter

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        with self._meter.answering(request) as finish:
            async with aclosing(self._proposers.stream(request)) as pieces:
                async for piece in pieces:
                    if piece.answer is not None:
                        finish(piece.answer)
                    yield piece

    async def answer(self, request: GenerateRequest) -> Answer:
        with self._meter.answering(request) as finish:
            answer = await self._proposers.answer(request)
            finish(answer)
            return answer

    async def describe(self) -> ServiceDescription:
        return await self._proposers.describe()

    async def count_dropped_labels(self) -> int:
        return await self._proposers.count_dropped_labels()


def label_store_readings(stream: LabelStream) -> Iterator[Reading]:
    """What Redis holds of labels now. Blocks for as long as Redis does."""
    try:
        counts = stream.counts()
        oldest = stream.oldest()
    except StoreError:
        yield Reading("s2t_label_store_up", 0)
        return
    yield Reading("s2t_label_store_up", 1)
    yield Reading("s2t_label_queue_rollouts", counts.rollouts)
    yield Reading("s2t_label_dead_letters", counts.dead_letters)
    lag_s = max(0.0, time.time() - oldest[0] / 1000) if oldest is not None else 0.0
    yield Reading("s2t_label_lag_seconds", lag_s)
