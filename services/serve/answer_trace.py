"""The span of an answer in its proposer, and of its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.types import AnswerPiece, GenerateRequest
from services.rpc import tracing


class AnswerTrace:
    """What an answer's span learns. request: as it was asked, with its queries below the span."""

    def __init__(self, request: GenerateRequest, span: tracing.Span) -> None:
        self.request = replace(request, trace=span.headers) if span.is_recorded else request
        self._span = span
        self._began_at = time.monotonic()
        self._first_at: float | None = None

    def sees(self, piece: AnswerPiece) -> None:
        """Note a part of the answer."""
        if self._first_at is None and (piece.text or piece.steps):
            self._first_at = time.monotonic()

    def ends(self, sequence: LiveSequence) -> None:
        """The answer is over: tell its phases. sequence: its first."""
        now = time.monotonic()
        started_at = sequence.started_at if sequence.started_at is not None else now
        first_at = self._first_at if self._first_at is not None else now
        self._span.part("queue", self._began_at, started_at)
        if sequence.started_at is not None:
            self._span.part("prefill", started_at, first_at)
        if self._first_at is not None:
            self._span.part("decode", first_at, now)


@contextmanager
def traced(request: GenerateRequest) -> Iterator[AnswerTrace]:
    """The trace of an answer that is made while the block runs."""
    mode = request.options.policy.mode.value
    name = "proposer.generate"
    with tracing.span(name, request.trace, request_id=request.request_id, mode=mode) as span:
        yield AnswerTrace(request, span)
