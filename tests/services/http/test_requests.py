"""Requests of any form: each is read, or refused as the client's mistake."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t_shared.errors import InvalidRequestError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import Mode
from services.http.requests import (
    ChatRequest,
    CompletionRequest,
    ModelNames,
    OpenAIRequest,
    Settings,
    messages_of,
    mode_of,
    parse,
)

NAMES = ModelNames("mini")
CHAT: dict[str, Any] = {"model": "mini", "messages": [{"role": "user", "content": "a"}]}
FIELDS = {**ChatRequest.model_fields, **CompletionRequest.model_fields, **Settings.model_fields}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def read(kind: type[OpenAIRequest], given: Any) -> list[pb.StreamGenerateRequest]:
    asked = parse(kind, json.dumps(given).encode())
    return messages_of(asked, mode_of(asked, NAMES, Mode.S2T), "id")


@settings(max_examples=100, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted(FIELDS)), ANY_JSON, max_size=4), s2t=ANY_JSON)
def test_no_request_is_an_unexpected_error(fields: dict[str, Any], s2t: Any) -> None:
    """What is read fits the wire; everything else is the client's mistake, and says so."""
    for kind in (ChatRequest, CompletionRequest):
        for given_fields in ({**CHAT, **fields}, {"model": "mini", "s2t": s2t, **fields}):
            try:
                messages = read(kind, given_fields)
            except InvalidRequestError as error:
                assert str(error)
            else:
                assert all(message.SerializeToString() for message in messages)


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=64))
def test_no_body_is_an_unexpected_error(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse(ChatRequest, body)


def test_what_is_left_out_stays_unset() -> None:
    """Else the deployment's defaults would not apply."""
    [message] = read(ChatRequest, CHAT)
    given_fields = {field.name for field, _ in message.parameters.ListFields()}
    assert given_fields == {"messages", "mode", "sampling"}
    assert not message.stream_steps and message.request_id == "id"


def test_each_choice_has_its_own_seed_and_id() -> None:
    """Drawn with one seed they would all be the same."""
    sample = {**CHAT, "model": "mini:sample", "n": 3, "seed": 7, "temperature": 0.5}
    messages = read(ChatRequest, sample)
    assert [m.parameters.sampling.seed for m in messages] == [7, 8, 9]
    assert [m.request_id for m in messages] == ["id-0", "id-1", "id-2"]
    assert {m.parameters.sampling.temperature for m in messages} == {0.5}
    first, second = (read(ChatRequest, {**CHAT, "model": "mini:sample"}) for _ in range(2))
    assert first[0].parameters.sampling.seed != second[0].parameters.sampling.seed


def test_sampling_at_temperature_zero_is_greedy() -> None:
    [message] = read(ChatRequest, {**CHAT, "model": "mini:sample", "temperature": 0})
    assert message.parameters.mode == pb.MODE_GREEDY


def test_majority_keeps_its_number_and_k_is_candidates() -> None:
    asked = {**CHAT, "model": "mini:majority@5", "s2t": {"k": 3, "labels": {"task": "t"}}}
    [message] = read(ChatRequest, asked)
    parameters = message.parameters
    assert (parameters.mode, parameters.samples) == (pb.MODE_MAJORITY, 5)
    assert (parameters.candidates, parameters.labels.task) == (3, "t")
