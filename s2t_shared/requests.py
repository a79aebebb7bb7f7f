"""Builds requests from plain values: text, names of modes, numbers.

Imports the standard library only. The client, the command line and `Pair` share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import (
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    Message,
    Mode,
    OnLLMFailure,
    Policy,
    Prompt,
    Sampling,
    Trigger,
)

DEFAULT_BUDGET = 0.01
DEFAULT_SAMPLES = 8
DEFAULT_SAMPLING = Sampling()
PromptLike = str | Prompt | Sequence[int] | Sequence[Mapping[str, str]]
Name = TypeVar("Name", bound=Enum)


def new_request(
    prompt: PromptLike,
    mode: str = "s2t",
    *,
    trigger: str = "entropy",
    budget: float | None = None,
    threshold: float | None = None,
    candidates: int = 8,
    candidate_ratio: float = 0.0,
    max_new_tokens: int = 256,
    version: str | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling = DEFAULT_SAMPLING,
    steps: bool = False,
    request_id: str = "",
    on_llm_failure: str = "degrade",
) -> GenerateRequest:
    """A request from plain values.

    mode: as in `Mode`, or majority@n. budget: share of steps that may trigger, default 0.01.
    threshold: instead of a budget, in the trigger's unit. steps: the answer carries its triggered
    Steps. on_llm_failure: as in `OnLLMFailure`.

    Raises:
        InvalidRequestError: an unknown name, or budget and threshold together.
    """
    if budget is not None and threshold is not None:
        raise InvalidRequestError("give a threshold or a budget, not both")
    kind, samples = parse_mode(mode)
    policy = Policy(
        mode=kind,
        trigger=by_name(Trigger, trigger, "trigger"),
        threshold=threshold or 0.0,
        candidates=CandidateRule(candidates, candidate_ratio),
    )
    options = DecodeOptions(
        policy=policy,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        version=version,
        on_llm_failure=by_name(OnLLMFailure, on_llm_failure, "on_llm_failure"),
    )
    if threshold is None and budget is None:
        budget = DEFAULT_BUDGET
    return GenerateRequest(
        request_id=request_id,
        prompt=as_prompt(prompt),
        options=options,
        budget=budget,
        samples=samples,
        stop=tuple(stop),
        return_steps=steps,
    )


def as_prompt(prompt: PromptLike) -> Prompt:
    """A prompt from text, chat messages ({"role", "content"}) or token ids.

    Raises:
        InvalidRequestError: a chat message has other keys than role and content.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if prompt and isinstance(prompt[0], Mapping):
        return Prompt(messages=_messages(prompt))
    return Prompt(token_ids=tuple(prompt))  # type: ignore[arg-type]


def _messages(prompt: Sequence[Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for message in prompt:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequestError(
                f"prompt: message {len(messages)} must have the keys role and content only"
            )
        messages.append(Message(message["role"], message["content"]))
    return tuple(messages)


def parse_mode(text: str) -> tuple[Mode, int]:
    """The mode and the number of samples: "majority@8" -> (MAJORITY, 8).

    Raises:
        InvalidRequestError: unknown mode, or a number behind another mode.
    """
    name, at, number = text.partition("@")
    mode = by_name(Mode, name, "mode")
    if at and (mode is not Mode.MAJORITY or not number.isdigit()):
        raise InvalidRequestError(
            f"mode={text!r}: only majority takes a number, as in majority@8", field="mode"
        )
    return mode, int(number) if at else DEFAULT_SAMPLES


def by_name(kind: type[Name], name: str, field: str) -> Name:
    """An enum member by its value; dashes stand for underscores.

    Raises:
        InvalidRequestError: unknown, listing the known ones.
    """
    try:
        return kind(name.replace("-", "_"))
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise InvalidRequestError(
            f"{field}={name!r}: unknown; choose from {known}", field=field
        ) from None
