"""The gateway as its HTTP side sees it: the same intake, proposers and versions that gRPC has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import grpc

from s2t_shared.errors import S2TError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import wire
from services.rpc.border import log_unexpected
from services.rpc.tokens import Role, Tokens
from services.serve.admin_servicer import AdminServicer
from services.serve.client_quota import name_of
from services.serve.gateway_health import GatewayHealth
from services.serve.generation_servicer import Proposers
from services.serve.intake import Intake

log = logging.getLogger(__name__)
MAY_GENERATE = frozenset({Role.GENERATE})
MAY_ADMINISTRATE = frozenset({Role.ADMIN})


class HttpDoor:
    """`Door` of one gateway."""

    def __init__(
        self,
        intake: Intake,
        proposers: Proposers,
        admin: AdminServicer,
        tokens: Tokens | None,
        health: GatewayHealth,
    ) -> None:
        """tokens: None where nobody needs one."""
        self._intake = intake
        self._proposers = proposers
        self._admin = admin
        self._tokens = tokens
        self._health = health

    @property
    def serves(self) -> bool:
        return self._health.serves

    def check(self, authorization: str, *, admin: bool = False) -> None:
        if self._tokens is not None:
            self._tokens.check(authorization, MAY_ADMINISTRATE if admin else MAY_GENERATE)

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
        return await self._proposers.describe()

    async def versions(self) -> list[dict[str, Any]]:
        published, verdicts = await asyncio.to_thread(self._admin.published)
        return [{**asdict(version), "gate": verdicts.get(version.name)} for version in published]

    def refusal(self, error: Exception) -> wire.Refusal:
        self._intake.refused(error)
        if isinstance(error, S2TError):
            refusal = wire.refusal_of(error)
            if refusal.text != str(error):
                log.warning("told a client less than this: %s", error)
            return refusal
        log_unexpected(error)
        return wire.Refusal(
            code=grpc.StatusCode.INTERNAL,
            text="an unexpected error; it is in the service's log",
            reason=wire.INTERNAL,
        )
