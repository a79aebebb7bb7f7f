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


LONG: dict[str, bytes] = {  # of 2 MiB each; the number is what one MiB of it took to parse, in ms
    "lists of ids, 400": b'{"model":"m","prompt":[' + 500_000 * b"[1]," + b"[1]]}",
    "lists that nobody reads, 480": b'{"model":"m","prompt":"x","user":[' + 700_000 * b"[],",
    "objects, 100": b'{"model":"m","prompt":"x","user":[' + 400_000 * b'{"":1},',
    "fields, 170": b'{"model":"m","prompt":"x"' + 200_000 * b',"k":1' + b"}",
    "strings, 30": b'{"model":"m","prompt":[' + 700_000 * b'"",' + b'""]}',
    "ids, 60": b'{"model":"m","prompt":[' + 1_000_000 * b"1," + b"1]}",
}


@pytest.mark.parametrize("case", LONG)
def test_bodies_of_very_many_values_are_not_parsed(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stopped all streams of the gateway for as long as it was parsed."""
    monkeypatch.setattr(CompletionRequest, "model_validate_json", None)
    with pytest.raises(InvalidRequestError, match="the body has more than"):
        parse(CompletionRequest, LONG[case])


def test_what_stands_in_a_text_is_no_value() -> None:
    """A prompt may be a table, or a program, with as many commas and brackets as it likes."""
    text = 40_000 * '{"a": [1, "\\", 2]}\n'
    body = json.dumps({"model": "m", "prompt": text}).encode()
    assert parse(CompletionRequest, body).prompt == text
    ids = [7] * 262_144  # as many as gateway.max_prompt_bytes allows
    assert (
        parse(CompletionRequest, json.dumps({"model": "m", "prompt": ids}).encode()).prompt == ids
    )


def test_many_unknown_fields_are_counted_only() -> None:
    body = json.dumps({"model": "m", "prompt": "x", **{f"k{i}": 1 for i in range(MAX_ERRORS + 1)}})
    with pytest.raises(InvalidRequestError, match="101 values are wrong"):
        parse(CompletionRequest, body.encode())
