"""A small client for Python: needs grpcio and protobuf only.

>>> with Client("127.0.0.1:50051") as client:
...     for piece in client.stream("Eva has 20 coins . ...", mode="s2t", budget=0.05):
...         print(piece.text, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from s2t_shared.errors import InvalidRequestError
from s2t_shared.pb.v1 import admin_pb2, admin_pb2_grpc, generation_pb2_grpc
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    LabelCounts,
    PublishedVersion,
    ServiceDescription,
)
from services.rpc import channels, wire

DEFAULT_TIMEOUT_S = 300.0


def parameters(
    prompt: str | Sequence[dict[str, str]] | Sequence[int],
    mode: str = "",
    trigger: str = "",
    **settings: Any,
) -> pb.GenerationParameters:
    """Build the request's parameters. `prompt`: text, chat messages, or token ids. `mode`,
    `trigger`: their names ("s2t", "entropy"); `settings`: any other field of
    `GenerationParameters`."""
    if mode:
        settings["mode"] = f"MODE_{mode.upper()}"
    if trigger:
        settings["trigger"] = f"TRIGGER_{trigger.upper().replace('-', '_')}"
    try:
        p = pb.GenerationParameters(**settings)
    except ValueError as error:
        raise InvalidRequestError(f"unknown mode, trigger or setting: {error}") from error
    if isinstance(prompt, str):
        p.text = prompt
    elif prompt and isinstance(prompt[0], dict):
        p.messages.messages.extend(pb.Message(**m) for m in prompt)  # type: ignore[arg-type]
    else:
        p.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    return p


class Client:
    """Blocking calls. Failures are `s2t_shared.errors.S2TError`s with the server's text."""

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        token: str | None = None,
        authority: Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """`authority`: PEM file of the certificate authority, for TLS."""
        self._channel = channels.open_channel(address, authority, asynchronous=False)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._metadata, self._timeout = channels.call_metadata(token), timeout_s

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
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[dict[str, str]] | Sequence[int],
        request_id: str = "",
        **settings: Any,
    ) -> Answer:
        """The whole answer. `settings` as in `parameters`."""
        request = pb.GenerateRequest(
            request_id=request_id, parameters=parameters(prompt, **settings)
        )
        return wire.read_answer(self._call(self._generation.Generate, request).answer)

    def stream(
        self,
        prompt: str | Sequence[dict[str, str]] | Sequence[int],
        request_id: str = "",
        stream_steps: bool = False,
        **settings: Any,
    ) -> Iterator[AnswerPiece]:
        """Pieces as they come; the last one has `.answer`. Breaking off the iteration cancels the
        answer."""
        request = pb.StreamGenerateRequest(
            request_id=request_id,
            parameters=parameters(prompt, **settings),
            stream_steps=stream_steps,
        )
        call = self._generation.StreamGenerate(
            request, timeout=self._timeout, metadata=self._metadata
        )
        try:
            yield from map(wire.read_piece, call)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
        finally:
            call.cancel()

    def describe(self) -> ServiceDescription:
        return wire.read_description(
            self._call(self._generation.DescribeService, pb.DescribeServiceRequest())
        )

    def versions(self) -> list[PublishedVersion]:
        response = self._call(self._admin.ListVersions, admin_pb2.ListVersionsRequest())
        return [wire.read_version(v) for v in response.versions]

    def promote(self, version: str, share: float | None = None) -> str:
        """Make a version live, or (`share` in (0, 1)) the canary for this share of the requests
        that name none. Returns the live version."""
        return self._call(
            self._admin.PromoteVersion, admin_pb2.PromoteVersionRequest(name=version, share=share)
        ).live

    def rollback(self) -> str:
        """End the canary, else go back to the version live before. Returns the live version."""
        return self._call(self._admin.RollbackVersion, admin_pb2.RollbackVersionRequest()).live

    def count_labels(self, flush: bool = False) -> LabelCounts:
        request = admin_pb2.CountLabelsRequest(flush=flush)
        return wire.read_label_counts(self._call(self._admin.CountLabels, request))

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
