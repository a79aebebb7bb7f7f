"""A prompt never reaches a log, however its request ends, and no error of ours quotes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from s2t_shared.decode.scripted import ScriptedTokenizer
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import Prompt
from tests.helpers.serving import (
    gateway,
    gateway_config,
    proposer_service,
    scripted_llm,
    scripted_slm,
)

CANARY = "canary-7f3a"
PROMPT = f"{CANARY} at 10.1.2.3:6379"


class QuotingTokenizer(ScriptedTokenizer):
    """As a library's may be: its error quotes what it was given."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        raise KeyError(f"no such token in {prompt}")


def quoting_service() -> Any:
    slm = scripted_slm()
    slm.tokenizer = QuotingTokenizer()
    return proposer_service(slm, scripted_llm(scripted_slm()))


def no_llm() -> Any:
    slm = scripted_slm()
    return proposer_service(slm, scripted_llm(slm, available=False))


CHAT = pb.Messages(messages=[pb.Message(role="user", content=PROMPT)])
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], grpc.StatusCode | None]] = {
    "answered": (proposer_service, {}, None),
    "chat": (proposer_service, {"messages": CHAT}, None),
    "no LLM": (no_llm, {"mode": pb.MODE_S2T, "threshold": 0.3}, None),
    "wrong": (proposer_service, {"samples": 99}, grpc.StatusCode.INVALID_ARGUMENT),
    "too long": (proposer_service, {"text": PROMPT * 60_000}, grpc.StatusCode.INVALID_ARGUMENT),
    "no Redis": (
        proposer_service,
        {"labels": pb.LabelOptions(store=True, durable=True), "mode": pb.MODE_S2T},
        None,
    ),
    "a library's error": (quoting_service, {}, grpc.StatusCode.INTERNAL),
}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("streamed", [False, True])
def test_no_prompt_reaches_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, streamed: bool
) -> None:
    """S8: an unexpected error was logged with its text, which may quote the prompt."""
    caplog.set_level(logging.DEBUG)
    make, fields, expected = CASES[case]
    service = make()
    given = {"text": PROMPT, "mode": pb.MODE_GREEDY, **fields}
    if "messages" in fields:
        del given["text"]
    parameters = pb.GenerationParameters(**given)

    async def main() -> tuple[grpc.StatusCode | None, str]:
        async with gateway(gateway_config(tmp_path), service) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            try:
                if streamed:
                    async for _ in stub.StreamGenerate(
                        pb.StreamGenerateRequest(parameters=parameters)
                    ):
                        pass
                else:
                    await stub.Generate(pb.GenerateRequest(parameters=parameters))
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details() or ""
        return None, ""

    try:
        code, details = asyncio.run(main())
    finally:
        service.close()
    if expected is not None:
        assert code is expected, details
    assert CANARY not in details
    ours = [r.getMessage() for r in caplog.records] + [caplog.text]
    assert not any(CANARY in text for text in ours)
