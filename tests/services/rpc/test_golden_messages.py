"""Version skew: what programs of the last release sent is read as they meant it, and written again
as they wrote it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from s2t_shared.config import DefaultsConfig
from services.rpc import wire
from tests.services.rpc.golden_messages import kinds, recorded

GOLDEN = recorded()


def sent(name: str) -> bytes:
    return base64.b64decode(GOLDEN[name]["bytes"])


def received(name: str) -> Any:
    return GetMessageClass(kinds()[name]).FromString(sent(name))


def test_there_are_messages() -> None:
    assert len(GOLDEN) > 25 and set(GOLDEN) <= set(kinds()), "a message was taken away"


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_an_old_message_means_what_it_meant(name: str) -> None:
    message = received(name)
    assert MessageToDict(message, preserving_proto_field_name=True) == GOLDEN[name]["means"]
    assert message.SerializeToString(deterministic=True) == sent(name)
    assert len(UnknownFieldSet(message)) == 0


READERS: dict[str, Callable[[Any], Any]] = {
    "GenerateRequest": lambda m: wire.read_request(m, DefaultsConfig(), None),
    "StreamGenerateRequest": lambda m: wire.read_request(m, DefaultsConfig(), None),
    "StreamGenerateResponse": wire.read_piece,
    "Answer": wire.read_answer,
    "DescribeServiceResponse": wire.read_description,
    "Version": wire.read_version,
    "CountLabelsResponse": wire.read_label_counts,
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_this_program_understands_an_old_message(name: str) -> None:
    value = READERS[name](received(f"s2t.v1.{name}"))
    assert value is not None


def test_an_old_proposer_is_answered() -> None:
    message = received("s2t.v1.ScoreRequest")
    assert (message.vocab_size, message.sequence_id) == (6, "sequence_id")
    del message.positions[:], message.candidate_counts[:]
    message.positions.extend([0, 1])
    message.candidate_counts.extend([1, 1])
    query = wire.read_query(message)
    assert query.token_ids == (1, 1) and query.candidate_ids == ((3,), (3,))
    assert wire.write_query(query) == message
