"""Which role may call which gRPC method. What is not in the table nobody may call.

Knows gRPC; tokens and their roles are `services.rpc.tokens`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from s2t_shared.errors import PermissionDeniedError, UnauthenticatedError
from services.rpc import wire
from services.rpc.border import OnRefusal
from services.rpc.tokens import Role, Tokens

OPEN_METHODS = ("/grpc.health.v1.Health/",)  # what a load balancer may ask without a token
ALLOWED = {  # service -> roles
    "s2t.v1.GenerationService": frozenset({Role.GENERATE}),
    "s2t.v1.SelectionService": frozenset({Role.SCORE}),
    "s2t.v1.AdminService": frozenset({Role.ADMIN}),
    "grpc.reflection.v1alpha.ServerReflection": frozenset({Role.GENERATE, Role.ADMIN}),
    # Not served: clients ask for it first, and take v1alpha only where it is UNIMPLEMENTED.
    "grpc.reflection.v1.ServerReflection": frozenset({Role.GENERATE, Role.ADMIN}),
}


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls whose token has no role that may make them; health checks excepted.

    on_refusal: called with the error of each call that is refused.
    """

    def __init__(self, tokens: Tokens, on_refusal: OnRefusal = lambda error: None) -> None:
        self._tokens = tokens
        self._on_refusal = on_refusal

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        if details.method.startswith(OPEN_METHODS):
            return await continuation(details)
        service = details.method.rpartition("/")[0].lstrip("/")
        given = dict(details.invocation_metadata).get("authorization", "")
        try:
            self._tokens.check(given, ALLOWED.get(service, frozenset()))
        except (UnauthenticatedError, PermissionDeniedError) as error:
            self._on_refusal(error)
            return _refusal(error)
        return await continuation(details)


def _refusal(error: UnauthenticatedError | PermissionDeniedError) -> Any:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await wire.abort(context, error)

    # Whatever the method is: a handler of streams does not wait for the caller's first message.
    return grpc.stream_stream_rpc_method_handler(refuse)
