"""OpenAI's requests, and what they ask in our terms.

A field that we do not know is refused, as OpenAI does it: a client learns that its wish has no
effect. Fields that have none here by design (`user`, `store`) are accepted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2t_shared.errors import InvalidRequestError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.requests import PromptLike, parse_mode
from s2t_shared.types import MAX_CANDIDATES, Mode
from services.rpc import wire

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_FIELDS = 20_000  # of a body, and lists, objects, strings
MAX_VALUES = 300_000  # more than a prompt of `gateway.max_prompt_bytes` has token ids
MAX_ERRORS = 100  # of one request, that are looked at to say which is wrong
MAX_TOP_LOGPROBS = 20
DRAWING = (Mode.SAMPLE, Mode.MAJORITY)  # modes in which the seed counts
SEEDS = 1 << 63


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelSettings(_Model):
    """As `LabelOptions` of the proto."""

    store: bool | None = None
    task: str = ""
    problem_id: str = ""
    group: str = ""
    split: str = ""


class Settings(_Model):
    """The `s2t` object of a request: what OpenAI has no words for. Names are the proto's; `k` is
    `candidates`. steps: each chunk says where the answer diverged."""

    mode: str | None = None
    trigger: str | None = None
    budget: float | None = None
    threshold: float | None = None
    candidates: int | None = Field(None, ge=1, le=MAX_CANDIDATES)
    k: int | None = Field(None, ge=1, le=MAX_CANDIDATES)
    candidate_ratio: float | None = None
    version: str | None = None
    on_llm_failure: str | None = None
    fresh_selections: bool | None = None
    timeout_seconds: float | None = None
    top_k: int | None = Field(None, ge=0)
    labels: LabelSettings | None = None
    steps: bool = False


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Model):
    type: Literal["text"] = "text"


class TextPart(_Model):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Other keys (`name`, and what a client sends back of an answer) must be empty."""

    model_config = ConfigDict(extra="allow", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates know it: the developer of today is the system of yesterday."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


# The first wrong element ends it: a client could have millions of them described.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
NoEffect = Annotated[Any, Field(default=None, exclude=True)]
TokenLimit = Annotated[int | None, Field(default=None, ge=1, lt=1 << 31)]
Zero = Annotated[float | None, Field(default=None, ge=0, le=0)]


class OpenAIRequest(_Model):
    """What both kinds of requests have."""

    model: str
    max_tokens: TokenLimit = None
    temperature: float | None = None
    top_p: float | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: str | Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    s2t: Settings = Settings()
    # What would change the answer and is not there is refused, unless it is off:
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # What does not change the answer:
    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None
    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives a token's log-probability comes with; None: none is wanted."""
        raise NotImplementedError

    @property
    def is_about_prompt(self) -> bool:
        """Whether no answer is wanted, only the prompt back."""
        return self.token_limit == 0

    @property
    def tells_prompt(self) -> bool:
        """Whether the prompt's tokens are told, with their log-probabilities, before the answer."""
        return False

    def prompts(self) -> list[PromptLike]:
        """What is to be answered: one, or for completions several."""
        raise NotImplementedError


class ChatRequest(OpenAIRequest):
    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: TokenLimit = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: NoEffect = None
    modalities: list[Literal["text"]] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs goes with logprobs: true", field="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self) -> list[PromptLike]:
        return [[message.plain() for message in self.messages]]


class CompletionRequest(OpenAIRequest):
    """max_tokens: 0, with echo, asks for the prompt alone."""

    max_tokens: Annotated[int | None, Field(default=None, ge=0, lt=1 << 31)]
    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: str | None = Field(None, max_length=0)

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def tells_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    def echoed(self) -> str:
        """What stands before the answer's text, where the prompt's tokens are not told.

        Raises:
            InvalidRequestError: it cannot be said.
        """
        if self.is_about_prompt and not self.echo:
            raise InvalidRequestError("max_tokens: 0 goes with echo", field="max_tokens")
        if not self.echo or self.tells_prompt:
            return ""
        if not isinstance(self.prompt, str):
            raise InvalidRequestError(
                "echo goes with one prompt of text, or with logprobs", field="echo"
            )
        return self.prompt

    def prompts(self) -> list[PromptLike]:
        several: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not all(isinstance(p, int) for p in self.prompt):
            several = list(self.prompt)
        if not 1 <= len(several) <= MAX_PROMPTS or not all(several):
            raise InvalidRequestError(
                f"prompt: {len(several)} given, 1..{MAX_PROMPTS} are accepted, none empty",
                field="prompt",
            )
        return several


Asked = TypeVar("Asked", bound=OpenAIRequest)


def check_body(body: bytes) -> None:
    """Check that a body has no more values than a request may have, without making any of them.

    To parse a list of a million lists takes two seconds, in which nothing else moves: threads do
    not help against one call of a library that holds the interpreter.

    Raises:
        InvalidRequestError: it has more.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 2 * MAX_FIELDS:
        raise InvalidRequestError(f"the body has more than {MAX_FIELDS} strings")
    outside = b"".join(unescaped.split(b'"')[::2])  # of the strings
    if sum(map(outside.count, (b":", b"[", b"{"))) > MAX_FIELDS:
        raise InvalidRequestError(f"the body has more than {MAX_FIELDS} fields, lists and objects")
    if outside.count(b",") > MAX_VALUES:
        raise InvalidRequestError(f"the body has more than {MAX_VALUES} values")


def parse(kind: type[Asked], body: bytes) -> Asked:
    """A request from its JSON.

    Raises:
        InvalidRequestError: it is none; the text and `field` say what is wrong.
    """
    check_body(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:  # to describe a million of them takes many seconds
            raise InvalidRequestError(f"{error.error_count()} values are wrong") from None
        found = error.errors(include_url=False, include_input=False, include_context=False)
        first = max(found, key=lambda item: len(item["loc"]))  # of a union, what got furthest
        place = ".".join(str(part) for part in first["loc"] if _is_a_name(part))
        raise InvalidRequestError(
            _explained(first["type"], place, first["msg"]), field=place
        ) from error


def _is_a_name(part: str | int) -> bool:
    """Whether it is of the request: unions bring names of types, as in str or list[int]."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "TextPart"))


UNSUPPORTED = {
    "tools": "tools are not supported: answers are text",
    "tool_choice": "tools are not supported: answers are text",
    "functions": "functions are not supported: answers are text",
    "function_call": "functions are not supported: answers are text",
}


def _explained(kind: str, place: str, reason: str) -> str:
    if place in UNSUPPORTED:
        return UNSUPPORTED[place]
    if kind == "extra_forbidden":
        return f"{place}: unknown or not supported"
    if kind == "json_invalid":
        return f"the body is not JSON: {reason}"
    return f"{place}: {reason}"


class UnknownModelError(InvalidRequestError):
    """The model that a request names is not served here."""

    field = "model"


class ModelNames:
    """How clients name the model: `served`, or `served:mode`."""

    def __init__(self, served: str) -> None:
        self.served = served

    @property
    def all(self) -> list[str]:
        return [self.served, *(f"{self.served}:{mode.value}" for mode in Mode)]

    def mode_of(self, model: str) -> str | None:
        """The mode that the name of a model asks for, None for the deployment's.

        Raises:
            UnknownModelError: it is another model, or an unknown mode.
        """
        if model == self.served:
            return None
        name, colon, mode = model.rpartition(":")
        if not colon or name != self.served:
            raise UnknownModelError(
                f"the model {model[:64]!r} is not served here; {self.served!r} is, and "
                f"{self.served + ':s2t_local'!r} and so on, with a mode behind it"
            )
        try:
            parse_mode(mode)
        except InvalidRequestError as error:
            raise UnknownModelError(f"the model {model[:64]!r} is not there: {error}") from error
        return mode


def mode_of(asked: OpenAIRequest, names: ModelNames, default: Mode) -> str:
    """The mode of a request, as majority@n with its number. default: the deployment's.

    Raises:
        InvalidRequestError: it is unknown, named twice, or does not go with the rest.
    """
    of_model, of_settings = names.mode_of(asked.model), asked.s2t.mode
    if of_model and of_settings and of_model != of_settings:
        raise InvalidRequestError(
            f"the model's name asks for mode {of_model}, s2t.mode for {of_settings[:64]!r}; "
            "give one",
            field="mode",
        )
    mode = (of_model or of_settings or default.value).lower()
    kind, _ = parse_mode(mode)
    if kind is Mode.LLM and asked.top_logprobs_wanted is not None:
        raise InvalidRequestError(
            "logprobs are the SLM's, which has no part in mode llm; choose another mode",
            field="logprobs",
        )
    if asked.n > 1 and kind not in DRAWING:
        raise InvalidRequestError(
            f"n={asked.n}: mode {mode} always gives the same answer; choose mode sample",
            field="n",
        )
    is_certain = kind is Mode.SAMPLE and asked.temperature == 0
    return Mode.GREEDY.value if is_certain else mode


def messages_of(asked: OpenAIRequest, mode: str, request_id: str) -> list[pb.StreamGenerateRequest]:
    """One message for each choice: `n` for each prompt, in this order.

    Raises:
        InvalidRequestError: a field is wrong.
    """
    choices = [(prompt, place) for prompt in asked.prompts() for place in range(asked.n)]
    seed = random.randrange(SEEDS) if asked.seed is None else asked.seed
    messages = []
    for number, (prompt, place) in enumerate(choices):
        parameters = wire.write_settings(
            prompt, mode=mode, sampling=_sampling(asked, seed + place), **_settings(asked)
        )
        message = pb.StreamGenerateRequest(
            request_id=request_id if len(choices) == 1 else f"{request_id}-{number}",
            parameters=parameters,
            stream_steps=asked.s2t.steps or asked.top_logprobs_wanted is not None,
        )
        messages.append(message)
    return messages


def _sampling(asked: OpenAIRequest, seed: int) -> dict[str, Any]:
    given = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.s2t.top_k,
        "seed": seed % SEEDS,
    }
    return {name: value for name, value in given.items() if value is not None}


def _settings(asked: OpenAIRequest) -> dict[str, Any]:
    """The settings of `GenerationParameters` that the request names."""
    own = asked.s2t.model_dump(exclude_none=True, exclude={"mode", "top_k", "steps", "labels"})
    if "k" in own:
        own["candidates"] = own.pop("k")
    if asked.s2t.labels is not None:
        own["labels"] = asked.s2t.labels.model_dump(exclude_none=True, exclude_defaults=True)
    if asked.token_limit is not None:
        own["max_new_tokens"] = max(1, asked.token_limit)  # the answer is thrown away for 0
    stop: Sequence[str] = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    return {**own, "stop": stop}
