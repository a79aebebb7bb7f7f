"""How long and how often a client may hold an HTTP connection."""

from __future__ import annotations

import json
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from services.http import app, protocol, server
from services.rpc import reloading
from services.rpc.tls import ClientTLS
from tests.helpers.certificates import Authority, secured
from tests.helpers.serving import http_gateway, proposer_service, slow_slm

ENDED_S = 10.0  # on however busy a machine
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
GET = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, _, port = url.rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=ENDED_S) as connection:
        yield connection


def drips(connection: socket.socket, part: bytes) -> bytes:
    """What is replied to a client that sends `part` ten times a second, until the connection ends.

    Raises:
        TimeoutError: it does not.
    """
    replied = b""
    give_up_at = time.monotonic() + ENDED_S
    connection.settimeout(0.1)
    while time.monotonic() < give_up_at:
        try:
            connection.sendall(part)
            received = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return replied
        if not received:
            return replied
        replied += received
    raise TimeoutError


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.5)
    monkeypatch.setattr(protocol, "LINGER_S", 0.5)
    monkeypatch.setattr(protocol, "WRITE_S", 0.5)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("sent", "part"),
    [(b"", b""), (b"", b"x"), (b"GET / HTTP/1.1\r\n", b"a: b\r\n"), (GET, b"\r\n"), (GET, b"G")],
    ids=["nothing", "a line", "headers", "blank lines behind a call", "a second head"],
)
def test_a_head_has_its_time(url: str, sent: bytes, part: bytes) -> None:
    """A thousand clients that send a byte now and then held a thousand connections for ever."""
    with connected(url) as connection:
        connection.sendall(sent)
        drips(connection, part)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEAD.replace(b"/json", b"/xml"), b"415"),
        (HEAD.replace(b"/v1", b"/v9"), b"404"),
        (HEAD.replace(b": 127.0.0.1", b": evil.example"), b"403"),
        (HEAD.replace(b"POST /v1/completions", b"GET /healthz"), b"200"),
    ],
)
def test_a_body_that_nobody_reads_ends_the_connection(url: str, head: bytes, status: bytes) -> None:
    """The reply was there at once, and the body came a byte a second for as long as one liked."""
    with connected(url) as connection:
        connection.sendall(head + b"content-length: 100000\r\n\r\n")
        assert drips(connection, b"x").startswith(b"HTTP/1.1 " + status)


def test_a_body_has_its_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came a byte a second, and held a place among the connections for as long as one liked."""
    monkeypatch.setattr(app, "BODY_S", 0.5)
    with connected(url) as connection:
        connection.sendall(HEAD + b"content-length: 100000\r\n\r\n{")
        reply = drips(connection, b" ")
    assert reply.startswith(b"HTTP/1.1 408") and b"body_time" in reply


@pytest.mark.usefixtures("hasty")
def test_a_connection_that_does_nothing_wrong_is_kept(url: str) -> None:
    """Between calls, and with a refused body that comes at once, no head's time runs."""
    connection = HTTPConnection(url.rpartition("/")[2], timeout=ENDED_S)
    connection.connect()
    connection.auto_open = 0  # it is this connection that must last
    for path, status in (("/healthz", 200), ("/v9", 404), ("/v1/models/none", 404)):
        for _ in range(2):
            connection.request("POST" if status == 404 else "GET", path, b"abc")
            response = connection.getresponse()
            response.read()
            assert response.status in (status, 405)
            time.sleep(0.6)
    connection.close()


@pytest.mark.usefixtures("hasty")
def test_a_client_that_reads_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply filled the socket's buffers, and it held its connection and its place for ever."""
    listening = server._listening

    def with_a_small_buffer(*address: Any) -> socket.socket:
        found = listening(*address)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return found

    monkeypatch.setattr(server, "_listening", with_a_small_buffer)
    service = proposer_service(slow_slm())
    asked: dict[str, Any] = {
        "model": "bundled:greedy",
        "prompt": "a",
        "stream": True,
        "max_tokens": 4000,
        "s2t": {"steps": True},
    }
    body = json.dumps(asked).encode()
    with http_gateway(tmp_path, service) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = url.rpartition("/")[2].partition(":")
        connection.connect((host, int(port)))
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert becomes(lambda: service.ongoing_requests == 1)
        assert becomes(lambda: service.ongoing_requests == 0)
        connection.settimeout(ENDED_S)
        received = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
        assert b"[DONE]" not in received


def becomes(holds: Callable[[], bool]) -> bool:
    give_up_at = time.monotonic() + 60
    while not holds() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return holds()


@pytest.mark.parametrize("limit", ["max_http_connections", "max_http_connections_per_host"])
def test_open_connections_are_bounded(tmp_path: Path, limit: str) -> None:
    """Each took memory and a descriptor, up to the process's last one."""
    with (
        http_gateway(tmp_path, proposer_service(), **{f"gateway.{limit}": 3}) as url,
        ExitStack() as held,
    ):
        for _ in range(3):
            held.enter_context(connected(url)).sendall(b"GET")
        with connected(url) as one_more:
            assert one_more.recv(65536).startswith(b"HTTP/1.1 503")
        held.close()
        assert becomes(lambda: is_answered(url))


def is_answered(url: str) -> bool:
    with connected(url) as connection:
        connection.sendall(GET)
        return connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_each_host_has_connections_of_its_own() -> None:
    connections = protocol.Connections(limit=3, limit_per_host=2)
    assert connections.take("a") and connections.take("a") and not connections.take("a")
    assert connections.take("b") and not connections.take("b"), "3 are open"
    connections.release("a")
    assert connections.take("b")


def test_a_handshake_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that opens a connection and does no TLS on it held it for a minute."""
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.5)
    settings = settings_of(secured(Authority(tmp_path)))
    with http_gateway(tmp_path, proposer_service(), **settings) as url, connected(url) as silent:
        begun = time.monotonic()
        assert silent.recv(1) == b""
        assert time.monotonic() - begun < ENDED_S


# -- new certificates -----------------------------------------------------------------------------


def settings_of(security: Any) -> dict[str, str]:
    names = ("certificate", "key", "client_authority")
    given = {f"security.{name}": getattr(security, name) for name in names}
    return {name: str(file) for name, file in given.items() if file is not None}


def connects(url: str, tls: ClientTLS) -> bool:
    """Whether a new connection is answered."""
    context = ssl.create_default_context(cafile=str(tls.authority))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    try:
        with urllib.request.urlopen(f"{url}/healthz", context=context, timeout=ENDED_S) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_new_certificates_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only gRPC did: with short-lived certificates HTTP served expired ones until a restart."""
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    old, new = Authority(tmp_path), Authority(tmp_path, "new")
    security = secured(old)
    with http_gateway(tmp_path, proposer_service(), **settings_of(security)) as url:
        assert connects(url, ClientTLS(authority=old.file))
        key_of_old = (tmp_path / "server.key").read_bytes()
        new.issue("server")
        key_of_new = (tmp_path / "server.key").read_bytes()
        (tmp_path / "server.key").write_bytes(key_of_old)
        assert connects(url, ClientTLS(authority=old.file)), "half a change is none"
        (tmp_path / "server.key").write_bytes(key_of_new)
        assert connects(url, ClientTLS(authority=new.file))
        assert not connects(url, ClientTLS(authority=old.file))


def test_a_new_authority_of_clients_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "LOOK_EVERY_S", 0.0)
    authority, new = Authority(tmp_path), Authority(tmp_path, "new")
    clients = tmp_path / "clients.pem"
    clients.write_bytes(authority.file.read_bytes())
    security = secured(authority, mutual=True, client_authority=clients)
    known = ClientTLS.of(security)
    assert known is not None
    certificate, key = new.issue("renewed", "client")
    renewed = replace(known, certificate=certificate, key=key)
    with http_gateway(tmp_path, proposer_service(), **settings_of(security)) as url:
        assert connects(url, known) and not connects(url, renewed)
        assert not connects(url, replace(known, certificate=None, key=None))
        clients.write_bytes(new.file.read_bytes())
        assert connects(url, renewed) and not connects(url, known)
        assert not connects(url, replace(known, certificate=None, key=None))
