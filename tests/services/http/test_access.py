"""Who may call by HTTP, and what ends a call: tokens, TLS, names, clients that leave, drain."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
import urllib.request
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from services.http.protocol import MAX_HEAD_BYTES
from services.rpc import channels
from services.serve.gateway_health import GatewayHealth
from services.serve.proposer_service import ProposerService
from tests.helpers.serving import (
    SLM_TEXT,
    becomes,
    gateway_config,
    gateway_server,
    http_gateway,
    proposer_service,
    slow_slm,
    with_http,
)

TOKEN = "a-token-of-enough-bytes"
CHAT: dict[str, Any] = {
    "model": "bundled:greedy",
    "messages": [{"role": "user", "content": "a prompt"}],
}
OPEN = ["/healthz", "/readyz", "/", "/playground.js", "/playground.css"]
CLOSED = ["/v1/models", "/v1/models/bundled", "/v1/s2t/service", "/v1/s2t/versions"]


def get(url: str, path: str, **headers: str) -> tuple[int, Any]:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


def post_chat(url: str, **headers: str) -> int:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    given = {"content-type": "application/json", **headers}
    connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), given)
    status = connection.getresponse().status
    connection.close()
    return status


def test_without_the_token_only_health_and_the_empty_page(tmp_path: Path) -> None:
    """Every route is named here: a new one that forgot the check would be seen."""
    file = tmp_path / "token"
    file.write_text(TOKEN)

    def work(url: str) -> None:
        for path in OPEN:
            assert get(url, path)[0] == 200, path
        for path in CLOSED:
            for wrong in ({}, {"authorization": "Bearer other"}, {"authorization": TOKEN}):
                status, body = get(url, path, **wrong)
                assert status == 401 and TOKEN not in body.decode(), path
            assert get(url, path, authorization=f"Bearer {TOKEN}")[0] == 200, path
        assert post_chat(url) == 401
        with pytest.raises(openai.AuthenticationError, match="token"):
            ask(url, "wrong")
        assert ask(url, TOKEN) == SLM_TEXT

    with_http(tmp_path, proposer_service(), work, **{"security.token_file": str(file)})


def test_readiness_follows_the_proposers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer sent requests to a gateway that no proposer answered."""

    def work(url: str) -> None:
        assert get(url, "/readyz")[0] == 200
        monkeypatch.setattr(GatewayHealth, "serves", False)
        assert get(url, "/readyz")[0] == 503
        assert get(url, "/healthz")[0] == 200

    with_http(tmp_path, proposer_service(), work)


def test_a_token_for_answers_does_not_administrate(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"generate: {TOKEN}\nadmin: {TOKEN}-of-an-admin\n")

    def work(url: str) -> None:
        data, admin = f"Bearer {TOKEN}", f"Bearer {TOKEN}-of-an-admin"
        assert get(url, "/v1/models", authorization=data)[0] == 200
        assert get(url, "/v1/s2t/versions", authorization=data)[0] == 403
        assert get(url, "/v1/s2t/versions", authorization=admin)[0] == 200
        assert get(url, "/v1/models", authorization=admin)[0] == 403

    with_http(tmp_path, proposer_service(), work, **{"security.token_file": str(file)})


def test_where_clients_need_certificates_http_demands_them_too(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued, clients = authority.issue_cert("127.0.0.1"), authority.issue_cert("client")
    key, certificate, ca = (tmp_path / name for name in ("key.pem", "certificate.pem", "ca.pem"))
    issued.private_key_pem.write_to_path(key)
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    authority.cert_pem.write_to_path(ca)
    without = ssl.create_default_context(cafile=str(ca))
    having = ssl.create_default_context(cafile=str(ca))
    clients.configure_cert(having)

    def work(url: str) -> None:
        with urllib.request.urlopen(f"{url}/readyz", context=having) as response:
            assert response.status == 200
        with pytest.raises(OSError):  # noqa: PT011 - refused in one of several ways
            urllib.request.urlopen(f"{url}/readyz", context=without)

    settings = {
        "security.certificate": str(certificate),
        "security.key": str(key),
        "security.client_authority": str(ca),
    }
    with_http(tmp_path, proposer_service(), work, **settings)


def ask(url: str, token: str, **options: Any) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, **options) as client:
        return client.chat.completions.create(**CHAT).choices[0].message.content or ""


def test_tls_with_the_gateways_own_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    issued.private_key_pem.write_to_path(key)
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    def work(url: str) -> None:
        assert url.startswith("https://")
        with urllib.request.urlopen(f"{url}/readyz", context=trusting) as response:
            assert response.status == 200
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(f"{url}/readyz")

    settings = {"security.certificate": str(certificate), "security.key": str(key)}
    with_http(tmp_path, proposer_service(), work, **settings)


def test_a_foreign_name_cannot_lead_to_a_tokenless_loopback(url: str, tmp_path: Path) -> None:
    """A page elsewhere, whose name was pointed here, would else read answers in a browser."""
    port = url.rpartition(":")[2]
    for host, status in (("evil.example", 403), (f"localhost:{port}", 200), ("[::1]", 200)):
        assert get(url, "/v1/models", host=host)[0] == status
    file = tmp_path / "token"
    file.write_text(TOKEN)
    with http_gateway(
        tmp_path, proposer_service(), **{"security.token_file": str(file)}
    ) as behind_a_proxy:
        headers = {"host": "s2t.example", "authorization": f"Bearer {TOKEN}"}
        assert get(behind_a_proxy, "/v1/models", **headers)[0] == 200


def test_a_request_id_comes_back(url: str) -> None:
    """It is the answer's too, so that a canary stays with its requests; a bad one is replaced."""
    for given, kept in (("my-id", True), ("two words", False), ("x" * 129, False)):
        connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
        headers = {"content-type": "application/json", "x-request-id": given}
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), headers)
        response = connection.getresponse()
        found = response.headers["x-request-id"]
        assert (found == given) == kept
        assert json.loads(response.read())["id"] == f"chatcmpl-{found}"
        connection.close()


def test_endless_headers_end_the_connection(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        sent = connection.send(b"GET / HTTP/1.1\r\nx: ")
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as it comes
            while sent < 100 * MAX_HEAD_BYTES:
                sent += connection.send(b"x" * 65536)
                time.sleep(0.001)
        assert sent < 100 * MAX_HEAD_BYTES


def test_trailers_end_the_connection(url: str) -> None:
    """They were kept without a limit, also of a call that had been refused: 40 MB took 800."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n0\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head)  # and an empty body: what follows are trailers
        sent = 0
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe, as it comes
            while sent < 100 * MAX_HEAD_BYTES:
                sent += connection.send(b"a: b\r\n" * 8192)
                time.sleep(0.001)
        assert sent < 100 * MAX_HEAD_BYTES


def test_a_long_body_is_no_long_head(url: str) -> None:
    """The head's limit must not count the body behind it."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    messages = [{"role": "user", "content": "word " * 20_000}]
    body = json.dumps({"model": "bundled:greedy", "messages": messages})
    assert len(body) > MAX_HEAD_BYTES
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    assert b"prompt" in response.read() and response.status == 400  # longer than the model
    connection.close()


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_its_answer(tmp_path: Path, streamed: bool) -> None:
    """An answer nobody reads would hold its place in the batch for thousands of tokens."""

    async def main() -> None:
        service = proposer_service(slow_slm())
        async with gateway_server(
            gateway_config(tmp_path, **{"gateway.http": True}), service
        ) as server:
            host, _, port = server.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps({**CHAT, "stream": streamed, "max_tokens": 4000}).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            if streamed:
                await reader.readuntil(b"data: ")
            assert await becomes(lambda: service.load.running == 1)
            writer.close()
            assert await becomes(lambda: service.load.running == 0)
            assert await becomes(lambda: service.ongoing_requests == 0)
        service.close()

    asyncio.run(main())


def test_a_stop_lets_answers_under_way_finish(tmp_path: Path) -> None:
    """New calls find nobody, an open stream gets its end."""
    service: ProposerService = proposer_service(slow_slm())

    async def main() -> str:
        config = gateway_config(tmp_path, **{"gateway.http": True})
        async with gateway_server(config, service) as server:
            client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="a", max_retries=0)
            async with client:
                stream = await client.chat.completions.create(**CHAT, stream=True, max_tokens=400)
                chunks = aiter(stream)
                await anext(chunks)
                stopping = asyncio.create_task(server.stop(grace_s=30))
                await asyncio.sleep(0.3)
                with pytest.raises(openai.APIConnectionError):
                    await client.with_options(timeout=5).models.list()
                last = [chunk async for chunk in chunks][-1]
                await stopping
                return last.choices[0].finish_reason

    assert asyncio.run(main()) == "length"
    service.close()


def test_the_same_client_is_one_on_both_transports(tmp_path: Path) -> None:
    """Else a quota of n would be one of 2 n."""

    async def main() -> None:
        service = proposer_service(slow_slm())
        settings = {"gateway.http": True, "gateway.max_requests_per_client": 1}
        async with gateway_server(gateway_config(tmp_path, **settings), service) as server:
            async with channels.open_channel(f"127.0.0.1:{server.port}", None) as channel:
                stub = pb_grpc.GenerationServiceStub(channel)
                parameters = pb.GenerationParameters(text="a", mode=pb.MODE_GREEDY)
                metadata = channels.call_metadata("the same")
                stream = stub.StreamGenerate(
                    pb.StreamGenerateRequest(parameters=parameters), metadata=metadata
                )
                await stream.read()
                with pytest.raises(openai.RateLimitError, match="at once"):
                    await asyncio.to_thread(ask, server.url, "the same")
                stream.cancel()
        service.close()

    asyncio.run(main())
