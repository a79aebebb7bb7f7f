"""Every HTTP call has an id, which comes back in a header, and a record, which ends with it."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.http.answering import CLIENT_CLOSED
from services.rpc import call_record, tracing

MAX_PATH_LENGTH = 64
CALLS = "/v1/"  # others are pages and probes: logged at level debug, and not traced


class Recorded:
    """An application whose calls are recorded."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_call = str(scope["path"]).startswith(CALLS)
        headers = Headers(scope=scope)
        shown = scope.get("raw_path", b"").decode("ascii", "replace")[:MAX_PATH_LENGTH]
        record = call_record.begin(
            f"{scope['method']} {shown}",
            call_record.sane_id(headers),
            logging.INFO if is_call else logging.DEBUG,
            tracing.given(headers) if is_call else None,
        )
        status = CLIENT_CLOSED
        is_whole = False

        async def note(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[call_record.REQUEST_ID] = record.request_id
            else:
                is_whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            record.end(str(status if is_whole else CLIENT_CLOSED))
