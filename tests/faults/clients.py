"""Clients that write down all that they are told."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
from s2t_shared.types import AnswerPiece, LabelOptions, Step
from services.rpc import wire
from services.rpc.wire import errors as wire_errors
from tests.faults.history import History

DEADLINE_S = 60.0
OPTIONS = [
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
TOKENS = 40


class Clients:
    """Clients of one gateway, or of several in turns.

    Each request has a prompt of its own, so that no cache and no deduplication of labels hides what
    happens to it.
    """

    def __init__(
        self,
        history: History,
        addresses: Sequence[str],
        first: int = 0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """first: number of the first request. credentials: for TLS."""
        self._history = history
        self._numbers = itertools.count(first)
        target = "ipv4:" + ",".join(addresses)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(addresses[0], credentials, options=OPTIONS)
        self._stub = pb_grpc.GenerationServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def ask(
        self,
        mode: str = "s2t",
        *,
        prompt: Any = None,
        labels: str = "",
        max_new_tokens: int = TOKENS,
        leaves_after: int | None = None,
        pause_s: float = 0.0,
        timeout_s: float = DEADLINE_S,
        is_scripted: bool = True,
        **settings: Any,
    ) -> bool:
        """One streamed answer; returns whether it came.

        A gRPC server that stops may drop a call that has just arrived: that one is sent once more.
        leaves_after: cancel after so many pieces.
        pause_s: before each piece is read. labels: "stored", "durable" or none."""
        number = next(self._numbers)
        name = f"r{number}"
        if labels:
            settings["labels"] = LabelOptions(
                store=True, durable=labels == "durable", task="faults", problem_id=name
            )
        if mode == "s2t" and "budget" not in settings:
            settings["budget"] = 0.05
        parameters = wire.write_settings(
            prompt or (1, 1 + number // 1000, 1 + number % 1000),
            mode=mode,
            max_new_tokens=max_new_tokens,
            **settings,
        )
        request = pb.StreamGenerateRequest(
            request_id=name, parameters=parameters, stream_steps=True
        )
        self._history.write(
            "request",
            id=name,
            mode=mode,
            prompt=str(prompt or number),
            labels=labels,
            streams=True,
            is_scripted=is_scripted,
        )
        for is_repeat in (False, True):
            call = self._stub.StreamGenerate(request, timeout=timeout_s)
            pieces = 0
            has_answer = False
            try:
                async for message in call:
                    self._write_piece(name, wire.read_piece(message))
                    pieces += 1
                    has_answer = message.HasField("answer")
                    if pieces == leaves_after:
                        self._history.write("left", id=name)
                        return False
                    if pause_s:
                        await asyncio.sleep(pause_s)
                return True
            except grpc.RpcError as error:
                if has_answer:  # the deadline passed between the answer and the call's status
                    return True
                was_dropped = error.code() is grpc.StatusCode.CANCELLED and not pieces
                if is_repeat or not was_dropped:
                    self._write_error(name, error)
                    return False
                self._history.write("dropped", id=name)
            finally:
                call.cancel()
        raise AssertionError("the repeat returns")

    def _write_piece(self, name: str, piece: AnswerPiece) -> None:
        tokens = [_token(step) for step in piece.steps]
        self._history.write("piece", id=name, tokens=tokens, text=piece.text)
        answer = piece.answer
        if answer is not None:
            self._history.write(
                "answer",
                id=name,
                token_ids=answer.token_ids,
                text=answer.text,
                version=answer.versions.local_selector,
                degraded=answer.usage.degraded_steps,
                stored=answer.labels_stored,
            )

    def _write_error(self, name: str, error: grpc.RpcError) -> None:
        trailing = dict(error.trailing_metadata() or ())
        details = wire_errors._read_details(trailing.get(wire_errors.STATUS_DETAILS))
        self._history.write(
            "error",
            id=name,
            status=error.code().name,
            reason=details.info.reason,
            retry_after_s=details.retry_after_s,
            text=error.details(),
            bytes=len(error.details() or "") + len(trailing.get(wire_errors.STATUS_DETAILS, b"")),
        )


def _token(step: Step) -> list:
    return [step.index, step.token_id, step.llm_digest, step.degraded]


@asynccontextmanager
async def asking(
    ask: Callable[[], Awaitable[Any]], clients: int, pause_s: float = 0.0
) -> AsyncIterator[None]:
    """So many clients ask again and again, while the block runs; what was begun is finished."""
    is_over = asyncio.Event()

    async def client() -> None:
        while not is_over.is_set():
            await ask()
            await asyncio.sleep(pause_s)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()  # what a client raised is the test's failure
    finally:
        is_over.set()
        await asyncio.gather(*tasks)
