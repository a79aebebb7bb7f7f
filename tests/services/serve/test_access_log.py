"""The access log and the request id, through a live gateway: gRPC and HTTP, whole and streamed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.config import LogConfig, SecurityConfig
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.pb.v1 import selection_pb2, selection_pb2_grpc
from s2t_shared.requests import new_request
from services.rpc import channels, logs
from tests.helpers.selection_server import start_selection_server
from tests.helpers.serving import (
    FixedVersions,
    gateway,
    gateway_config,
    http_gateway,
    proposer_service,
    scripted_llm,
    scripted_slm,
    slow_slm,
)

ID = "abc-123"
CANARY = "canary-7f3a"
ASKED = pb.GenerationParameters(text=CANARY, mode=pb.MODE_S2T, threshold=0.3)
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def everything_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def lines(caplog: pytest.LogCaptureFixture, method: str) -> list[dict[str, Any]]:
    """The access log's fields for calls of one method."""
    records = [r for r in caplog.records if r.name == logs.ACCESS]
    return [r.fields for r in records if method in r.fields["method"]]  # type: ignore[attr-defined]


def check_line(line: Mapping[str, Any], status: str) -> None:
    assert line["status"] == status
    assert line["mode"] == "s2t"
    assert line["completion_tokens"] == 9 and line["prompt_tokens"] >= 1
    assert line["triggers"] == 2 and line["degraded_steps"] == 0
    assert 0 < line["first_token_s"] <= line["duration_s"]
    assert not any(word in str(line) for word in (CANARY, "three", "other"))


async def ended(caplog: pytest.LogCaptureFixture, method: str) -> dict[str, Any]:
    """The call's line: gRPC tells its server of an end a moment after the client."""
    for _ in range(200):
        if found := lines(caplog, method):
            return found[-1]
        await asyncio.sleep(0.01)
    raise AssertionError("no line")


def test_a_stream_over_grpc_has_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could say afterwards what was asked, how long it took, and which call it was."""

    async def main() -> tuple[dict[str, Any], dict[str, Any], str]:
        async with gateway(gateway_config(tmp_path), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            message = pb.StreamGenerateRequest(parameters=ASKED)
            call = stub.StreamGenerate(message, metadata=(("x-request-id", ID),))
            last = [m async for m in call][-1]
            return (
                await ended(caplog, "StreamGenerate"),
                dict(await call.trailing_metadata()),
                last.request_id,
            )

    service = proposer_service()
    try:
        line, trailing, told = asyncio.run(main())
    finally:
        service.close()
    check_line(line, "OK")
    assert line["request_id"] == trailing["x-request-id"] == told == ID
    assert line["method"] == "/s2t.v1.GenerationService/StreamGenerate"


@pytest.mark.parametrize("stream", [False, True])
def test_http_has_the_same_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """A streamed answer's line was written at its first byte, without tokens."""
    body = {
        "model": "bundled:s2t",
        "prompt": CANARY,
        "stream": stream,
        "s2t": {"threshold": 0.3},
    }
    with http_gateway(tmp_path, proposer_service()) as url:
        asked = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "x-request-id": ID},
        )
        with urllib.request.urlopen(asked, timeout=20) as response:
            response.read()
            assert response.headers["x-request-id"] == ID
    [line] = lines(caplog, "POST /v1/completions")
    if not stream:
        line = {"first_token_s": line["duration_s"], **line}
    check_line(line, "200")
    assert line["request_id"] == ID


def test_an_insane_id_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An id with spaces forged fields of a text line; a message's own is kept, but for the log."""
    with http_gateway(tmp_path, proposer_service()) as url:
        asked = urllib.request.Request(f"{url}/v1/models", headers={"x-request-id": "a status=200"})
        with urllib.request.urlopen(asked, timeout=20) as response:
            given = response.headers["x-request-id"]
    [line] = lines(caplog, "GET /v1/models")
    assert line["request_id"] == given
    assert len(given) == 32 and " " not in given


def test_refused_calls_have_their_line_and_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls without a token were refused before the record began, and errors lost the id."""
    file = tmp_path / "tokens"
    file.write_text(f"generate: {TOKEN}\n")
    config = gateway_config(tmp_path, **{"security.token_file": str(file)})

    async def ask(channel: grpc.aio.Channel, metadata: Any, message: Any) -> dict[str, Any]:
        caplog.clear()
        stub = pb_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Generate(message, metadata=(("x-request-id", ID), *metadata))
        assert dict(raised.value.trailing_metadata() or ())["x-request-id"] == ID
        return await ended(caplog, "Generate")

    async def main() -> list[dict[str, Any]]:
        good = (("authorization", f"Bearer {TOKEN}"),)
        async with gateway(config, service) as channel:
            wrong = pb.GenerateRequest(parameters=pb.GenerationParameters(text="x", samples=99))
            return [
                await ask(channel, (), pb.GenerateRequest(parameters=ASKED)),
                await ask(channel, good, wrong),
            ]

    service = proposer_service()
    try:
        unknown, wrong = asyncio.run(main())
    finally:
        service.close()
    assert unknown["status"] == "UNAUTHENTICATED" and "client" not in unknown
    assert wrong["status"] == "INVALID_ARGUMENT" and wrong["request_id"] == ID
    assert wrong["client"] == hashlib.sha256(TOKEN.encode()).hexdigest()[:8]


def test_a_client_that_leaves_has_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled stream is closed when it is collected: its line came late, or never."""

    async def main() -> dict[str, Any]:
        async with gateway(gateway_config(tmp_path), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            parameters = pb.GenerationParameters(text="x", mode=pb.MODE_GREEDY)
            call = stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters))
            async for _ in call:
                call.cancel()
                break
            return await ended(caplog, "StreamGenerate")

    slm = slow_slm()
    service = proposer_service(slm, scripted_llm(slm))
    try:
        line = asyncio.run(main())
    finally:
        service.close()
    assert line["status"] == "CANCELLED"
    assert line["first_token_s"] > 0 and "completion_tokens" not in line


def test_probes_are_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A load balancer's probe every second drowned the requests."""
    with http_gateway(tmp_path, proposer_service()) as url:
        urllib.request.urlopen(f"{url}/readyz", timeout=20).read()
    levels = {r.levelno for r in caplog.records if r.name == logs.ACCESS}
    assert levels == {logging.DEBUG}


def test_a_selector_knows_whose_query_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    """What went wrong in a selector could not be joined with the request that asked."""

    async def main() -> dict[str, Any]:
        server, address = await start_selection_server(SecurityConfig())
        try:
            async with channels.open_channel(address, None) as channel:
                stub = selection_pb2_grpc.SelectionServiceStub(channel)
                await stub.Score(selection_pb2.ScoreRequest(token_ids=[5], sequence_id=f"{ID}/3"))
                return await ended(caplog, "Score")
        finally:
            await server.stop(0)

    assert asyncio.run(main())["request_id"] == f"{ID}/3"


# -- the lines themselves -------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """The folder of a process whose lines are JSON."""
    loggers = [logging.getLogger(name) for name in (*logs.OURS, logs.ACCESS)]
    before = [(known.handlers, known.propagate, known.level) for known in loggers]
    folder = tmp_path / "logs"
    logs.begin(LogConfig(format="json", folder=folder), "proposer")
    yield folder
    for known, (handlers, propagate, level) in zip(loggers, before, strict=True):
        known.handlers, known.propagate, known.level = handlers, propagate, level


class TalkingVersions(FixedVersions):
    """As the version watcher may: it logs while a request is prepared."""

    def choose(self, request_id: str) -> None:
        logging.getLogger("services.serve.version_watcher").warning('"quoted"\nand broken')


def test_json_lines_carry_role_and_request(written: Path) -> None:
    """A line break in a message made two lines; a proposer's lines named no request."""
    slm = scripted_slm()
    service = proposer_service(slm, scripted_llm(slm), versions=TalkingVersions())

    async def main() -> None:
        request = new_request("x", "greedy", request_id=ID)
        async for _ in service.stream(request):
            pass

    try:
        asyncio.run(main())
    finally:
        service.close()
    [file] = written.iterdir()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    [line] = [line for line in found if line["level"] == "WARNING"]
    assert line["message"] == '"quoted"\nand broken'
    assert line["role"] == "proposer" and line["request_id"] == ID
    assert line["logger"] == "services.serve.version_watcher"
    assert line["time"].endswith("+00:00")


def test_serves_own_logger_is_left_alone(written: Path) -> None:
    """A handler at the root would write each of Serve's and Ray's lines a second time."""
    assert not any(
        isinstance(h, logging.FileHandler) and str(written) in h.baseFilename
        for h in [*logging.getLogger().handlers, *logging.getLogger("ray.serve").handlers]
    )
