"""What clients repeat when the service is away, what they do not, and streams that break off."""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool

from s2t_shared.config import SecurityConfig
from s2t_shared.errors import (
    DeadlineExceededError,
    OverloadedError,
    ProposerLostError,
    S2TError,
    SelectorUnavailableError,
    ServiceUnavailableError,
    StoreError,
)
from s2t_shared.pb.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import AnswerPiece, Step
from services.client import AsyncClient, Client
from services.rpc import channels, retrying, wire
from services.rpc.repeated_stream import MAX_REPEATS, RepeatedStream
from tests.helpers.serving import LLM_TEXT, gateway_address, gateway_config, proposer_service

TEXT = ("one ", "two ", "three ", "four")


class Service(generation_pb2_grpc.GenerationServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """Fails its first calls with `errors`, in turn, streams after `pieces` of them; then answers.

    texts: what each stream says, the last one for ever.
    """

    def __init__(
        self, *errors: S2TError, pieces: int = 0, texts: tuple[tuple[str, ...], ...] = (TEXT,)
    ) -> None:
        self._errors = list(errors)
        self._pieces = pieces
        self._texts = list(texts)
        self.ids: list[str] = []

    async def _fail(self, context: Any) -> None:
        if self._errors:
            await wire.abort(context, self._errors.pop(0))

    async def StreamGenerate(
        self, message: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        self.ids.append(message.request_id)
        texts = self._texts.pop(0) if len(self._texts) > 1 else self._texts[0]
        for number, text in enumerate(texts):
            if self._errors and number == self._pieces:
                await self._fail(context)
            steps = [pb.Step(index=number, token_id=number + 7, chosen_by=pb.CHOSEN_BY_SLM)]
            yield pb.StreamGenerateResponse(text=text, steps=steps)
        answer = pb.Answer(text="".join(texts), finish_reason=pb.FINISH_REASON_STOP)
        yield pb.StreamGenerateResponse(answer=answer)

    async def Generate(self, message: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self.ids.append(message.request_id)
        await self._fail(context)
        return pb.GenerateResponse(answer=pb.Answer(text="x", finish_reason=pb.FINISH_REASON_STOP))

    async def RollbackVersion(self, message: Any, context: Any) -> Any:
        self.ids.append("")
        await self._fail(context)
        return admin_pb2.RollbackVersionResponse(live="v0")

    async def ListVersions(self, message: Any, context: Any) -> Any:
        self.ids.append("")
        await self._fail(context)
        return admin_pb2.ListVersionsResponse()


@asynccontextmanager
async def served(service: Service, port: int = 0) -> AsyncIterator[str]:
    security = SecurityConfig()
    server: grpc.aio.Server = channels.new_server(security)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    port = channels.bind(server, "127.0.0.1", port, security, "test.port")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def ask(service: Service, work: Callable[[Client], Any], timeout_s: float = 30.0) -> Any:
    """The result of work with a client of `service`."""

    def with_client(address: str) -> Any:
        with Client(address, timeout_s=timeout_s) as client:
            return work(client)

    async def main() -> Any:
        async with served(service) as address:
            return await asyncio.to_thread(with_client, address)

    return asyncio.run(main())


def streamed(client: Client) -> tuple[str, list[int], list[AnswerPiece]]:
    pieces = list(client.stream("a prompt", stream_steps=True))
    steps = [step.index for piece in pieces for step in piece.steps]
    return "".join(piece.text for piece in pieces), steps, pieces


LOST = ProposerLostError("lost")
AWAY = ServiceUnavailableError("away", retry_after_s=0.05)


# -- before the first reply -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [LOST, AWAY], ids=lambda e: type(e).__name__)
def test_what_the_service_could_not_do_is_asked_again(error: S2TError) -> None:
    """With the same id: the canary's share and a label's identity depend on it."""
    for work in (lambda c: c.generate("a prompt"), lambda c: list(c.stream("a prompt"))):
        service = Service(error, error)
        ask(service, work)
        assert len(service.ids) == 3 and len(set(service.ids)) == 1 and service.ids[0]
    service = Service(error)
    assert ask(service, lambda c: c.versions()) == [] and len(service.ids) == 2


@pytest.mark.parametrize(
    "error",
    [SelectorUnavailableError("no LLM"), StoreError("no Redis"), OverloadedError("full")],
    ids=lambda e: type(e).__name__,
)
def test_what_its_user_decides_about_comes_back_at_once(error: S2TError) -> None:
    """Who chose to fail without the LLM must not wait through five attempts."""
    service = Service(error)
    with pytest.raises(type(error)) as caught:
        ask(service, lambda c: c.generate("a prompt"))
    assert len(service.ids) == 1 and caught.value.retry_after_s == error.retry_after_s


def test_what_changes_something_is_not_repeated() -> None:
    """A second rollback would go back one version further."""
    service = Service(AWAY)
    with pytest.raises(ServiceUnavailableError):
        ask(service, lambda c: c.rollback())
    assert len(service.ids) == 1


def test_attempts_end() -> None:
    service = Service(*[AWAY] * 20)
    with pytest.raises(ServiceUnavailableError, match="away"):
        ask(service, lambda c: c.generate("a prompt"))
    assert len(service.ids) == 5


def test_the_deadline_holds_over_all_attempts() -> None:
    service = Service(*[ServiceUnavailableError("away", retry_after_s=2.0)] * 9)
    with pytest.raises(DeadlineExceededError):
        ask(service, lambda c: c.generate("a prompt"), timeout_s=0.5)
    assert len(service.ids) == 1


def test_a_service_that_starts_meanwhile_answers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work() -> str:
        with Client(f"127.0.0.1:{port}", timeout_s=30) as client:
            return client.generate("a prompt").text

    async def main() -> str:
        asking = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.sleep(0.4)
        async with served(Service(), port):
            return await asking

    assert asyncio.run(main()) == "x"


# -- streams that break off -----------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_a_stream_that_breaks_off_goes_on_where_it_was(pieces: int) -> None:
    """Each character and each Step comes once."""
    service = Service(AWAY, LOST, pieces=pieces)
    text, steps, found = ask(service, streamed)
    assert text == "".join(TEXT) and steps == [0, 1, 2, 3]
    assert found[-1].answer is not None and found[-1].answer.text == text
    assert len(service.ids) == 3 and len(set(service.ids)) == 1


def test_a_stream_that_was_cut_otherwise_goes_on() -> None:
    """Pieces are as long as it happens."""
    service = Service(AWAY, pieces=2, texts=(TEXT, ("o", "ne two th", "ree ", "four")))
    assert ask(service, streamed)[0] == "".join(TEXT)


@pytest.mark.parametrize(
    "other", [("one ", "too ", "three"), ("one ",)], ids=["other words", "fewer words"]
)
def test_an_answer_that_has_become_another_is_an_error(other: tuple[str, ...]) -> None:
    """A version that was swapped meanwhile: half of the one and half of the other is no answer."""
    with pytest.raises(ServiceUnavailableError, match="broke off after 8 characters"):
        ask(Service(AWAY, pieces=2, texts=(TEXT, other)), streamed)


def test_repeats_end_too() -> None:
    service = Service(*[AWAY] * 20, pieces=1)
    with pytest.raises(ServiceUnavailableError, match=r"broke off after 4 characters.*away"):
        ask(service, streamed)
    assert len(service.ids) == MAX_REPEATS + 1


def test_a_broken_stream_that_its_user_decides_about_is_not_repeated() -> None:
    service = Service(SelectorUnavailableError("no LLM"), pieces=2)
    with pytest.raises(SelectorUnavailableError):
        ask(service, streamed)
    assert len(service.ids) == 1


def test_another_token_of_the_same_text_is_noticed() -> None:
    seen = RepeatedStream()
    seen.new_of(AnswerPiece("", (Step(index=0, token_id=7),)))
    seen.begin_again(AWAY)
    assert seen.new_of(AnswerPiece("", (Step(index=0, token_id=7),))) is None
    seen.begin_again(AWAY)
    with pytest.raises(ServiceUnavailableError, match="has become another one"):
        seen.new_of(AnswerPiece("", (Step(index=0, token_id=8),)))


class Stopping(Service):
    """Drops calls, as gRPC's server does with those that come at the moment it stops."""

    async def _fail(self, context: Any) -> None:
        if self._errors:
            self._errors.pop(0)
            await context.abort(grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("pieces", [0, 2])
def test_a_call_that_a_stopping_server_drops_is_asked_again(pieces: int) -> None:
    service = Stopping(AWAY, AWAY, pieces=pieces)
    assert ask(service, streamed)[0] == "".join(TEXT)
    assert len(service.ids) == 3


def test_what_is_repeated_is_there() -> None:
    """gRPC says nothing of a name that it does not know."""
    pool = descriptor_pool.Default()
    for entry in retrying.REPEATABLE:
        service = pool.FindServiceByName(entry["service"])
        assert entry.get("method") in [None, *service.methods_by_name]


# -- the same for asyncio -------------------------------------------------------------------------


def test_both_clients_have_the_same_calls() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        calls = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(call).parameters)
            for name, call in calls
            if not name.startswith("_")
        }

    assert surface(Client) == surface(AsyncClient)


def test_the_async_client_answers(tmp_path: Path) -> None:
    async def main() -> None:
        settings: dict[str, Any] = {"mode": "s2t", "threshold": 0.3}
        service = proposer_service()
        async with (
            gateway_address(gateway_config(tmp_path), service) as address,
            AsyncClient(address) as client,
        ):
            assert (await client.generate("a prompt", **settings)).text == LLM_TEXT
            pieces = [piece async for piece in client.stream("a prompt", **settings)]
            assert "".join(piece.text for piece in pieces) == LLM_TEXT
            assert (await client.describe()).slm_digest == "scripted"
            assert await client.versions() == []
            with pytest.raises(StoreError):
                await client.count_labels()
            with pytest.raises(S2TError):
                await client.promote("v9")
            with pytest.raises(S2TError):
                await client.rollback()
        service.close()

    asyncio.run(main())


def test_the_async_client_repeats_too() -> None:
    async def main() -> str:
        async with (
            served(Service(AWAY, LOST, pieces=2)) as address,
            AsyncClient(address) as client,
        ):
            return "".join([piece.text async for piece in client.stream("a prompt")])

    assert asyncio.run(main()) == "".join(TEXT)
