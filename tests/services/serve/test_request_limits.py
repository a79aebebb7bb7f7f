"""Limits at the border: one more than each is refused with the field's name, before any work."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.config import GatewayConfig, load_config
from s2t_shared.errors import ConfigError, DeadlineExceededError, InvalidRequestError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from services.rpc import wire
from services.serve import request_limits
from services.serve.intake import Intake
from services.serve.request_limits import RequestLimits
from tests.helpers.serving import gateway, gateway_config, proposer_service, scripted_slm, slow_slm

LIMITS = RequestLimits(GatewayConfig(max_prompt_bytes=100, max_new_tokens=50, max_samples=4))
NAME = 1024 * "x"


def messages(count: int, content: str = "", role: str = "user") -> pb.Messages:
    return pb.Messages(messages=[pb.Message(role=role, content=content)] * count)


def rules(count: int) -> pb.LabelOptions:
    return pb.LabelOptions(rules=[pb.LabelRule(trigger=pb.TRIGGER_KL, threshold=1.0)] * count)


def triggers(count: int) -> pb.LabelOptions:
    return pb.LabelOptions(triggers=[pb.TRIGGER_KL] * count)


def test_what_arrives_too_late_is_not_looked_at(tmp_path: Path) -> None:
    """Its caller has gone, whatever is wrong with it."""
    intake = Intake(gateway_config(tmp_path))
    with pytest.raises(DeadlineExceededError, match="when it arrived"):
        intake.read(pb.GenerateRequest(), "client", time_left_s=0.0)


def test_names_are_not_looked_at_before_they_are_counted() -> None:
    """Two million messages were: for a second, on the gateway's only loop."""

    class Uncounted(Exception):
        pass

    def never(message: object) -> Any:
        raise Uncounted

    many = pb.GenerateRequest(parameters=pb.GenerationParameters(messages=messages(1025)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_limits, "_names", never)
        with pytest.raises(InvalidRequestError, match="1025 given, at most 1024"):
            LIMITS.check(many)


# field: (the most that is accepted, one more, what the text says)
AT_THE_LIMIT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text": ({"text": 50 * "ü"}, {"text": 50 * "ü" + "u"}, "101 bytes, at most 100"),
    "messages": (
        {"messages": messages(4, 25 * "x")},
        {"messages": messages(5, 25 * "x")},
        "125 bytes, at most 100",
    ),
    "token_ids": (
        {"token_ids": pb.TokenIds(ids=[1] * 25)},
        {"token_ids": pb.TokenIds(ids=[1] * 26)},
        "104 bytes, at most 100",
    ),
    "max_new_tokens": ({"max_new_tokens": 50}, {"max_new_tokens": 51}, "=51: must be 1..50"),
    "samples": ({"samples": 4}, {"samples": 5}, "=5: must be 1..4"),
    "version": ({"version": NAME}, {"version": NAME + "x"}, "1025 characters, at most 1024"),
    "labels.rules": ({"labels": rules(16)}, {"labels": rules(17)}, "17 given, at most 16"),
    "labels.triggers": ({"labels": triggers(16)}, {"labels": triggers(17)}, "17 given"),
    "messages.role": (
        {"messages": messages(1, role=NAME)},
        {"messages": messages(1, role=NAME + "x")},
        "1025 characters",
    ),
    "stop": ({"stop": ["x"] * 16}, {"stop": ["x"] * 17}, "17 given, at most 16"),
    "timeout_seconds": ({"timeout_seconds": 1e9}, {"timeout_seconds": -1.0}, "=-1.0: must be 0"),
}
AT_THE_LIMIT |= {
    f"labels.{name}": (
        {"labels": pb.LabelOptions(**{name: NAME})},
        {"labels": pb.LabelOptions(**{name: NAME + "x"})},
        "1025 characters",
    )
    for name in ("task", "problem_id", "group", "split")
}


def parameters(**fields: Any) -> pb.GenerationParameters:
    prompt = {} if fields.keys() & {"text", "messages", "token_ids"} else {"text": "x"}
    return pb.GenerationParameters(**prompt, **fields)


@pytest.mark.parametrize("field", AT_THE_LIMIT)
@pytest.mark.parametrize("kind", [pb.GenerateRequest, pb.StreamGenerateRequest])
def test_one_more_is_refused_and_the_limit_is_not(kind: Any, field: str) -> None:
    accepted, refused, text = AT_THE_LIMIT[field]
    LIMITS.check(kind(parameters=parameters(**accepted)))
    with pytest.raises(InvalidRequestError) as caught:
        LIMITS.check(kind(parameters=parameters(**refused)))
    assert caught.value.field == field and str(caught.value).startswith(field)
    assert text in str(caught.value)


def test_ids_and_long_conversations_are_bounded() -> None:
    LIMITS.check(pb.GenerateRequest(request_id=NAME, parameters=parameters()))
    with pytest.raises(InvalidRequestError, match="request_id: 1025 characters"):
        LIMITS.check(pb.GenerateRequest(request_id=NAME + "x", parameters=parameters()))
    with pytest.raises(InvalidRequestError, match="messages: 1025 given, at most 1024"):
        LIMITS.check(pb.GenerateRequest(parameters=parameters(messages=messages(1025))))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -0.5])
def test_a_timeout_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match="timeout_seconds"):
        LIMITS.check(pb.GenerateRequest(parameters=parameters(timeout_seconds=seconds)))


def test_every_text_of_a_request_has_a_limit() -> None:
    """A field that is added to the contract must get one, too."""
    known = {"request_id", "version", "text", "stop", "role", "content"}
    known |= {"task", "problem_id", "group", "split"}
    assert texts(pb.StreamGenerateRequest.DESCRIPTOR) == known
    assert texts(pb.GenerateRequest.DESCRIPTOR) == known


def texts(descriptor: Any) -> set[str]:
    found = set()
    for field in descriptor.fields:
        if field.message_type is not None:
            found |= texts(field.message_type)
        elif field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            found.add(field.name)
    return found


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_long_prompt_costs_nobody_anything(tmp_path: Path, form: str) -> None:
    """A prompt of 4 MB was tokenized on the decode thread before its length was looked at: all
    streams stood still for seconds."""
    text = "many words " * 180_000  # 2 MB
    long = {"text": text} if form == "text" else {"messages": messages(1, text)}

    async def main() -> None:
        service = proposer_service(slow_slm())
        async with gateway(gateway_config(tmp_path), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            beside = stub.StreamGenerate(pb.StreamGenerateRequest(parameters=parameters()))
            await beside.read()
            request = pb.GenerateRequest(parameters=parameters(**long))
            started = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request)
            assert time.monotonic() - started < 0.5
            assert wire.error_of(caught.value).field == form
            assert "at most 1048576" in str(caught.value.details())
            beside.cancel()
        service.close()

    asyncio.run(main())


class NoTokenizer:
    digest = template_digest = ""

    def encode(self, prompt: Any) -> Any:
        raise AssertionError("tokenized")


def test_a_prompt_that_can_never_fit_is_not_tokenized(tmp_path: Path) -> None:
    """The proposer knows how much its SLM reads: a megabyte is too much for a small context."""
    slm = scripted_slm(max_length=100)
    service = proposer_service(slm)
    slm.tokenizer.encode = NoTokenizer().encode  # type: ignore[method-assign]

    async def main() -> str:
        async with gateway(gateway_config(tmp_path), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(parameters=parameters(text=3201 * "x")))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            return str(caught.value.details())

    text = asyncio.run(main())
    service.close()
    assert "3201 bytes" in text and "fit 100 tokens: more than 3200 bytes are not read" in text


def test_a_default_above_the_limit_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="defaults.max_new_tokens=9000 is more than"):
        load_config(overrides={"defaults.max_new_tokens": 9000}, environment={})


def test_what_is_out_of_range_does_not_reach_a_proposer(tmp_path: Path) -> None:
    """Ray would pickle a stop string of 3 MB for a proposer to refuse it."""
    service = proposer_service()

    async def answer(request: Any) -> Any:
        raise AssertionError("reached")

    service.answer = answer  # type: ignore[method-assign]

    async def main() -> None:
        async with gateway(gateway_config(tmp_path), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            for fields in ({"stop": [2_000_000 * "x"]}, {"sampling": pb.Sampling(top_p=2.0)}):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(pb.GenerateRequest(parameters=parameters(**fields)))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())
    service.close()
