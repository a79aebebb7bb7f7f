"""A stream that broke off and is asked for again: what was shown is not shown twice."""

from __future__ import annotations

from dataclasses import replace

from s2t_shared.errors import S2TError, ServiceUnavailableError
from s2t_shared.types import AnswerPiece

MAX_REPEATS = 3


class RepeatedStream:
    """What the client of one answer has seen, and how far the present stream has come with it.

    Answers are decided the same way again, unless a version or the LLM was replaced meanwhile: an
    answer that begins otherwise is an error.
    """

    def __init__(self) -> None:
        self._text = ""
        self._token_ids: list[int] = []  # of the Steps
        self._at = 0  # characters of the text that the present stream has said
        self._repeats = 0

    def begin_again(self, error: S2TError) -> None:
        """The stream broke off with `error`, and will be asked for again.

        Raises:
            ServiceUnavailableError: it was asked for often enough.
            S2TError: the error, where to ask again does not help.
        """
        has_begun = bool(self._text or self._token_ids)  # before, gRPC itself has tried again
        if not has_begun or not isinstance(error, ServiceUnavailableError):
            raise error
        if self._repeats >= MAX_REPEATS:
            raise ServiceUnavailableError(
                f"the stream broke off after {len(self._text)} characters and could not be taken "
                f"up again; send the request again ({error})"
            ) from error
        self._repeats += 1
        self._at = 0

    def new_of(self, piece: AnswerPiece) -> AnswerPiece | None:
        """What the piece adds; None for nothing.

        Raises:
            ServiceUnavailableError: the answer is not the one that was begun.
        """
        seen = self._text[self._at : self._at + len(piece.text)]
        self._check(piece.text.startswith(seen))
        self._at += len(piece.text)
        text = piece.text[len(seen) :]
        self._text += text
        steps = []
        for step in piece.steps:
            if step.index < len(self._token_ids):
                self._check(step.token_id == self._token_ids[step.index])
            else:
                steps.append(step)
                self._token_ids.append(step.token_id)
        if piece.answer is not None:
            self._check(self._at == len(self._text))
        elif not text and not steps:
            return None
        return replace(piece, text=text, steps=tuple(steps))

    def _check(self, is_as_before: bool) -> None:
        if not is_as_before:
            raise ServiceUnavailableError(
                f"the stream broke off after {len(self._text)} characters, and the answer has "
                "become another one meanwhile (a new version, or another LLM); send the request "
                "again"
            )
