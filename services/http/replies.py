"""OpenAI's replies: whole ones and the chunks of a stream.

Made of plain dictionaries: a chunk is made for every token, and a validated model would take longer
than sending it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s2t_shared.types import Alternative, Answer, AnswerPiece, Step

UNKNOWN_LOG_PROB = -9999.0  # as OpenAI writes it for what is very unlikely
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a request's replies look like.

    logprobs: how many others with each token, None for none. steps: divergences are told. prefix:
    stands before the text. tells_prompt: the prompt's tokens come first, and none is left out.
    """

    is_chat: bool
    request_id: str
    model: str
    mode: str
    logprobs: int | None
    steps: bool
    prefix: str = ""
    tells_prompt: bool = False

    def head(self, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.request_id}",
            "object": f"{kind}.chunk" if self.is_chat and streamed else kind,
            "created": int(time.time()),
            "model": self.model,
        }


class ChoiceStream:
    """The chunks of one choice."""

    def __init__(self, form: Form, index: int) -> None:
        self._form = form
        self._head = form.head(streamed=True)
        self._index = index
        self._length = len(form.prefix)  # characters of the text so far
        self._is_first = True

    def chunk(self, piece: AnswerPiece) -> bytes:
        """The piece as a server-sent event."""
        choice: dict[str, Any] = {"index": self._index}
        before = text_of(piece.prompt) or (self._form.prefix if self._is_first else "")
        if self._form.is_chat:
            choice["delta"] = self._delta(piece.text)
        else:
            choice["text"] = before + piece.text
        steps = piece.prompt or piece.steps
        choice["logprobs"] = logprobs_of(self._form, steps, self._length)
        choice["finish_reason"] = piece.answer.finish_reason.value if piece.answer else None
        event = {**self._head, "choices": [choice]}
        extra = summary(self._form, piece.answer) if piece.answer else {}
        if self._form.steps:
            extra["tokens"] = len(piece.steps)
            extra["divergences"] = list(divergences(piece.steps, self._length))
        if extra:
            event["s2t"] = extra
        self._length += len(text_of(piece.prompt)) + len(piece.text)
        self._is_first = False
        return event_of(event)

    def _delta(self, text: str) -> dict[str, str]:
        delta = {"role": "assistant"} if self._is_first else {}
        if text or self._is_first:
            delta["content"] = text
        return delta


def usage_chunk(form: Form, answers: Sequence[Answer], choices_per_prompt: int) -> bytes:
    """The last chunk of a stream that wants its usage."""
    usage = usage_of(answers, choices_per_prompt)
    return event_of({**form.head(streamed=True), "choices": [], "usage": usage})


def event_of(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def whole(
    form: Form, answers: Sequence[tuple[Answer, Sequence[Step]]], choices_per_prompt: int
) -> dict[str, Any]:
    """The reply of all choices: each an answer and, where they are wanted, all its Steps."""
    choices: list[dict[str, Any]] = []
    for index, (answer, steps) in enumerate(answers):
        choice: dict[str, Any] = {"index": index}
        if form.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            prompt = [step for step in steps if step.index < 0]
            choice["text"] = form.prefix + text_of(prompt) + answer.text
        choice["logprobs"] = logprobs_of(form, steps, 0)
        choice["finish_reason"] = answer.finish_reason.value
        choice["s2t"] = summary(form, answer)
        if form.steps:
            choice["s2t"]["divergences"] = list(divergences(steps, len(form.prefix)))
        choices.append(choice)
    usage = usage_of([answer for answer, _ in answers], choices_per_prompt)
    return {**form.head(streamed=False), "choices": choices, "usage": usage}


def usage_of(answers: Sequence[Answer], choices_per_prompt: int) -> dict[str, int]:
    """A prompt counts once, however many choices were made of it."""
    prompts = sum(answer.usage.prompt_tokens for answer in answers[::choices_per_prompt])
    completions = sum(answer.usage.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "total_tokens": prompts + completions,
    }


def summary(form: Form, answer: Answer) -> dict[str, Any]:
    """The `s2t` object of a finished answer."""
    return {
        "mode": form.mode,
        "usage": asdict(answer.usage),
        "versions": asdict(answer.versions),
    }


# -- Steps ----------------------------------------------------------------------------------------


def text_of(steps: Sequence[Step]) -> str:
    return "".join(step.text for step in steps)


def divergences(steps: Sequence[Step], offset: int) -> Iterator[dict[str, Any]]:
    """The Steps at which somebody was asked, or should have been. offset: where the first Step's
    text begins, in characters of the choice's."""
    for step in steps:
        if step.triggered or step.degraded:
            yield {
                "index": step.index,
                "offset": offset,
                "text": step.text,
                "chosen_by": step.chosen_by.value,
                "flipped": step.flipped,
                "signal": step.signal,
                "entropy": step.entropy,
                "kl": step.kl,
                "llm_top_rank": step.llm_top_rank,
                "degraded": step.degraded,
                "chosen": asdict(step.chosen) if step.chosen else None,
                "alternatives": [asdict(alternative) for alternative in step.alternatives],
            }
        offset += len(step.text)


def logprobs_of(form: Form, steps: Sequence[Step], offset: int) -> dict[str, Any] | None:
    """As OpenAI writes the log-probabilities of tokens. Tokens without text, as that which ends an
    answer, are left out, but where the prompt's are told: clients count them there."""
    if form.logprobs is None:
        return None
    shown: list[tuple[Step, Alternative, int]] = []
    for step in steps:
        if step.chosen is not None and (step.chosen.text or form.tells_prompt):
            shown.append((step, step.chosen, offset))
        offset += len(step.text)
    if form.is_chat:
        content = [
            {**_entry(chosen), "top_logprobs": [_entry(a) for a in _others(form, step)]}
            for step, chosen, _ in shown
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [chosen.text for _, chosen, _ in shown],
        "token_logprobs": [
            None if _begins_prompt(step) else _log_prob(chosen) for step, chosen, _ in shown
        ],
        "top_logprobs": [
            None if _begins_prompt(step) else {a.text: _log_prob(a) for a in _others(form, step)}
            for step, _, _ in shown
        ],
        "text_offset": [at for _, _, at in shown],
    }


def _others(form: Form, step: Step) -> Sequence[Alternative]:
    return step.alternatives[: form.logprobs]


def _begins_prompt(step: Step) -> bool:
    """Whether nothing stands before the token, so that it has no probability."""
    return step.index < 0 and step.chosen is not None and step.chosen.slm is None


def _entry(alternative: Alternative) -> dict[str, Any]:
    return {
        "token": alternative.text,
        "logprob": _log_prob(alternative),
        "bytes": list(alternative.text.encode()),
    }


def _log_prob(alternative: Alternative) -> float:
    known = alternative.slm
    if known is None or not math.isfinite(known):
        return UNKNOWN_LOG_PROB
    return known + 0.0  # no -0.0
