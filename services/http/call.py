"""One request for answers: read, counted, answered whole or as events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from typing import Any

from s2t_shared.requests import parse_mode
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    FinishReason,
    GenerateRequest,
    Mode,
    Step,
    Usage,
)
from services.http import errors, replies
from services.http.answering import all_answers, all_pieces
from services.http.door import Door
from services.http.requests import (
    ChatRequest,
    CompletionRequest,
    ModelNames,
    OpenAIRequest,
    messages_of,
    mode_of,
)
from services.rpc import call_record


class Call:
    """What one client asked with one HTTP request. host, authorization: as the door's `hold`."""

    def __init__(
        self,
        door: Door,
        asked: OpenAIRequest,
        names: ModelNames,
        default: Mode,
        *,
        request_id: str,
        host: str,
        authorization: str,
    ) -> None:
        """Raises InvalidRequestError: a field is wrong."""
        mode = mode_of(asked, names, default)
        self._door = door
        self._asked = asked
        self._form = replies.Form(
            is_chat=isinstance(asked, ChatRequest),
            request_id=request_id,
            model=asked.model,
            mode=parse_mode(mode)[0].value,
            logprobs=asked.top_logprobs_wanted,
            steps=asked.s2t.steps,
            prefix=asked.echoed() if isinstance(asked, CompletionRequest) else "",
            tells_prompt=asked.tells_prompt,
        )
        self._messages = messages_of(asked, mode, request_id)
        self._host = host
        self._authorization = authorization

    @property
    def is_streamed(self) -> bool:
        """Whether the client wants events."""
        return bool(self._asked.stream)

    async def whole(self) -> dict[str, Any]:
        """The reply. Raises what the door raises."""
        with self._requests() as requests:
            found = await all_answers(self._door, requests)
        if self._asked.is_about_prompt:
            found = [(_unanswered(answer), _of_prompt(steps)) for answer, steps in found]
        return replies.whole(self._form, found, self._asked.n)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The reply's server-sent events. Raises what the door raises, if nothing was sent yet;
        later the error is an event, the last."""
        has_begun = False
        try:
            with self._requests() as requests:
                async with aclosing(self._answer(requests)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                        has_begun = True
        except Exception as error:
            if not has_begun:
                raise
            refusal = self._door.refusal(error)
            call_record.current().error = refusal.reason
            yield replies.event_of(errors.body_of(refusal))
            return
        yield replies.DONE

    async def _answer(self, requests: list[GenerateRequest]) -> AsyncGenerator[bytes, None]:
        choices = [replies.ChoiceStream(self._form, index) for index in range(len(requests))]
        answers: dict[int, Answer] = {}
        async with aclosing(all_pieces(self._door, requests)) as pieces:
            async for index, piece in pieces:
                if self._asked.is_about_prompt:
                    piece = _without_answer(piece)
                if piece.answer is not None:
                    answers[index] = piece.answer
                yield choices[index].chunk(piece)
        options = self._asked.stream_options
        if options is not None and options.include_usage:
            in_order = [answers[index] for index in range(len(requests))]
            yield replies.usage_chunk(self._form, in_order, self._asked.n)

    @contextmanager
    def _requests(self) -> Iterator[list[GenerateRequest]]:
        """The requests of all choices, each counted of its client while the block runs."""
        logprobs = self._form.logprobs
        with ExitStack() as held:
            requests = []
            for message in self._messages:
                client = held.enter_context(self._door.hold(self._host, self._authorization))
                request = self._door.read(message, client)
                if message.stream_steps:
                    options = replace(request.options, keep_support=logprobs is not None)
                    request = replace(request, options=options, alternatives=logprobs or 0)
                if self._asked.tells_prompt:
                    request = replace(request, prompt_alternatives=logprobs)
                requests.append(request)
            yield requests


# -- the prompt alone -----------------------------------------------------------------------------
#
# A proposer decodes at least one token. Where nobody asked for it, it is thrown away here.


def _unanswered(answer: Answer) -> Answer:
    """The answer as if its length had been limited to nothing."""
    usage = Usage(prompt_tokens=answer.usage.prompt_tokens)
    return replace(answer, text="", finish_reason=FinishReason.LENGTH, usage=usage)


def _of_prompt(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.index < 0]


def _without_answer(piece: AnswerPiece) -> AnswerPiece:
    answer = _unanswered(piece.answer) if piece.answer else None
    return replace(piece, text="", steps=(), answer=answer)
