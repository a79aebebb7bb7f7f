"""How many requests of one client, and of all, a server answers at once.

A client is a token from a host: two of them differ where either does. The same one calls by gRPC
and by HTTP. Knows gRPC's call contexts only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

import grpc.aio

from s2t_shared.errors import OverloadedError

NO_TOKEN = "no token"


def client_of(context: grpc.aio.ServicerContext) -> str:
    """A name of who calls: of its host and its token, without telling either's token."""
    token = dict(context.invocation_metadata() or ()).get("authorization", "")
    token = token if isinstance(token, bytes) else str(token).encode()
    return name_of(_host(context.peer()), token)


def name_of(host: str, authorization: bytes) -> str:
    """The name of who calls from `host` ("ipv4:127.0.0.1") with this authorization."""
    # The token alone: of its scheme's case and spaces there are as many spellings as one likes.
    token = authorization.partition(b" ")[2].strip()
    digest = hashlib.sha256(token).hexdigest()[:8] if token else NO_TOKEN
    return f"{host}, {digest}"


def digest_of(client: str) -> str:
    """Of a client's name, the digest of its token; "" where it has none."""
    return client.rpartition(", ")[2].replace(NO_TOKEN, "")


def _host(peer: str) -> str:
    """ "ipv4:127.0.0.1:54321" -> "ipv4:127.0.0.1": each connection has another port."""
    peer = unquote(peer)
    return peer if peer.startswith("unix") else peer.rpartition(":")[0]


class ClientQuota:
    """Used on one asyncio loop.

    limit: requests of one client in progress. total: of all together. 0: any number.
    """

    def __init__(self, limit: int, total: int = 0) -> None:
        self._limit = limit
        self._total = total
        self._ongoing: Counter[str] = Counter()

    def count(self, context: grpc.aio.ServicerContext) -> str:
        """Count a call of its client, until the call ends in whatever way. Returns the client.

        Raises:
            OverloadedError: the client, or all of them, have as many in progress as they may have.
        """
        client = client_of(context)
        self._take(client)
        # A `finally` of the handler would not do: a stream that is cancelled between two messages
        # is closed only when it is collected.
        context.add_done_callback(lambda _: self._release(client))
        return client

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Count a request of `client` while the block runs. Raises as `count`."""
        self._take(client)
        try:
            yield
        finally:
            self._release(client)

    def _take(self, client: str) -> None:
        if 0 < self._limit <= self._ongoing[client]:
            raise OverloadedError(
                f"{self._ongoing[client]} of your requests are being answered, at most "
                f"{self._limit} of one client are at once; wait for one of them"
            )
        if 0 < self._total <= self._ongoing.total():
            raise OverloadedError(
                f"{self._total} requests are being answered, the most that are at once; try again"
            )
        self._ongoing[client] += 1

    def _release(self, client: str) -> None:
        self._ongoing[client] -= 1
        if not self._ongoing[client]:
            del self._ongoing[client]
