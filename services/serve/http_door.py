"""The gateway as its HTTP side sees it: the same intake, proposers and versions that gRPC has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import wire
from services.serve.admin_servicer import AdminServicer
from services.serve.client_quota import name_of
from services.serve.generation_servicer import Proposers, refusal_of
from services.serve.intake import Intake

TokenCheck = Callable[[str, bool], None]  # of an authorization header; True: for administration


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
        return refusal_of(error)
