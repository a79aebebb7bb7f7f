"""A `SelectorClient` whose queries are spans: children of the answers that ask."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from s2t_shared.decode.interfaces import LLMInfo, SelectorClient
from s2t_shared.types import ScoreQuery, ScoreReply
from services.rpc import tracing


class TracedSelector:
    """The inner selector, cache and network included. Its selector servers continue the trace."""

    def __init__(self, inner: SelectorClient) -> None:
        self._inner = inner

    @property
    def info(self) -> LLMInfo:
        return self._inner.info

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        spans = [_begun(query) for query in queries]
        asked = [
            replace(query, trace=span.headers) for query, span in zip(queries, spans, strict=True)
        ]
        futures = self._inner.submit(asked)
        for future, span in zip(futures, spans, strict=True):
            future.add_done_callback(partial(_end, span))
        return futures


def _begun(query: ScoreQuery) -> tracing.Span:
    """What belongs to no request, as calibration's queries, begins no trace."""
    if not query.trace:
        return tracing.NOTHING
    positions = len(query.positions)
    return tracing.start("selector.score", query.trace, "client", positions=positions)


def _end(span: tracing.Span, future: Future[ScoreReply]) -> None:
    if future.cancelled():
        span.end("nobody waits for it any longer")
        return
    error = future.exception()
    if error is None:
        span.set({"cached": future.result().cached})
    span.end("" if error is None else type(error).__name__)


def traced(selector: SelectorClient) -> SelectorClient:
    """The selector, with spans where traces are on."""
    return TracedSelector(selector) if tracing.is_on() else selector
