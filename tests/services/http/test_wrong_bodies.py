"""Bodies with very many wrong values: none of them is described at length, for that took seconds of
the gateway's only loop."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from s2t_shared.errors import InvalidRequestError
from services.http.requests import MAX_ERRORS, ChatRequest, CompletionRequest, OpenAIRequest, parse

MANY = 10_000
WRONG: list[Any] = [{}] * MANY


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (CompletionRequest, "prompt", WRONG),
        (CompletionRequest, "prompt", [WRONG]),
        (CompletionRequest, "stop", WRONG),
        (ChatRequest, "messages", WRONG),
        (ChatRequest, "messages", [{"role": "user", "content": WRONG}]),
    ],
)
def test_the_first_wrong_element_ends_a_list(
    kind: type[OpenAIRequest], field: str, value: Any
) -> None:
    body = json.dumps({"model": "m", "prompt": "x", field: value}).encode()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(body)
    assert caught.value.error_count() < 10
    with pytest.raises(InvalidRequestError, match=field):
        parse(kind, body)


def test_many_unknown_fields_are_counted_only() -> None:
    body = json.dumps({"model": "m", "prompt": "x", **{f"k{i}": 1 for i in range(MAX_ERRORS + 1)}})
    with pytest.raises(InvalidRequestError, match="101 values are wrong"):
        parse(CompletionRequest, body.encode())
