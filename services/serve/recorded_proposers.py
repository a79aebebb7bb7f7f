"""Proposers whose answers are noted in the record of the call that asked for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from s2t_shared.types import Answer, AnswerPiece, GenerateRequest, ServiceDescription
from services.rpc import call_record
from services.serve.generation_servicer import Proposers


class RecordedProposers:
    """`Proposers` as they are, seen by the call's record."""

    def __init__(self, proposers: Proposers) -> None:
        self._proposers = proposers

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        call = call_record.current()
        async with aclosing(self._proposers.stream(request)) as pieces:
            async for piece in pieces:
                call.sees(piece)
                yield piece

    async def answer(self, request: GenerateRequest) -> Answer:
        answer = await self._proposers.answer(request)
        call_record.current().has(answer)
        return answer

    async def describe(self) -> ServiceDescription:
        return await self._proposers.describe()

    async def count_dropped_labels(self) -> int:
        return await self._proposers.count_dropped_labels()
