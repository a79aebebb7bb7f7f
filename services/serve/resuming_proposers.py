"""Answers that outlive their proposer: what one has decided, another goes on from.

Of each answer under way it keeps what was decided, as far as its client has it. When the proposer
dies, the rest is asked of another one; the client sees one answer. What was not shown yet is
answered anew: samples of a majority, scored rollouts, answers in one message. They are decided the
same way again. Knows proposers and a clock; no Ray, no wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from s2t_shared.errors import DeadlineExceededError, OverloadedError, ProposerLostError
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    GenerateRequest,
    Progress,
    ServiceDescription,
    Step,
)
from services.serve.generation_servicer import Proposers

log = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.2  # before the second proposer in a row; the first is asked at once
MAX_PAUSE_S = 2.0


class ResumingProposers:
    """`Proposers` over those that may die.

    max_resumes: how often in a row an answer is handed on without a new token of it. A request that
    kills every proposer ends so. clock: seconds. handovers: of answers, since the start.
    """

    def __init__(
        self,
        proposers: Proposers,
        max_resumes: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proposers = proposers
        self._max_resumes = max_resumes
        self._clock = clock
        self.handovers = 0

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        """Pieces of one answer, whoever makes them.

        Raises:
            ProposerLostError: proposers died, and the answer cannot be handed on once more.
            DeadlineExceededError: its time was up meanwhile.
            S2TError: the request cannot be answered.
        """
        answer = self._ongoing(request)
        while True:
            try:
                async with aclosing(self._proposers.stream(answer.rest())) as pieces:
                    async for piece in pieces:
                        answer.add(piece)
                        if piece.text or piece.steps or piece.prompt or piece.answer is not None:
                            yield replace(piece, progress=None)
                        if piece.answer is not None:  # who dies now has done all of its work
                            return
            except (ProposerLostError, OverloadedError) as error:
                await answer.pause(error)
                self.handovers += 1

    async def answer(self, request: GenerateRequest) -> Answer:
        """The finished answer. Raises as `stream`."""
        answer = self._ongoing(request)
        while True:
            try:
                return await self._proposers.answer(answer.rest())
            except (ProposerLostError, OverloadedError) as error:
                await answer.pause(error)
                self.handovers += 1

    async def describe(self) -> ServiceDescription:
        return await self._proposers.describe()

    async def count_dropped_labels(self) -> int:
        return await self._proposers.count_dropped_labels()

    def _ongoing(self, request: GenerateRequest) -> _OngoingAnswer:
        return _OngoingAnswer(request, self._max_resumes, self._clock)


class _OngoingAnswer:
    """What is known of one answer outside of its proposer."""

    def __init__(
        self, request: GenerateRequest, max_resumes: int, clock: Callable[[], float]
    ) -> None:
        self._request = request
        self._max_resumes = max_resumes
        self._clock = clock
        self._give_up_at = clock() + request.timeout_s if request.timeout_s > 0 else None
        self._latest: Progress | None = None
        self._token_ids: list[int] = []
        self._steps: list[Step] = []
        self._losses = 0  # since the last new token
        self._shows_more_than_is_known = False

    def add(self, piece: AnswerPiece) -> None:
        """Keep what a piece tells of the answer's progress."""
        if piece.prompt:
            self._request = replace(self._request, prompt_alternatives=None)
        progress = piece.progress
        if progress is None:
            self._shows_more_than_is_known |= bool(piece.text or piece.steps)
            return
        self._latest = progress
        self._token_ids += progress.token_ids
        self._steps += progress.steps
        self._losses = 0

    def rest(self) -> GenerateRequest:
        """The request for what is not decided yet.

        Raises DeadlineExceededError: no time is left.
        """
        progress = None
        if self._latest is not None:
            progress = replace(
                self._latest, token_ids=tuple(self._token_ids), steps=tuple(self._steps)
            )
        return replace(self._request, progress=progress, timeout_s=self._time_left())

    def _time_left(self) -> float:
        if self._give_up_at is None or not self._losses:
            return self._request.timeout_s
        left = self._give_up_at - self._clock()
        if left <= 0:
            raise DeadlineExceededError(
                f"the deadline of {self._request.timeout_s:g} s passed after "
                f"{len(self._token_ids)} tokens, when the proposer was lost; send the request again"
            )
        return left

    async def pause(self, error: ProposerLostError | OverloadedError) -> None:
        """Wait until the rest may be asked for. Raises the error where it may not."""
        is_lost = isinstance(error, ProposerLostError)
        is_refusal = not is_lost and not self._losses and self._latest is None
        if is_refusal or self._shows_more_than_is_known or self._losses >= self._max_resumes:
            raise error
        self._losses += 1
        log.warning(
            "an answer is handed on behind token %d: %s", len(self._token_ids), type(error).__name__
        )
        if self._losses > 1:
            await asyncio.sleep(min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._losses - 2)))
