"""Builds requests from plain values (text, names of modes, numbers), and checks them.

Imports the standard library only. The client, the command line and `Pair` share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from s2t_shared.errors import InvalidRequestError
from s2t_shared.types import (
    CALIBRATED,
    MAX_SAMPLES,
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
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters of one stop string
MAX_STOP_TOTAL = 1024  # characters of all stop strings
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


# -- checks ----------------------------------------------------------------------------------------


def check_request(request: GenerateRequest) -> None:
    """Check what concerns the text; the engine checks the rest.

    Raises:
        InvalidRequestError: a field is out of range.
    """
    if not 1 <= request.samples <= MAX_SAMPLES:
        raise InvalidRequestError(
            f"samples={request.samples}: must be 1..{MAX_SAMPLES}", field="samples"
        )
    if len(request.stop) > MAX_STOP_STRINGS or "" in request.stop:
        raise InvalidRequestError(
            f"stop: {len(request.stop)} strings given; at most {MAX_STOP_STRINGS}, none empty",
            field="stop",
        )
    longest = max(map(len, request.stop), default=0)
    total = sum(map(len, request.stop))
    if longest > MAX_STOP_LENGTH or total > MAX_STOP_TOTAL:
        raise InvalidRequestError(
            f"stop: the longest string has {longest} characters, all have {total}; at most "
            f"{MAX_STOP_LENGTH} each and {MAX_STOP_TOTAL} together are accepted",
            field="stop",
        )
    _check_sampling(request.options.sampling)
    for rule in request.labels.rules:
        if rule.trigger not in CALIBRATED or not math.isfinite(rule.threshold):
            known = ", ".join(trigger.value for trigger in CALIBRATED)
            raise InvalidRequestError(
                f"label rule {rule.trigger.value} > {rule.threshold}: give a finite threshold of "
                f"{known}",
                field="labels.rules",
            )


def _check_sampling(sampling: Sampling) -> None:
    if not 0.0 <= sampling.temperature <= 100.0:
        raise InvalidRequestError(
            f"temperature={sampling.temperature}: must be 0..100", field="sampling.temperature"
        )
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequestError(
            f"top_p={sampling.top_p}: must be above 0 and at most 1", field="sampling.top_p"
        )
    if sampling.top_k < 0:
        raise InvalidRequestError(
            f"top_k={sampling.top_k}: must be 0 (off) or more", field="sampling.top_k"
        )
