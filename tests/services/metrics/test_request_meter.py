"""What a gateway counts of requests: how they end, how long they take, and why they are refused."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from s2t_shared.errors import ProposerLostError, S2TError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.requests import new_request
from services.metrics.registry import Registry
from services.metrics.table import Role
from services.rpc import channels
from services.serve.gateway_server import GatewayServer
from services.serve.request_meter import RequestMeter, label_store_readings
from services.serve.resuming_proposers import ResumingProposers
from tests.helpers.redis import client, server, shared_server, store  # noqa: F401
from tests.helpers.serving import (
    becomes,
    gateway_config,
    gateway_server,
    http_gateway,
    proposer_service,
    scripted_llm,
    scripted_slm,
    slow_slm,
)
from tests.services.metrics.scrape import Scrape

TOKEN = "generate-0123456789abcdef"


def parameters(mode: Any = pb.MODE_GREEDY, **values: Any) -> pb.GenerationParameters:
    return pb.GenerationParameters(**{"text": "a b", "mode": mode, "max_new_tokens": 64, **values})


async def generate(
    gateway: GatewayServer, asked: pb.GenerationParameters, token: str = "", **call: Any
) -> str:
    """The status that a call ends with."""
    metadata = channels.call_metadata(token)
    async with channels.open_channel(f"127.0.0.1:{gateway.port}", None) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        try:
            message = pb.StreamGenerateRequest(parameters=asked)
            async for _ in stub.StreamGenerate(message, metadata=metadata, **call):
                pass
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def with_gateway(
    folder: Path, work: Callable[[GatewayServer], Any], service: Any = None, **settings: Any
) -> Scrape:
    """What the gateway has counted after `work`."""
    service = service or proposer_service()

    async def main() -> Scrape:
        async with gateway_server(gateway_config(folder, **settings), service) as gateway:
            await work(gateway)
            return Scrape.now(gateway.registry)

    try:
        return asyncio.run(main())
    finally:
        service.close()


def test_answers_by_mode_and_end(tmp_path: Path) -> None:
    async def work(gateway: GatewayServer) -> None:
        assert await generate(gateway, parameters()) == "OK"
        assert await generate(gateway, parameters(pb.MODE_S2T, max_new_tokens=3)) == "OK"

    found = with_gateway(tmp_path, work)
    assert found.sum("s2t_requests_total", mode="greedy", status="OK") == 1
    assert found.sum("s2t_requests_total", mode="s2t", status="OK") == 1
    assert found.sum("s2t_finished_answers_total", finish_reason="stop") == 1
    assert found.sum("s2t_finished_answers_total", finish_reason="length") == 1
    assert found.sum("s2t_request_duration_seconds_count") == 2
    assert found.sum("s2t_requests_in_progress") == 0
    assert found.sum("s2t_refusals_total") == 0 and found.sum("s2t_ready") == 1


def test_refusals_by_reason(tmp_path: Path) -> None:
    """Those of the gateway's own checks, of a proposer, and of a missing token."""
    file = tmp_path / "tokens"
    file.write_text(f"generate: {TOKEN}\n")

    async def work(gateway: GatewayServer) -> None:
        assert await generate(gateway, parameters()) == "UNAUTHENTICATED"
        bad = parameters(max_new_tokens=10**6)
        assert await generate(gateway, bad, TOKEN) == "INVALID_ARGUMENT"
        missing = parameters(pb.MODE_S2T_LOCAL, version="nonesuch")
        assert await generate(gateway, missing, TOKEN) == "NOT_FOUND"

    found = with_gateway(tmp_path, work, **{"security.token_file": str(file)})
    for reason in ("UNAUTHENTICATED", "INVALID_REQUEST", "VERSION_NOT_FOUND"):
        assert found.sum("s2t_refusals_total", reason=reason) == 1, reason
    assert found.sum("s2t_refusals_total") == 3
    assert found.sum("s2t_requests_total", mode="s2t_local", status="NOT_FOUND") == 1
    assert found.sum("s2t_requests_total") == 1, "the others reached no proposer"


def test_a_message_that_cannot_be_read(tmp_path: Path) -> None:
    """No handler ever sees it."""

    async def work(gateway: GatewayServer) -> None:
        method = f"/{pb.DESCRIPTOR.services_by_name['GenerationService'].full_name}/Generate"
        async with channels.open_channel(f"127.0.0.1:{gateway.port}", None) as channel:
            call = channel.unary_unary(method, request_serializer=bytes)
            with pytest.raises(grpc.RpcError):
                await call(b"\xff\xff")

    found = with_gateway(tmp_path, work)
    assert found.sum("s2t_refusals_total", reason="INVALID_REQUEST") == 1
    assert found.sum("s2t_refusals_total") == 1


def test_a_client_that_goes_away(tmp_path: Path) -> None:
    async def work(gateway: GatewayServer) -> None:
        task = asyncio.create_task(generate(gateway, parameters(max_new_tokens=4000)))

        def in_progress() -> float:
            return Scrape.now(gateway.registry).sum("s2t_requests_in_progress")

        assert await becomes(lambda: in_progress() == 1)
        task.cancel()
        assert await becomes(lambda: in_progress() == 0)

    found = with_gateway(tmp_path, work, proposer_service(slow_slm()))
    assert found.sum("s2t_requests_total", status="CANCELLED") == 1
    assert found.sum("s2t_finished_answers_total") == 0


def http_status(url: str, body: dict[str, Any] | None = None) -> int:
    content = json.dumps(body).encode() if body is not None else None
    asked = urllib.request.Request(url, content, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_http_counts_beside_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[GatewayServer] = []
    start = GatewayServer.start

    async def remember(self: GatewayServer) -> None:
        made.append(self)
        await start(self)

    monkeypatch.setattr(GatewayServer, "start", remember)
    with http_gateway(tmp_path, proposer_service()) as url:
        body = {"model": "bundled:greedy", "prompt": "a b", "max_tokens": 5}
        assert http_status(f"{url}/v1/completions", body) == 200
        assert http_status(f"{url}/v1/completions", {**body, "temperature": "warm"}) == 400
        assert http_status(f"{url}/metrics") == 404, "not on the clients' port"
    found = Scrape.now(made[0].registry)
    assert found.sum("s2t_requests_total", mode="greedy", status="OK") == 1
    assert found.sum("s2t_refusals_total", reason="INVALID_REQUEST") == 1


def test_a_gateway_that_stops_says_so(tmp_path: Path) -> None:
    async def work(gateway: GatewayServer) -> None:
        assert Scrape.now(gateway.registry).sum("s2t_draining") == 0
        await gateway.stop(grace_s=0.0)

    assert with_gateway(tmp_path, work).sum("s2t_draining") == 1


def test_handovers_are_counted() -> None:
    """Deaths of proposers that no client sees are what one wants to know of."""

    class Dying:
        deaths = 2

        async def answer(self, request: Any) -> str:
            if self.deaths:
                self.deaths -= 1
                raise ProposerLostError("gone")
            return "answer"

    proposers = ResumingProposers(Dying())  # type: ignore[arg-type]
    asyncio.run(proposers.answer(new_request("a", "greedy")))
    assert proposers.handovers == 2


def test_the_label_store(store: LabelStream) -> None:  # noqa: F811
    """Queue and lag while nobody drains, and that Redis is away when it is."""

    def now() -> Scrape:
        registry = Registry(Role.GATEWAY)
        registry.add(lambda: label_store_readings(store))
        return Scrape.now(registry)

    found = now()
    assert found.sum("s2t_label_store_up") == 1 and found.sum("s2t_label_lag_seconds") == 0
    store.append([b"{}", b"{}"])
    time.sleep(0.05)
    found = now()
    assert found.sum("s2t_label_queue_rollouts") == 2
    assert 0.04 < found.sum("s2t_label_lag_seconds") < 60
    [entry, _] = (store.create_group(), store.read("c", 2, 0))[1]
    store.dead_letter(entry, "a test")
    assert now().sum("s2t_label_dead_letters") == 1


def test_a_label_store_that_is_away() -> None:
    registry = Registry(Role.GATEWAY)
    away = LabelStream("redis://127.0.0.1:1/0")
    registry.add(lambda: label_store_readings(away))
    found = Scrape.now(registry)
    assert found.sum("s2t_label_store_up") == 0
    assert "s2t_label_store_up" in found.labels and "s2t_label_lag_seconds" not in found.labels


def test_an_overloaded_proposer_is_a_refusal(tmp_path: Path) -> None:
    slm = scripted_slm()
    full = proposer_service(slm, scripted_llm(slm), max_ongoing_requests=0)

    async def work(gateway: GatewayServer) -> None:
        assert await generate(gateway, parameters()) == "RESOURCE_EXHAUSTED"

    found = with_gateway(tmp_path, work, full)
    assert found.sum("s2t_refusals_total", reason="OVERLOADED") == 1


def test_an_error_that_nobody_expected_is_internal() -> None:
    registry = Registry(Role.GATEWAY)
    meter = RequestMeter(registry)
    meter.refused(ZeroDivisionError("x"))
    meter.refused(S2TError("x"))
    assert Scrape.now(registry).sum("s2t_refusals_total", reason="INTERNAL") == 2
