"""One HTTP connection, and how long and how often a client may hold one.

uvicorn waits for ever: for the rest of a request's head, for a body that nobody reads, for a client
that takes none of its reply. Here each wait ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

MAX_HEAD_BYTES = 64 << 10  # of one request: its line and its headers
HEAD_S = 20.0  # for a head, from the connection or from its first byte
LINGER_S = 2.0  # for the rest of a body whose request was answered without it
WRITE_S = 60.0  # for a client that takes nothing of its reply
KEEP_ALIVE_S = 75  # longer than load balancers keep theirs
TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


class Connections:
    """How many connections are open, in all and of each host. limits: 0 is any number."""

    def __init__(self, limit: int, limit_per_host: int) -> None:
        self._limit = limit
        self._limit_per_host = limit_per_host
        self._open: Counter[str] = Counter()

    def take(self, host: str) -> bool:
        """Count a connection, if one more of this host may be open."""
        is_full = 0 < self._limit <= self._open.total()
        if is_full or 0 < self._limit_per_host <= self._open[host]:
            return False
        self._open[host] += 1
        return True

    def release(self, host: str) -> None:
        """One that was taken is closed."""
        self._open[host] -= 1
        if not self._open[host]:
            del self._open[host]


class Timer:
    """Calls `act` once it has run out. Started again while it runs, it goes on as it was."""

    def __init__(self, act: Any) -> None:
        self._act = act
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        if self._handle is None:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(seconds, self._run)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run(self) -> None:
        self._handle = None
        self._act()


class BoundedProtocol(HttpToolsProtocol):
    """httptools takes any number of headers: a client that never ends them would fill memory. And
    uvicorn takes any time for them: one that sends them slowly would hold its place for ever."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._open = connections
        self._host = ""
        self._is_counted = False
        self._in_head = False
        self._in_body = False
        self._head_bytes = 0
        self._head = Timer(self._head_is_late)
        self._end = Timer(self._abort)  # of a connection that has nothing more to say
        self._write = Timer(self._abort)

    # -- the connection ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn says Transport
        self._host = self.client[0] if self.client is not None else "unix"
        self._is_counted = self._open.take(self._host)
        if not self._is_counted:
            self.transport.write(TOO_MANY)
            self._close()
            return
        self._head.start(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._end, self._write):
            timer.stop()
        if self._is_counted:
            self._open.release(self._host)
        super().connection_lost(exc)

    def _close(self) -> None:
        """What was written still goes out, for a moment."""
        self.transport.close()
        self._end.start(LINGER_S)

    def _abort(self) -> None:
        self.transport.abort()

    # -- what comes -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._in_body:
            self._head.start(HEAD_S)
        super().data_received(data)
        if self._in_head:
            self._head.start(HEAD_S)
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer of a chunked body: nobody reads them, nothing bounds them
            self._close()
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_body = True
        self._head_bytes = 0
        self._head.stop()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        if not self.transport.is_closing():
            self._end.stop()
        super().on_message_complete()

    def _head_is_late(self) -> None:
        if self._is_answering:  # and the client waits for it: what it sent too much can wait
            self._head.start(HEAD_S)
        else:
            self._close()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # -- what goes --------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end.start(WRITE_S)
        elif self._in_body and not self._is_answering:
            self._end.start(LINGER_S)

    def timeout_keep_alive_handler(self) -> None:
        self._abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write.start(WRITE_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write.stop()
