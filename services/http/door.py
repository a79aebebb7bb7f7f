"""What the HTTP side needs of the gateway that it is a side of."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    GenerateRequest,
    ServiceDescription,
)
from services.rpc import wire


class Door(Protocol):
    """The gateway below its transports. Methods raise S2TError, and whatever `refusal` knows."""

    @property
    def serves(self) -> bool:
        """Whether requests can be answered now."""

    def check(self, authorization: str, *, admin: bool = False) -> None:
        """Raises UnauthenticatedError: not the header of one who may call (or administrate)."""

    def hold(self, host: str, authorization: str) -> AbstractContextManager[str]:
        """Count a request of this client while the block runs; gives the client's name."""

    def read(self, message: pb.StreamGenerateRequest, client: str) -> GenerateRequest:
        """The request in a message, checked and complete."""

    def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        """Pieces of the answer; the last one carries it. Closing it cancels the answer."""

    async def answer(self, request: GenerateRequest) -> Answer:
        """The whole answer."""

    async def describe(self) -> ServiceDescription:
        """What the service runs."""

    async def versions(self) -> list[dict[str, Any]]:
        """All published versions as JSON values, oldest first, each with the gate's verdict."""

    def refusal(self, error: Exception) -> wire.Refusal:
        """What a client is told of an error."""
