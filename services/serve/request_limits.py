"""What a client may ask at most, of a gateway and of a selector, checked on the message: before
anything is built, tokenized or sent to a proposer. Knows the wire and the settings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from s2t_shared.config import GatewayConfig
from s2t_shared.errors import InvalidRequestError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2
from s2t_shared.requests import MAX_STOP_STRINGS
from s2t_shared.types import MAX_CANDIDATES

MAX_NAME_LENGTH = 1024  # characters of an id, a task, a version, a role
MAX_RULES = 16
MAX_MESSAGES = 1024
MAX_SEQUENCE_NAME_LENGTH = 2048  # a request's id, and which of its sequences
MAX_EXCLUDED_IDS = 4096
BYTES_PER_ID = 4  # a token id counts so many bytes of a prompt


class RequestLimits:
    """The limits of one gateway."""

    def __init__(self, gateway: GatewayConfig) -> None:
        self._max_prompt_bytes = gateway.max_prompt_bytes
        self._max_new_tokens = gateway.max_new_tokens
        self._max_samples = gateway.max_samples

    def check(self, message: pb.GenerateRequest | pb.StreamGenerateRequest) -> None:
        """Raises InvalidRequestError: a field is too long, too large or no number; the text names
        it, and what is accepted."""
        parameters = message.parameters
        labels = parameters.labels
        for field, items, limit in (  # first: nothing below looks at more than these
            ("stop", len(parameters.stop), MAX_STOP_STRINGS),
            ("messages", len(parameters.messages.messages), MAX_MESSAGES),
            ("labels.rules", len(labels.rules), MAX_RULES),
            ("labels.triggers", len(labels.triggers), MAX_RULES),
        ):
            if items > limit:
                raise _too_many(field, items, "given", limit)
        for field, name in _names(message):
            if len(name) > MAX_NAME_LENGTH:
                raise _too_many(field, len(name), "characters", MAX_NAME_LENGTH)
        self._check_prompt(parameters)
        self._check_numbers(parameters)

    def _check_prompt(self, parameters: pb.GenerationParameters) -> None:
        field = parameters.WhichOneof("prompt")
        if field == "text":
            size = len(parameters.text.encode())
        elif field == "messages":
            size = sum(len(m.content.encode()) for m in parameters.messages.messages)
        else:
            size = BYTES_PER_ID * len(parameters.token_ids.ids)
        if size > self._max_prompt_bytes:
            raise _too_many(str(field), size, "bytes", self._max_prompt_bytes)

    def _check_numbers(self, parameters: pb.GenerationParameters) -> None:
        for field, limit in (
            ("max_new_tokens", self._max_new_tokens),
            ("samples", self._max_samples),
        ):
            value = getattr(parameters, field)
            if parameters.HasField(field) and not 1 <= value <= limit:
                raise InvalidRequestError(f"{field}={value}: must be 1..{limit}", field=field)
        seconds = parameters.timeout_seconds
        if not math.isfinite(seconds) or seconds < 0:
            raise InvalidRequestError(
                f"timeout_seconds={seconds}: must be 0 (no deadline) or a finite number of seconds",
                field="timeout_seconds",
            )


def check_score_request(message: selection_pb2.ScoreRequest, max_length: int) -> None:
    """Check how much a proposer asks of an LLM that reads at most `max_length` tokens.

    Raises:
        InvalidRequestError: naming the field that has too much.
    """
    for field, limit in (
        ("token_ids", max_length),
        ("positions", len(message.token_ids)),
        ("candidate_counts", len(message.positions)),
        ("candidate_ids", MAX_CANDIDATES * len(message.positions)),
        ("excluded_ids", MAX_EXCLUDED_IDS),
    ):
        size = len(getattr(message, field))
        if size > limit:
            raise _too_many(field, size, "given", limit)
    if len(message.sequence_id) > MAX_SEQUENCE_NAME_LENGTH:
        size = len(message.sequence_id)
        raise _too_many("sequence_id", size, "characters", MAX_SEQUENCE_NAME_LENGTH)


def _names(message: pb.GenerateRequest | pb.StreamGenerateRequest) -> Iterator[tuple[str, str]]:
    parameters = message.parameters
    labels = parameters.labels
    yield "request_id", message.request_id
    yield "version", parameters.version
    yield "labels.task", labels.task
    yield "labels.problem_id", labels.problem_id
    yield "labels.group", labels.group
    yield "labels.split", labels.split
    for chat in parameters.messages.messages:
        yield "messages.role", chat.role


def _too_many(field: str, size: int, unit: str, limit: int) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {size} {unit}, at most {limit} are accepted", field=field)
