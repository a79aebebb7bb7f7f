"""OpenTelemetry traces, off by default: its packages are imported only where they are on.

The context of a trace travels as W3C headers: in gRPC's metadata and HTTP's headers, in requests to
a proposer and in queries to a selector. Spans never hold prompts, answers or tokens.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from s2t_shared.errors import ConfigError

if TYPE_CHECKING:
    from s2t_shared.config import TracesConfig

Headers = tuple[tuple[str, str], ...]
Attribute = str | int | float | bool
NAMES = ("traceparent", "tracestate")
_tracer: Any = None  # None: traces are off


def begin(settings: TracesConfig, role: str) -> None:
    """Send this process's spans to where the settings, else OTEL_* in the environment, say.

    Raises:
        ConfigError: traces are on, and their packages are not installed.
    """
    if not settings.enabled:
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        exporter = _exporter(settings)
    except ImportError as error:
        raise ConfigError(
            f"traces.enabled: {error.name} is not installed; pip install 's2t[serve,traces]'"
        ) from error
    ratio = settings.sample_ratio
    resource = Resource.create({"s2t.role": role})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: f"s2t-{role}"}))
    provider = TracerProvider(
        resource=resource,
        sampler=None if ratio is None else ParentBasedTraceIdRatio(ratio),
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    use(provider)


def _exporter(settings: TracesConfig) -> Any:
    if _protocol().startswith("http"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter as HTTPExporter,
        )

        return HTTPExporter(endpoint=settings.endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=settings.endpoint)


def _protocol() -> str:
    general = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", general)


def use(provider: Any) -> None:
    """Record spans with OpenTelemetry's `TracerProvider`; None: record none.

    The process's global provider is left to whoever has set it: Ray, or who embeds us.
    """
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("s2t")


def is_on() -> bool:
    """Whether spans are recorded in this process."""
    return _tracer is not None


class Span:
    """A span, or none where traces are off or the trace is not sampled."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    @property
    def is_recorded(self) -> bool:
        return self._span is not None and bool(self._span.is_recording())

    @property
    def headers(self) -> Headers:
        """The context of what this span causes; () where traces are off."""
        if self._span is None:
            return ()
        from opentelemetry import trace

        return _headers(trace.set_span_in_context(self._span))

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        """Add attributes, which become "s2t.NAME"."""
        if self._span is not None:
            self._span.set_attributes({f"s2t.{name}": value for name, value in attributes.items()})

    def part(self, name: str, began_at: float, ended_at: float) -> None:
        """A child that is over. began_at, ended_at: `time.monotonic()` values in seconds."""
        if self.is_recorded:
            child = _start(name, self._span, start_time=_unix_ns(began_at))
            child.end(end_time=_unix_ns(ended_at))

    def end(self, error: str = "") -> None:
        """It is over. error: why it failed, "" where it did not."""
        if self._span is None:
            return
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


NOTHING = Span()


def start(
    name: str,
    parent: Headers = (),
    kind: str = "internal",
    links: Sequence[Span] = (),
    **attributes: Attribute,
) -> Span:
    """Begin a span; `NOTHING` where traces are off.

    parent: the context that it belongs to; of none, it begins a trace. kind: "server", "client" or
    "internal". links: other spans that caused it. attributes: become "s2t.NAME".
    """
    if _tracer is None:
        return NOTHING
    from opentelemetry import trace

    others = [trace.Link(link._span.get_span_context()) for link in links]
    span = Span(
        _tracer.start_span(
            name,
            context=_context(parent),
            kind=trace.SpanKind[kind.upper()],
            links=others,
        )
    )
    span.set(attributes)
    return span


@contextmanager
def span(name: str, parent: Headers = (), **attributes: Attribute) -> Iterator[Span]:
    """As `start`, for as long as the block runs."""
    begun = start(name, parent)
    begun.set(attributes)
    try:
        yield begun
    except BaseException as error:
        begun.end(type(error).__name__)
        raise
    begun.end()


def _start(name: str, parent: Any, **options: Any) -> Any:
    from opentelemetry import trace

    return _tracer.start_span(name, context=trace.set_span_in_context(parent), **options)


def given(headers: Mapping[str, Any]) -> Headers:
    """The context in a call's headers or metadata; () where traces are off."""
    if _tracer is None:
        return ()
    return tuple((name, str(headers[name])) for name in NAMES if name in headers)


def active() -> Headers:
    """The context of the span that is open in the caller's own program, if it traces at all."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return ()
    return _headers(None)


def _headers(context: Any) -> Headers:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return tuple(carrier.items())


def _context(parent: Headers) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(dict(parent), Context())


def _unix_ns(monotonic_s: float) -> int:
    return time.time_ns() - round(1e9 * (time.monotonic() - monotonic_s))
