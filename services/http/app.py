"""The routes. Each call is checked, answered, and its errors told in OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from s2t_shared.config import LOOPBACK, Config
from services.http import errors
from services.http.answering import CLIENT_CLOSED, ClientGoneError, EventStream, unless_gone
from services.http.call import Call
from services.http.door import Door
from services.http.pages import page_routes
from services.http.recorded import Recorded
from services.http.requests import (
    ChatRequest,
    CompletionRequest,
    ModelNames,
    OpenAIRequest,
    UnknownModelError,
    parse,
)
from services.rpc import call_record

BODY_S = 30.0  # a slower body is given up
OWNER = "s2t"
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class HttpError(Exception):
    """What HTTP itself forbids, before a request is one of ours."""

    status: int
    text: str
    code: str


class Api:
    """The handlers, before one gateway's door."""

    def __init__(self, config: Config, door: Door) -> None:
        gateway = config.gateway
        self._door = door
        self._names = ModelNames(config.served_model_name)
        self._default_mode = config.defaults.mode
        self._max_body = gateway.max_message_bytes
        # A page elsewhere can make a browser call a name of its own that leads to loopback: where
        # no token stands in its way, the name must be a loopback's.
        tokenless = config.security.token_file is None
        self._only_loopback = tokenless and gateway.host in LOOPBACK
        self.ready = False  # whether calls are taken

    def routes(self) -> list[Route]:
        """All but the playground's."""
        get, post = ["GET"], ["POST"]
        return [
            Route("/healthz", self._health, methods=get),
            Route("/readyz", self._readiness, methods=get),
            Route("/v1/models", self._checked(self._models), methods=get),
            Route("/v1/models/{model:path}", self._checked(self._model), methods=get),
            Route("/v1/chat/completions", self._checked(self._chat), methods=post),
            Route("/v1/completions", self._checked(self._completion), methods=post),
            Route("/v1/s2t/service", self._checked(self._service), methods=get),
            Route("/v1/s2t/versions", self._checked(self._versions, admin=True), methods=get),
        ]

    # -- around each call -------------------------------------------------------------------------

    def _checked(
        self, handler: Handler, *, admin: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """The handler for who may call it; its errors become replies."""

        async def answer(request: Request) -> Response:
            try:
                self._check_host(request)
                self._door.check(request.headers.get("authorization", ""), admin=admin)
                response = await handler(request)
            except (ClientGoneError, ClientDisconnect):
                response = Response(status_code=CLIENT_CLOSED)
            except UnknownModelError as error:
                response = errors.plain(404, str(error), "model_not_found", "model")
            except HttpError as error:
                response = errors.plain(error.status, error.text, error.code)
            except Exception as error:  # noqa: BLE001 - the border: a client never sees our insides
                response = errors.response_of(self._door.refusal(error))
            return response

        return answer

    def _check_host(self, request: Request) -> None:
        if self._only_loopback and request.url.hostname not in LOOPBACK:
            raise HttpError(
                403,
                "without a token this service answers on loopback names only (127.0.0.1, "
                "localhost); set security.token_file to serve it under another name",
                "host",
            )

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HttpError(415, "send JSON: 'content-type: application/json'", "content_type")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    body += part
                    if len(body) > self._max_body:
                        raise HttpError(
                            413, f"the body has more than {self._max_body} bytes", "body_size"
                        )
        except TimeoutError as error:
            raise HttpError(408, f"the body took longer than {BODY_S:g} s", "body_time") from error
        return bytes(body)

    # -- state ------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _readiness(self, request: Request) -> Response:
        if not self.ready or not self._door.serves:
            return JSONResponse({"status": "not serving"}, 503)
        return JSONResponse({"status": "serving"})

    async def _models(self, request: Request) -> Response:
        data = [self._named(name) for name in self._names.all]
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._names.mode_of(name)
        return JSONResponse(self._named(name))

    def _named(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}

    async def _service(self, request: Request) -> Response:
        description = asdict(await self._door.describe())
        names = {"model": self._names.served, "default_mode": self._default_mode.value}
        return JSONResponse({**names, **description})

    async def _versions(self, request: Request) -> Response:
        return JSONResponse({"data": await self._door.versions()})

    # -- answers ----------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest)

    async def _answer(self, request: Request, kind: type[OpenAIRequest]) -> Response:
        asked = parse(kind, await self._body(request))
        call = Call(
            self._door,
            asked,
            self._names,
            self._default_mode,
            request_id=call_record.current().request_id,
            host=_host(request),
            authorization=request.headers.get("authorization", ""),
        )
        if not asked.stream:
            return JSONResponse(await unless_gone(request.receive, call.whole()))
        events = call.events()
        first = await unless_gone(request.receive, anext(events))
        return EventStream(_behind(first, events))


def _host(request: Request) -> str:
    """The caller's host as gRPC names it, so that a client is one on both transports."""
    host = request.client.host if request.client is not None else "unix"
    return f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}"


async def _behind(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:64]}: {error.detail}"
    return errors.plain(error.status_code, text, "route")


def new_app(config: Config, api: Api) -> Starlette:
    """The application: the API, and the playground where it is on."""
    pages = page_routes() if config.gateway.playground else []
    return Starlette(
        routes=[*api.routes(), *pages],
        exception_handlers={HTTPException: _not_found},
        middleware=[Middleware(Recorded)],
    )
