"""The Python client against a real gateway over a scripted pair."""

from __future__ import annotations

import asyncio
import doctest
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

import services.client
from s2t_shared.config import SecurityConfig
from s2t_shared.errors import (
    InvalidRequestError,
    ServiceUnavailableError,
    StoreError,
    VersionError,
    VersionNotFoundError,
)
from s2t_shared.pb.v1 import admin_pb2, admin_pb2_grpc
from s2t_shared.types import AnswerPiece, FinishReason, LabelCounts, Prompt, Trigger
from services.client import Client
from services.rpc import channels
from tests.helpers.serving import LLM_TEXT, proposer_service, slow_slm, with_gateway

S2T: dict[str, Any] = {"mode": "s2t", "trigger": "entropy", "threshold": 0.3}


def test_an_answer_is_our_own_type(tmp_path: Path) -> None:
    def work(address: str) -> None:
        with Client(address) as client:
            answer = client.generate("a prompt", return_steps=True, **S2T)
            assert answer.text == LLM_TEXT
            assert answer.finish_reason is FinishReason.STOP
            assert [step.triggered for step in answer.steps] == [True, True]
            assert answer.usage.flips == 2
            assert not client.generate("a prompt", **S2T).steps

    with_gateway(tmp_path, proposer_service(), work)


def test_every_form_of_prompt(tmp_path: Path) -> None:
    def work(address: str) -> None:
        with Client(address) as client:
            for prompt in ("a prompt", Prompt(text="a prompt"), [5, 6]):
                assert client.generate(prompt, **S2T).text == LLM_TEXT

    with_gateway(tmp_path, proposer_service(), work)


def test_pieces_join_to_the_answer(tmp_path: Path) -> None:
    """Every Step comes once, in order, and its text is in the text."""

    def work(address: str) -> list[AnswerPiece]:
        with Client(address) as client:
            return list(client.stream("a prompt", stream_steps=True, **S2T))

    pieces = with_gateway(tmp_path, proposer_service(), work)
    answer = pieces[-1].answer
    assert answer is not None and answer.text == LLM_TEXT
    assert all(piece.answer is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == LLM_TEXT
    steps = [step for piece in pieces for step in piece.steps]
    assert tuple(step.token_id for step in steps) == answer.token_ids
    assert "".join(step.text for step in steps) == LLM_TEXT


def test_leaving_a_stream_cancels_the_answer(tmp_path: Path) -> None:
    def work(address: str) -> int:
        with Client(address) as client:
            for _ in client.stream("a prompt", mode="greedy", max_new_tokens=3000):
                assert client.describe().running_sequences == 1
                break
            deadline = time.monotonic() + 5.0
            while client.describe().running_sequences and time.monotonic() < deadline:
                time.sleep(0.01)
            return client.describe().running_sequences

    assert with_gateway(tmp_path, proposer_service(slow_slm()), work) == 0


def test_failures_are_our_own_errors(tmp_path: Path) -> None:
    def work(address: str) -> None:
        with Client(address) as client:
            with pytest.raises(InvalidRequestError, match="candidates"):
                client.generate("a prompt", candidates=65, mode="s2t")
            with pytest.raises(InvalidRequestError, match="candidates"):
                list(client.stream("a prompt", candidates=65, mode="s2t"))
            with pytest.raises(InvalidRequestError, match="colour"):
                client.generate("a prompt", colour="red")
            with pytest.raises(VersionNotFoundError, match="v9"):
                client.promote("v9")
            with pytest.raises(VersionError):
                client.rollback()

    with_gateway(tmp_path, proposer_service(), work)


def test_a_service_that_is_not_there_is_named() -> None:
    with (
        Client("127.0.0.1:1", timeout_s=5) as client,
        pytest.raises(ServiceUnavailableError, match="cannot be reached"),
    ):
        client.describe()


def test_what_a_service_says_of_itself(tmp_path: Path) -> None:
    def work(address: str) -> None:
        with Client(address) as client:
            description = client.describe()
            assert description.calibrated_triggers == (Trigger.ENTROPY,)
            assert description.live_version == "" and description.slm_digest
            assert client.versions() == []
            with pytest.raises(StoreError, match="no Redis is configured"):
                client.count_labels()

    with_gateway(tmp_path, proposer_service(), work)


class RecordingAdmin(admin_pb2_grpc.AdminServiceServicer):
    """Keeps the messages that it gets."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def ListVersions(self, message: Any, context: Any) -> Any:
        version = admin_pb2.Version(name="v1", live=True, share=0.9, metrics={"agree_at_1": 0.5})
        return admin_pb2.ListVersionsResponse(versions=[version])

    async def PromoteVersion(self, message: Any, context: Any) -> Any:
        self.messages.append(message)
        return admin_pb2.PromoteVersionResponse(live="v1")

    async def RollbackVersion(self, message: Any, context: Any) -> Any:
        self.messages.append(message)
        return admin_pb2.RollbackVersionResponse(live="v0")

    async def CountLabels(self, message: Any, context: Any) -> Any:
        self.messages.append(message)
        return admin_pb2.CountLabelsResponse(queued=1, in_lake=2, dead_letters=3, dropped=4)


def test_admin_calls_carry_what_was_asked() -> None:
    """An unset share is not a share of 0."""
    admin = RecordingAdmin()
    security = SecurityConfig()

    def work(address: str) -> None:
        with Client(address) as client:
            assert client.promote("v2", share=0.25) == "v1"
            assert client.promote("v2") == "v1"
            assert client.rollback() == "v0"
            assert client.count_labels(flush=True) == LabelCounts(1, 2, 3, 4)
            (version,) = client.versions()
            assert version.name == "v1" and version.live and version.share == 0.9
            assert version.metrics == {"agree_at_1": 0.5}

    async def main() -> None:
        server: grpc.aio.Server = channels.new_server(security)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        port = channels.bind(server, "127.0.0.1", 0, security, "test.port")
        await server.start()
        await asyncio.to_thread(work, f"127.0.0.1:{port}")
        await server.stop(0)

    asyncio.run(main())
    canary, live, _, count = admin.messages
    assert canary.name == live.name == "v2"
    assert canary.share == 0.25 and not live.HasField("share")
    assert count.flush


def test_the_example_of_the_docstring_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert services.client.__doc__ is not None
    examples = doctest.DocTestParser().get_examples(services.client.__doc__)
    assert len(examples) == 2
    example = examples[1]

    def work(address: str) -> None:
        source = example.source.replace("127.0.0.1:50051", address)
        assert address in source
        exec(source, {"Client": Client})

    with_gateway(tmp_path, proposer_service(), work)
    assert capsys.readouterr().out == LLM_TEXT
