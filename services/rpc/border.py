"""The border of every server of ours: what a handler is given, what of its failure is told, and
that the call is recorded.

gRPC answers a message that cannot be decoded, and an error that nobody expected, with UNKNOWN and
the class and text of the error. Here the one is the client's mistake, and of the other a client
learns nothing: it is in the log.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from s2t_shared.errors import InvalidRequestError, S2TError
from services.rpc import call_record, tracing, wire

log = logging.getLogger(__name__)
UNDECODABLE = object()  # in place of a request
UNEXPECTED = "an unexpected error; it is in the service's log"

RECORDED = ("/s2t.v1.GenerationService/", "/s2t.v1.AdminService/")  # others: at level debug

MAKERS = {  # whether requests and whether responses are streams -> gRPC's maker of a handler
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


OnRefusal = Callable[[Exception], None]


class BorderInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls that fail with a documented status, whatever their handler does. The outermost
    interceptor, so that it hears of each call.

    on_refusal: called with each error that a handler has not ended its call with itself.
    """

    def __init__(self, on_refusal: OnRefusal = lambda error: None) -> None:
        self._on_refusal = on_refusal

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None
        answer = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        guard = _guarded_stream if inspect.isasyncgenfunction(answer) else _guarded
        make = MAKERS[handler.request_streaming, handler.response_streaming]
        return make(
            guard(details.method, answer, self._on_refusal),
            _tolerant(handler.request_deserializer),
            handler.response_serializer,
        )


def _tolerant(read: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if read is None:
        return None

    def read_or_mark(sent: bytes) -> Any:
        try:
            return read(sent)
        except DecodeError:
            return UNDECODABLE

    return read_or_mark


def _guarded(
    method: str, answer: Callable[[Any, Any], Awaitable[Any]], on_refusal: OnRefusal
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        _record(method, request, context)
        try:
            return await answer(_decoded(request), context)
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await _end(context, error, on_refusal)

    return guarded


def _guarded_stream(
    method: str, answer: Callable[[Any, Any], Any], on_refusal: OnRefusal
) -> Callable[[Any, Any], Any]:
    async def guarded(request: Any, context: Any) -> Any:
        _record(method, request, context)
        try:
            async for response in answer(_decoded(request), context):
                yield response
        except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
            await _end(context, error, on_refusal)

    return guarded


def _record(method: str, request: Any, context: Any) -> None:
    """Begin the call's record; its end is noted when the call ends, in whatever way."""
    metadata = dict(context.invocation_metadata() or ())
    # A selector's caller names the sequence: a request's id, and which of its sequences.
    named = getattr(request, "request_id", "") or getattr(request, "sequence_id", "")
    given_id = named or call_record.sane_id(metadata)
    level = logging.INFO if method.startswith(RECORDED) else logging.DEBUG
    trace = tracing.given(metadata)
    is_traced = trace or method.startswith(RECORDED)  # who only helps to answer begins no trace
    record = call_record.begin(method, given_id, level, trace if is_traced else None)
    context.set_trailing_metadata(((call_record.REQUEST_ID, record.request_id),))
    context.add_done_callback(lambda _: record.end(_status_of(context)))


def _status_of(context: Any) -> str:
    """How a call ended."""
    code = context.code()
    if code is not None:
        return str(code.name)
    if context.done():
        return "OK"
    left_s = context.time_remaining()
    return "DEADLINE_EXCEEDED" if left_s is not None and left_s <= 0 else "CANCELLED"


def _decoded(request: Any) -> Any:
    """The request, or the requests of a stream.

    Raises:
        InvalidRequestError: it cannot be decoded.
    """
    if isinstance(request, AsyncIterator):
        return _each_decoded(request)
    if request is UNDECODABLE:
        raise InvalidRequestError(
            "the request cannot be decoded; is the client built from this service's protos?"
        )
    return request


async def _each_decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request)


async def _end(context: Any, error: Exception, on_refusal: OnRefusal) -> None:
    if isinstance(error, grpc.aio.AbortError):  # ended already, by the handler
        raise error
    on_refusal(error)
    if isinstance(error, S2TError):
        await wire.abort(context, error)
    if isinstance(error, NotImplementedError):  # a method that only the generated code has
        text = "this server does not implement the method"
        await wire.abort_with(context, grpc.StatusCode.UNIMPLEMENTED, text, "UNIMPLEMENTED")
    log_unexpected(error)
    await wire.abort_with(context, grpc.StatusCode.INTERNAL, UNEXPECTED, wire.INTERNAL)


def log_unexpected(error: BaseException) -> None:
    """Log where an error that nobody expected came from; not its text, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("unexpected %s\n%s", type(error).__qualname__, frames)
