"""Refuses messages that cannot be decoded.

gRPC would answer UNKNOWN with the class of the decoder's error; a client learns what is wrong here.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from s2t_shared.errors import InvalidRequestError
from services.rpc import wire

UNDECODABLE = object()  # in place of a request


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls whose one request cannot be decoded with INVALID_ARGUMENT."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        read = _tolerant(handler.request_deserializer)
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(
                _checked(handler.unary_unary), read, handler.response_serializer
            )
        answer = handler.unary_stream
        checked = _checked_stream if inspect.isasyncgenfunction(answer) else _checked
        return grpc.unary_stream_rpc_method_handler(
            checked(answer), read, handler.response_serializer
        )


def _tolerant(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_or_mark(sent: bytes) -> Any:
        try:
            return read(sent)
        except DecodeError:
            return UNDECODABLE

    return read_or_mark


def _checked(answer: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def checked(request: Any, context: Any) -> Any:
        if request is UNDECODABLE:
            await _refuse(context)
        return await answer(request, context)

    return checked


def _checked_stream(answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def checked(request: Any, context: Any) -> Any:
        if request is UNDECODABLE:
            await _refuse(context)
        async for response in answer(request, context):
            yield response

    return checked


async def _refuse(context: Any) -> None:
    await wire.abort(
        context,
        InvalidRequestError(
            "the request cannot be decoded; is the client built from this service's protos?"
        ),
    )
