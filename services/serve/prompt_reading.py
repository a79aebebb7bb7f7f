"""A prompt whose tokens' log-probabilities somebody wants: read on the engine's thread, a chunk a
step, told to an asyncio loop, and shown as Steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from s2t_shared.decode.alternatives import TokenTexts
from s2t_shared.decode.interfaces import PromptScore, PromptScores, SLMProposer
from s2t_shared.model.text_stream import TextStream
from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.types import Alternative, Step


class PromptReading:
    """One prompt. The running asyncio loop, which waits for `found`, alone changes it.

    token_ids, count: as in `SLMProposer.read_prompt`.
    """

    def __init__(self, token_ids: Sequence[int], count: int) -> None:
        self.token_ids = token_ids
        self.count = count
        self.is_over = False
        self._loop = asyncio.get_running_loop()
        self.found: asyncio.Future[list[PromptScore]] = self._loop.create_future()
        self._scores: list[PromptScore] = []
        self._chunks: PromptScores | None = None

    def read_on(self, proposer: SLMProposer) -> None:
        """Read a chunk more, or end where nobody waits. Called on the engine's thread.

        Raises:
            InvalidRequestError: the SLM's runtime does not say.
        """
        if self.found.cancelled():
            self._end()
            return
        if self._chunks is None:
            self._chunks = proposer.read_prompt(self.token_ids, self.count)
        new = next(self._chunks, None)
        if new is not None:
            self._scores += new
            return
        self._end()
        self._tell(None)

    def fail(self, error: Exception) -> None:
        """`found` raises the error. From any thread: what is read of the prompt stays as it is."""
        self.is_over = True
        self._tell(error)

    def _end(self) -> None:
        self.is_over = True
        if self._chunks is not None:
            self._chunks.close()

    def _tell(self, error: Exception | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        if self.found.done():
            return
        if error is not None:
            self.found.set_exception(error)
        else:
            self.found.set_result(self._scores)


def prompt_steps(
    token_ids: Sequence[int],
    scores: Sequence[PromptScore],
    count: int,
    tokenizer: TextTokenizer,
    texts: TokenTexts,
) -> tuple[Step, ...]:
    """A prompt's tokens as Steps, their indices from -n to -1.

    scores: of `token_ids[1:]`; nothing says how likely the first is. count: alternatives shown.
    """
    stream = TextStream(tokenizer)
    first = -len(token_ids)
    steps = []
    for place, token_id in enumerate(token_ids):
        score = scores[place - 1] if place else None
        chosen = Alternative(
            token_id=token_id,
            text=texts[token_id],
            slm=score.log_prob if score is not None else None,
        )
        alternatives: tuple[Alternative, ...] = ()
        if score is not None:
            best = list(zip(score.support.ids, score.support.log_probs, strict=True))[:count]
            alternatives = tuple(
                Alternative(token_id=other, text=texts[other], slm=log_prob)
                for other, log_prob in best
            )
        step = Step(
            index=first + place,
            token_id=token_id,
            text=stream.push(token_id),
            chosen=chosen,
            alternatives=alternatives,
        )
        steps.append(step)
    if steps:
        steps[-1] = steps[-1].changed(text=steps[-1].text + stream.finish())
    return tuple(steps)
