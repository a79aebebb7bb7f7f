"""The Python client. Imports grpcio, protobuf and google.rpc only.

>>> from services.client import Client
>>> with Client("127.0.0.1:50051") as client:
...     for piece in client.stream("Eva has 20 coins .", mode="s2t", budget=0.05):
...         print(piece.text, end="")

Answers, Steps and descriptions are the value types of `s2t_shared.types`. `AsyncClient` is the same
for asyncio.

A call that finds the service away is repeated for some seconds. A stream that breaks off is asked
for again, and goes on where it was. A program that traces (OpenTelemetry) finds the service's spans
below its own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from s2t_shared.pb.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.requests import PromptLike
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    LabelCounts,
    PublishedVersion,
    ServiceDescription,
)
from services.rpc import channels, retrying, tracing, wire
from services.rpc.repeated_stream import RepeatedStream
from services.rpc.tls import ClientTLS

DEFAULT_TIMEOUT_S = 300.0


class _Connection:
    """What both clients are made of: a channel, its stubs, and the requests.

    authority: PEM file of the certificate authority, for TLS. tls: instead of it, where the client
    has a certificate too, or the server another name than its address. timeout_s: seconds of one
    call, its repetitions included.
    """

    asynchronous: bool

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        token: str | None = None,
        authority: Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ClientTLS | None = None,
    ) -> None:
        """Raises ConfigError: a PEM file cannot be used."""
        if tls is None and authority is not None:
            tls = ClientTLS(authority=authority)
        self._channel = channels.open_channel(
            address, tls, self.asynchronous, retrying.CHANNEL_OPTIONS
        )
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._metadata = channels.call_metadata(token)
        self._timeout_s = timeout_s

    def _begin(self, method: Any, request: Any) -> Any:
        return method(request, timeout=self._timeout_s, metadata=self._call_metadata())

    def _begin_stream(self, request: pb.StreamGenerateRequest, began_at: float) -> Any:
        left = max(0.0, began_at + self._timeout_s - time.monotonic())
        return self._generation.StreamGenerate(
            request, timeout=left, metadata=self._call_metadata()
        )

    def _call_metadata(self) -> tuple[tuple[str, str], ...]:
        """The token, and the trace that the caller's program has open."""
        return (*self._metadata, *tracing.active())


def _generate_request(prompt: PromptLike, request_id: str, settings: Any) -> pb.GenerateRequest:
    """With an id of its own, so that a repetition is known as one."""
    parameters = wire.write_settings(prompt, **settings)
    return pb.GenerateRequest(request_id=request_id or uuid.uuid4().hex, parameters=parameters)


def _stream_request(
    prompt: PromptLike, request_id: str, stream_steps: bool, settings: Any
) -> pb.StreamGenerateRequest:
    return pb.StreamGenerateRequest(
        request_id=request_id or uuid.uuid4().hex,
        parameters=wire.write_settings(prompt, **settings),
        stream_steps=stream_steps,
    )


class Client(_Connection):
    """Blocking calls to a service. Failures are `S2TError`s with the server's text.

    authority: PEM file of the certificate authority, for TLS. timeout_s: seconds of one call.
    """

    asynchronous = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    # -- answers ----------------------------------------------------------------------------------

    def generate(self, prompt: PromptLike, request_id: str = "", **settings: Any) -> Answer:
        """The whole answer.

        prompt: text, chat messages ({"role", "content"}) or token ids. settings: mode and trigger
        by name ("s2t", "majority@8", "entropy"), budget or threshold, candidates, max_new_tokens,
        version, stop, return_steps, on_llm_failure ("degrade" or "fail") and the other fields of
        `GenerationParameters`.

        Raises:
            S2TError: the request was refused or could not be answered.
        """
        request = _generate_request(prompt, request_id, settings)
        return wire.read_answer(self._call(self._generation.Generate, request).answer)

    def stream(
        self,
        prompt: PromptLike,
        request_id: str = "",
        stream_steps: bool = False,
        **settings: Any,
    ) -> Iterator[AnswerPiece]:
        """Pieces as they are decided; the last one has `.answer`.

        stream_steps: each piece also has the Steps that produced its text. Leaving the iteration
        early cancels the answer. `settings` as in `generate`.

        Raises:
            ServiceUnavailableError: the stream broke off, and could not be taken up again.
            S2TError: the request was refused or could not be answered.
        """
        request = _stream_request(prompt, request_id, stream_steps, settings)
        began_at = time.monotonic()
        seen = RepeatedStream()
        while True:
            call = self._begin_stream(request, began_at)
            try:
                for message in call:
                    piece = seen.new_of(wire.read_piece(message))
                    if piece is not None:
                        yield piece
                return
            except grpc.RpcError as error:
                seen.begin_again(wire.error_of(error))
            finally:
                call.cancel()

    def describe(self) -> ServiceDescription:
        """What the service runs."""
        response = self._call(self._generation.DescribeService, pb.DescribeServiceRequest())
        return wire.read_description(response)

    # -- versions and labels ----------------------------------------------------------------------

    def versions(self) -> list[PublishedVersion]:
        """All published versions, oldest first."""
        response = self._call(self._admin.ListVersions, admin_pb2.ListVersionsRequest())
        return [wire.read_version(version) for version in response.versions]

    def promote(self, version: str, share: float | None = None) -> str:
        """Make a version live; with a share in (0, 1) make it the canary for so many requests.

        Returns the live version.
        """
        request = admin_pb2.PromoteVersionRequest(name=version, share=share)
        return str(self._call(self._admin.PromoteVersion, request).live)

    def rollback(self) -> str:
        """End the canary, else go back to the version live before. Returns the live version."""
        request = admin_pb2.RollbackVersionRequest()
        return str(self._call(self._admin.RollbackVersion, request).live)

    def count_labels(self, flush: bool = False) -> LabelCounts:
        """Where labels are. flush: what was received so far is written to the lake first."""
        request = admin_pb2.CountLabelsRequest(flush=flush)
        return wire.read_label_counts(self._call(self._admin.CountLabels, request))

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return self._begin(method, request)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error


class AsyncClient(_Connection):
    """`Client` for asyncio: the same calls, awaited. Lives on the loop that it was made on."""

    asynchronous = True

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()

    async def generate(self, prompt: PromptLike, request_id: str = "", **settings: Any) -> Answer:
        """As `Client.generate`."""
        request = _generate_request(prompt, request_id, settings)
        response = await self._call(self._generation.Generate, request)
        return wire.read_answer(response.answer)

    async def stream(
        self,
        prompt: PromptLike,
        request_id: str = "",
        stream_steps: bool = False,
        **settings: Any,
    ) -> AsyncIterator[AnswerPiece]:
        """As `Client.stream`."""
        request = _stream_request(prompt, request_id, stream_steps, settings)
        began_at = time.monotonic()
        seen = RepeatedStream()
        while True:
            call = self._begin_stream(request, began_at)
            try:
                async for message in call:
                    piece = seen.new_of(wire.read_piece(message))
                    if piece is not None:
                        yield piece
                return
            except grpc.RpcError as error:
                seen.begin_again(wire.error_of(error))
            finally:
                call.cancel()

    async def describe(self) -> ServiceDescription:
        """As `Client.describe`."""
        response = await self._call(self._generation.DescribeService, pb.DescribeServiceRequest())
        return wire.read_description(response)

    async def versions(self) -> list[PublishedVersion]:
        """As `Client.versions`."""
        response = await self._call(self._admin.ListVersions, admin_pb2.ListVersionsRequest())
        return [wire.read_version(version) for version in response.versions]

    async def promote(self, version: str, share: float | None = None) -> str:
        """As `Client.promote`."""
        request = admin_pb2.PromoteVersionRequest(name=version, share=share)
        return str((await self._call(self._admin.PromoteVersion, request)).live)

    async def rollback(self) -> str:
        """As `Client.rollback`."""
        request = admin_pb2.RollbackVersionRequest()
        return str((await self._call(self._admin.RollbackVersion, request)).live)

    async def count_labels(self, flush: bool = False) -> LabelCounts:
        """As `Client.count_labels`."""
        request = admin_pb2.CountLabelsRequest(flush=flush)
        return wire.read_label_counts(await self._call(self._admin.CountLabels, request))

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await self._begin(method, request)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
