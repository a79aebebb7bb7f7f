"""The gateway's gRPC server before a scripted proposer, in this process: the contract that clients
see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from s2t_shared.decode.engine import EngineLoad
from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.errors import ConfigError, OverloadedError, ProposerLostError
from s2t_shared.labels.stream import LabelStream
from s2t_shared.pb.v1 import admin_pb2, admin_pb2_grpc
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import wire
from services.serve.proposer_service import ProposerService
from tests.helpers.serving import (
    LLM_TEXT,
    SLM_TEXT,
    UNSURE_AT,
    FixedVersions,
    becomes,
    gateway,
    gateway_config,
    local_selector,
    proposer_service,
    scripted_slm,
    slow_slm,
)

Work = Callable[[pb_grpc.GenerationServiceStub, grpc.aio.Channel], Awaitable[Any]]
PROMPT = "a secret prompt"


def call(folder: Path, service: Any, work: Work, **settings: Any) -> Any:
    """The result of asynchronous work with a stub of the gateway before `service`."""

    async def main() -> Any:
        async with gateway(gateway_config(folder, **settings), service) as channel:
            return await work(pb_grpc.GenerationServiceStub(channel), channel)

    try:
        return asyncio.run(main())
    finally:
        if isinstance(service, ProposerService):
            service.close()


def parameters(**fields: Any) -> pb.GenerationParameters:
    defaults = {"text": PROMPT, "mode": pb.MODE_S2T, "threshold": 0.3, "return_steps": True}
    return pb.GenerationParameters(**{**defaults, **fields})


async def generate(stub: pb_grpc.GenerationServiceStub, **fields: Any) -> pb.Answer:
    request_id = fields.pop("request_id", "r")
    request = pb.GenerateRequest(request_id=request_id, parameters=parameters(**fields))
    response = await stub.Generate(request)
    assert response.request_id == request_id
    return response.answer


async def stream(
    stub: pb_grpc.GenerationServiceStub, stream_steps: bool = False, **fields: Any
) -> list[pb.StreamGenerateResponse]:
    request = pb.StreamGenerateRequest(
        request_id="r", parameters=parameters(**fields), stream_steps=stream_steps
    )
    return [piece async for piece in stub.StreamGenerate(request)]


# -- answers --------------------------------------------------------------------------------------


def test_an_answer_in_one_message(tmp_path: Path) -> None:
    answer: pb.Answer = call(tmp_path, proposer_service(), lambda stub, _: generate(stub))
    assert answer.text == LLM_TEXT and answer.finish_reason == pb.FINISH_REASON_STOP
    assert [step.index for step in answer.steps] == list(UNSURE_AT)
    assert all(
        step.chosen_by == pb.CHOSEN_BY_LLM and len(step.scores) == 2 for step in answer.steps
    )
    assert answer.usage.triggers == answer.usage.flips == answer.usage.llm_forwards == 2


def test_the_deployments_defaults_fill_what_a_request_leaves_out(tmp_path: Path) -> None:
    async def bare(stub: pb_grpc.GenerationServiceStub, _: grpc.aio.Channel) -> pb.GenerateResponse:
        request = pb.GenerateRequest(parameters=pb.GenerationParameters(text=PROMPT))
        return await stub.Generate(request)

    settings = {"defaults.mode": "greedy", "defaults.max_new_tokens": 2}
    response: pb.GenerateResponse = call(tmp_path, proposer_service(), bare, **settings)
    assert response.answer.text == " one two" and response.request_id


def test_a_stream_carries_text_and_at_last_the_answer(tmp_path: Path) -> None:
    pieces: list[pb.StreamGenerateResponse]
    pieces = call(tmp_path, proposer_service(), lambda stub, _: stream(stub))
    assert "".join(piece.text for piece in pieces) == pieces[-1].answer.text == LLM_TEXT
    assert not any(piece.HasField("answer") for piece in pieces[:-1])
    assert not any(piece.steps for piece in pieces)


def test_a_stream_carries_the_steps_as_they_are_decided(tmp_path: Path) -> None:
    """In order, each once, with their text; the triggered ones equal the finished answer's."""
    pieces: list[pb.StreamGenerateResponse]
    pieces = call(tmp_path, proposer_service(), lambda stub, _: stream(stub, stream_steps=True))
    answer = pieces[-1].answer
    steps = [step for piece in pieces for step in piece.steps]
    assert [step.index for step in steps] == list(range(len(answer.token_ids)))
    assert [step.token_id for step in steps] == list(answer.token_ids)
    assert "".join(step.text for step in steps) == answer.text
    assert [step for step in steps if step.triggered] == list(answer.steps) != []


def test_steps_come_while_the_answer_is_decoded(tmp_path: Path) -> None:
    async def first(stub: pb_grpc.GenerationServiceStub, _: grpc.aio.Channel) -> Any:
        request = pb.StreamGenerateRequest(parameters=parameters(), stream_steps=True)
        streaming = stub.StreamGenerate(request)
        piece = await streaming.read()
        streaming.cancel()
        return piece

    piece: pb.StreamGenerateResponse = call(tmp_path, proposer_service(slow_slm()), first)
    assert 1 <= len(piece.steps) < 200 and not piece.HasField("answer")


def test_labels_come_back_when_they_are_collected(tmp_path: Path) -> None:
    labels = pb.LabelOptions(collect=True, task="t")
    answer = call(tmp_path, proposer_service(), lambda stub, _: generate(stub, labels=labels))
    assert b'"task":"t"' in answer.rollout and answer.labels_stored == 0


def test_a_lost_llm_degrades_answers(tmp_path: Path) -> None:
    service = proposer_service(scripted_slm(), ScriptedSelector(available=False))
    answer: pb.Answer = call(tmp_path, service, lambda stub, _: generate(stub))
    assert answer.text == SLM_TEXT and answer.usage.degraded_steps == 2
    assert all("away" in step.degraded for step in answer.steps)


def test_the_canary_gets_its_requests(tmp_path: Path) -> None:
    """The same request id gets the same version on a retry; a named version is kept."""
    versions = FixedVersions(
        live=local_selector("v1"), on_trial=local_selector("v2"), canary_ids=frozenset("b")
    )

    async def ask(stub: pb_grpc.GenerationServiceStub, _: grpc.aio.Channel) -> list[str]:
        found = []
        for request_id, fields in (("a", {}), ("b", {}), ("b", {}), ("b", {"version": "v1"})):
            mode = {"mode": pb.MODE_S2T_LOCAL, "request_id": request_id}
            answer = await generate(stub, **mode, **fields)
            found.append(answer.versions.local_selector)
        return found

    served_by = call(tmp_path, proposer_service(versions=versions), ask)
    assert served_by == ["v1", "v2", "v2", "v1"]


def test_the_service_describes_itself(tmp_path: Path) -> None:
    async def describe(stub: pb_grpc.GenerationServiceStub, _: grpc.aio.Channel) -> Any:
        return await stub.DescribeService(pb.DescribeServiceRequest())

    service = proposer_service(versions=FixedVersions(live=local_selector("v1")))
    description = call(tmp_path, service, describe)
    assert (description.slm_digest, description.llm_digest) == ("scripted", "scripted")
    assert (description.live_version, description.proposers) == ("v1", 1)
    assert list(description.calibrated_triggers) == [pb.TRIGGER_ENTROPY]


# -- errors ---------------------------------------------------------------------------------------

REFUSED = {
    "no prompt": ({"text": ""}, "INVALID_ARGUMENT", "no tokens"),
    "no candidates": ({"candidates": 0}, "INVALID_ARGUMENT", "candidates=0: must be 1..64"),
    "too many candidates": ({"candidates": 65}, "INVALID_ARGUMENT", "candidates=65"),
    "budget": ({"budget": 1.5}, "INVALID_ARGUMENT", "budget=1.5"),
    "threshold": ({"threshold": float("nan")}, "INVALID_ARGUMENT", "threshold=nan"),
    "no new tokens": ({"max_new_tokens": 0}, "INVALID_ARGUMENT", "max_new_tokens=0"),
    "samples": ({"samples": 65, "mode": pb.MODE_MAJORITY}, "INVALID_ARGUMENT", "samples=65"),
    "top_p": ({"sampling": pb.Sampling(top_p=0.0)}, "INVALID_ARGUMENT", "top_p=0"),
    "empty stop string": ({"stop": [""]}, "INVALID_ARGUMENT", "stop"),
    "unknown mode": ({"mode": 99}, "INVALID_ARGUMENT", "mode=99: unknown"),
    "unknown version": ({"version": "v9"}, "NOT_FOUND", "v9"),
    "nothing live": ({"mode": pb.MODE_S2T_LOCAL}, "NOT_FOUND", "no local selector is live"),
    "evaluation split": (
        {"labels": pb.LabelOptions(store=True, split="test")},
        "INVALID_ARGUMENT",
        "evaluation split",
    ),
    "no Redis": (
        {"labels": pb.LabelOptions(store=True, durable=True)},
        "FAILED_PRECONDITION",
        "no Redis",
    ),
    "uncalibrated trigger": (
        {"budget": 0.1, "trigger": pb.TRIGGER_MARGIN},
        "FAILED_PRECONDITION",
        "no calibrated thresholds",
    ),
    "deadline": ({"timeout_seconds": 1e-5}, "DEADLINE_EXCEEDED", "deadline"),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("case", REFUSED)
def test_each_bad_request_has_its_status(tmp_path: Path, case: str, streamed: bool) -> None:
    """The text says what is wrong; nothing of the prompt or of our insides shows."""
    fields, status, message = REFUSED[case]
    ask = stream if streamed else generate
    error = refusal(tmp_path, proposer_service(), lambda stub, _: ask(stub, **fields))
    assert error.code() is grpc.StatusCode[status] and message in error.details()
    for secret in ("Traceback", "/", "actor", "ray", PROMPT):
        assert secret not in error.details()
    field = wire.error_of(error).field
    assert (field != "") == (status == "INVALID_ARGUMENT" and case != "evaluation split")
    assert not field or field.rpartition(".")[2] in error.details()


def refusal(folder: Path, service: Any, work: Work, **settings: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        call(folder, service, work, **settings)
    return caught.value


def test_mode_llm_without_an_llm_is_unavailable(tmp_path: Path) -> None:
    service = proposer_service(scripted_slm(), ScriptedSelector(available=False))
    error = refusal(tmp_path, service, lambda stub, _: generate(stub, mode=pb.MODE_LLM))
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "mode llm" in error.details()


def test_too_many_requests_are_refused(tmp_path: Path) -> None:
    async def overload(stub: pb_grpc.GenerationServiceStub, _: grpc.aio.Channel) -> Any:
        streaming = stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters()))
        await streaming.read()
        try:
            await generate(stub)
        finally:
            streaming.cancel()

    error = refusal(tmp_path, proposer_service(slow_slm(), max_ongoing_requests=1), overload)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "try again" in error.details()
    retry_after_s = wire.error_of(error).retry_after_s
    assert retry_after_s is not None and retry_after_s > 0


class FailingProposers:
    """Fails every request with the same error, at once or after a first piece."""

    def __init__(self, error: Exception, pieces: int = 0) -> None:
        self._error = error
        self._pieces = pieces

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        for _ in range(self._pieces):
            yield AnswerPiece("piece")
        raise self._error

    async def answer(self, request: GenerateRequest) -> Answer:
        raise self._error

    async def describe(self) -> ServiceDescription:
        return ServiceDescription(
            slm_digest="s", tokenizer_digest="t", template_digest="", llm_digest="", max_length=9
        )

    async def count_dropped_labels(self) -> int:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyError("/secret/path"), "INTERNAL", "in the service's log"),
        (ProposerLostError("send the request again"), "UNAVAILABLE", "send the request again"),
        (OverloadedError("all proposers are busy"), "RESOURCE_EXHAUSTED", "busy"),
    ],
)
@pytest.mark.parametrize("pieces", [None, 0, 1], ids=["unary", "stream", "in the middle"])
def test_what_goes_wrong_inside_has_its_status(
    tmp_path: Path, error: Exception, status: str, message: str, pieces: int | None
) -> None:
    """A bug shows nothing of our insides, only that there is one."""
    ask = generate if pieces is None else stream
    proposers = FailingProposers(error, pieces or 0)
    found = refusal(tmp_path, proposers, lambda stub, _: ask(stub), **{"gateway.max_resumes": 0})
    assert found.code() is grpc.StatusCode[status] and message in found.details()
    assert "secret" not in found.details() and "KeyError" not in found.details()


def test_our_own_clients_get_the_error_that_was_raised(tmp_path: Path) -> None:
    error = refusal(tmp_path, proposer_service(), lambda stub, _: generate(stub, version="v9"))
    assert type(wire.error_of(error)).__name__ == "VersionNotFoundError"


# -- clients that leave ---------------------------------------------------------------------------


async def cancel_stream(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
    streaming = stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters()))
    await streaming.read()
    streaming.cancel()


async def disconnect(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
    streaming = stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters()))
    await streaming.read()
    await channel.close()


async def cancel_unary(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
    calling = stub.Generate(pb.GenerateRequest(parameters=parameters()))
    await asyncio.sleep(0.05)
    calling.cancel()


async def miss_the_deadline(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(parameters=parameters()), timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "leave", [cancel_stream, disconnect, cancel_unary, miss_the_deadline], ids=lambda f: f.__name__
)
def test_an_answer_that_nobody_waits_for_is_stopped(tmp_path: Path, leave: Work) -> None:
    """Batch and KV are free within 250 ms, far before the answer's end."""
    service = proposer_service(slow_slm())

    async def leave_it(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        await leave(stub, channel)
        assert await becomes(lambda: service.load == EngineLoad(0, 0, 0), 0.25), service.load
        assert await becomes(lambda: service.ongoing_requests == 0, 0.25)

    call(tmp_path, service, leave_it)


# -- the rest of the door -------------------------------------------------------------------------


def test_health_and_reflection(tmp_path: Path) -> None:
    """What load balancers and grpcurl ask."""

    async def ask(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        checking = health_pb2_grpc.HealthStub(channel)
        for name in ("", "s2t.v1.GenerationService", "s2t.v1.AdminService"):
            state = await checking.Check(health_pb2.HealthCheckRequest(service=name))
            assert state.status == health_pb2.HealthCheckResponse.SERVING
        reflecting = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        async for listed in reflecting.ServerReflectionInfo(iter([asked])):
            names = {service.name for service in listed.list_services_response.service}
        assert {"s2t.v1.GenerationService", "s2t.v1.AdminService"} <= names
        assert "grpc.health.v1.Health" in names

    call(tmp_path, proposer_service(), ask)


def test_large_messages_are_refused(tmp_path: Path) -> None:
    error = refusal(
        tmp_path,
        proposer_service(),
        lambda stub, _: generate(stub, text="x" * 5000),
        **{"gateway.max_message_bytes": 2000},
    )
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "method",
    [
        "s2t.v1.GenerationService/Generate",
        "s2t.v1.GenerationService/StreamGenerate",
        "s2t.v1.AdminService/RollbackVersion",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
    ],
)
def test_what_cannot_be_decoded_is_the_clients_mistake(tmp_path: Path, method: str) -> None:
    """It was UNKNOWN, with the class of the decoder's error."""

    async def send(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        if method.rpartition("/")[2] in ("StreamGenerate", "Watch"):
            await channel.unary_stream(f"/{method}")(b"\xff\xff\xff\x01").read()
        else:
            await channel.unary_unary(f"/{method}")(b"\xff\xff\xff\x01")

    error = refusal(tmp_path, proposer_service(), send)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be decoded" in error.details() and "class" not in error.details()


def test_without_redis_there_are_no_labels_to_count(tmp_path: Path) -> None:
    async def count(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> Any:
        return await admin_pb2_grpc.AdminServiceStub(channel).CountLabels(
            admin_pb2.CountLabelsRequest()
        )

    error = refusal(tmp_path, proposer_service(), count)
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "redis.url" in error.details()


def test_where_redis_is_stays_inside(tmp_path: Path) -> None:
    """CountLabels told clients host and port of a Redis that was away."""

    async def main() -> str:
        config = gateway_config(tmp_path)
        service = proposer_service()
        stream = LabelStream("redis://127.0.0.1:1/0")
        async with gateway(config, service, stream) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await admin.CountLabels(admin_pb2.CountLabelsRequest())
        service.close()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert wire.error_of(caught.value).retry_after_s == 1.0
        return str(caught.value.details())

    text = asyncio.run(main())
    assert "Redis" in text and "127.0.0.1" not in text and ":1" not in text


def test_an_empty_registry_over_the_wire(tmp_path: Path) -> None:
    async def ask(stub: pb_grpc.GenerationServiceStub, channel: grpc.aio.Channel) -> None:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        assert not (await admin.ListVersions(admin_pb2.ListVersionsRequest())).versions
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await admin.PromoteVersion(admin_pb2.PromoteVersionRequest(name="v9"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as nothing:
            await admin.RollbackVersion(admin_pb2.RollbackVersionRequest())
        assert nothing.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    call(tmp_path, proposer_service(), ask)


def test_a_taken_port_is_an_error_of_the_operator(tmp_path: Path) -> None:
    service = proposer_service()

    async def main() -> None:
        other = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match=r"the port is taken.*gateway\.port"):
            async with gateway(gateway_config(tmp_path, **{"gateway.port": port}), service):
                pass
        other.close()

    asyncio.run(main())
    service.close()
