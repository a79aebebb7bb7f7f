"""The Python client. Imports grpcio, protobuf and google.rpc only.

>>> from services.client import Client
>>> with Client("127.0.0.1:50051") as client:
...     for piece in client.stream("Eva has 20 coins .", mode="s2t", budget=0.05):
...         print(piece.text, end="")

Answers, Steps and descriptions are the value types of `s2t_shared.types`.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from services.rpc import channels, wire
from services.rpc.tls import ClientTLS

DEFAULT_TIMEOUT_S = 300.0


class Client:
    """Blocking calls to a service. Failures are `S2TError`s with the server's text.

    authority: PEM file of the certificate authority, for TLS. tls: instead of it, where the client
    has a certificate too, or the server another name than its address. timeout_s: seconds of one
    call.
    """

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
        self._channel = channels.open_channel(address, tls, asynchronous=False)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._metadata = channels.call_metadata(token)
        self._timeout_s = timeout_s

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
        parameters = wire.write_settings(prompt, **settings)
        request = pb.GenerateRequest(request_id=request_id, parameters=parameters)
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
            S2TError: the request was refused or could not be answered.
        """
        request = pb.StreamGenerateRequest(
            request_id=request_id,
            parameters=wire.write_settings(prompt, **settings),
            stream_steps=stream_steps,
        )
        call = self._generation.StreamGenerate(
            request, timeout=self._timeout_s, metadata=self._metadata
        )
        try:
            for message in call:
                yield wire.read_piece(message)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
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
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise wire.error_of(error) from error
