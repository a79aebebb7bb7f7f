"""The gateway as its HTTP side sees it: the same intake, proposers and versions that gRPC has."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import grpc

from s2t_shared.errors import S2TError, UnauthenticatedError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import wire
from services.serve.admin_servicer import AdminServicer
from services.serve.client_quota import name_of
from services.serve.generation_servicer import RETRY_LOST_S, ProposerLostError, Proposers
from services.serve.intake import Intake

log = logging.getLogger(__name__)
TokenCheck = Callable[[str, bool], None]  # of an authorization header; True: for administration


def token_check(token: str | None) -> TokenCheck:
    """The same check as gRPC's, of the one token; None: there is none to send.

    The check raises UnauthenticatedError.
    """
    expected = f"Bearer {token}".encode()

    def check(authorization: str, admin: bool) -> None:
        if token is not None and not hmac.compare_digest(authorization.encode(), expected):
            raise UnauthenticatedError("no valid token: send 'authorization: Bearer TOKEN'")

    return check


class HttpDoor:
    """`Door` of one gateway."""

    def __init__(
        self,
        intake: Intake,
        proposers: Proposers,
        admin: AdminServicer,
        check_token: TokenCheck,
        replicas: int,
    ) -> None:
        self._intake = intake
        self._proposers = proposers
        self._admin = admin
        self._check_token = check_token
        self._replicas = replicas

    def check(self, authorization: str, *, admin: bool = False) -> None:
        self._check_token(authorization, admin)

    @contextmanager
    def hold(self, host: str, authorization: str) -> Iterator[str]:
        client = name_of(host, authorization.encode())
        with self._intake.quota.hold(client):
            yield client

    def read(self, message: pb.StreamGenerateRequest, client: str) -> GenerateRequest:
        return self._intake.read(message, client)

    def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        return self._proposers.stream(request)

    async def answer(self, request: GenerateRequest) -> Answer:
        return await self._proposers.answer(request)

    async def describe(self) -> ServiceDescription:
        return replace(await self._proposers.describe(), proposers=self._replicas)

    async def versions(self) -> list[dict[str, Any]]:
        published, verdicts = await asyncio.to_thread(self._admin.published)
        return [{**asdict(version), "gate": verdicts.get(version.name)} for version in published]

    def refusal(self, error: Exception) -> wire.Refusal:
        if isinstance(error, S2TError):
            refusal = wire.refusal_of(error)
            if refusal.text != str(error):
                log.warning("told a client less than this: %s", error)
            return refusal
        if isinstance(error, ProposerLostError):
            return wire.Refusal(
                code=grpc.StatusCode.UNAVAILABLE,
                text="the proposer that answered was lost; send the request again",
                reason=wire.PROPOSER_LOST,
                retry_after_s=RETRY_LOST_S,
            )
        log.error("unexpected error", exc_info=error)
        return wire.Refusal(
            code=grpc.StatusCode.INTERNAL,
            text="an unexpected error; it is in the service's log",
            reason=wire.INTERNAL,
        )
