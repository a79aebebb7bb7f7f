"""What is read of outside bytes, one function each: bytes in, and only the errors that are
documented come out. Run by atheris (`python -m tests.fuzz.atheris_targets`) and, shortly, by the
ordinary suite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from s2t_shared.config import Config
from s2t_shared.decode.llm_calls import check_reply
from s2t_shared.decode.llm_selector import check_query
from s2t_shared.decode.selection_cache import decode_selection
from s2t_shared.errors import (
    ConfigError,
    InvalidRequestError,
    S2TError,
    SelectorUnavailableError,
)
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.packed import pack, read_rollout
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2
from s2t_shared.requests import check_request
from s2t_shared.types import ScoreQuery
from services.rpc import wire
from services.rpc.tokens import SCHEME, Tokens, parse_tokens
from services.serve.request_limits import RequestLimits, check_score_request

CONFIG = Config()
LIMITS = RequestLimits(CONFIG.gateway)
QUERY = ScoreQuery(
    token_ids=(1, 2), positions=(1,), candidate_ids=((3, 4),), excluded_ids=(7,), vocab_size=512
)


def request(sent: bytes) -> None:
    """What a gateway does with a client's message before any proposer sees it."""
    for kind in (pb.GenerateRequest, pb.StreamGenerateRequest):
        try:
            message = kind.FromString(sent)
            LIMITS.check(message)
            check_request(wire.read_request(message, CONFIG.defaults, 1.0))
        except (DecodeError, S2TError) as error:
            assert len(wire.public_text(str(error)).encode()) <= 1024


def selection(sent: bytes) -> None:
    """A proposer's query as a selector reads it, and a selector's reply as a proposer does."""
    try:
        message = selection_pb2.ScoreRequest.FromString(sent)
        check_score_request(message, max_length=99)
        query = wire.read_query(message)
        check_query(query, max_length=99, vocab_rows=512)
        assert wire.read_query(wire.write_query(query)) == query
    except (DecodeError, InvalidRequestError):
        pass
    try:
        reply = selection_pb2.ScoreResponse.FromString(sent)
        check_reply(QUERY, wire.read_reply(QUERY, reply))
    except (DecodeError, SelectorUnavailableError):
        pass


def tokens(sent: bytes) -> None:
    """The tokens' file; and what a caller sends in place of a token."""
    try:
        entries = parse_tokens(sent, Path("tokens"))
    except ConfigError as error:
        assert str(error).startswith("token file 'tokens'")
        return
    assert entries
    for entry in entries:
        assert entry.roles and len(entry.token) >= 16
        assert entry.digest == hashlib.sha256(entry.token.encode()).digest()


def authorization(sent: bytes) -> None:
    """Nothing but a token of the file has a role."""
    given = Tokens.__new__(Tokens)
    given._entries = _Fixed(parse_tokens(b"admin: 0123456789abcdef", Path("tokens")))  # type: ignore[assignment]
    word = sent.partition(b" ")
    is_right = word[0].lower() == SCHEME.encode() and word[2].strip() == b"0123456789abcdef"
    assert bool(given.role_of(sent)) == is_right
    assert bool(given.role_of(sent.decode("latin-1"))) == is_right


class _Fixed:
    def __init__(self, value: object) -> None:
        self.value = value


def label_entry(sent: bytes) -> None:
    """An entry of the label stream in Redis, as the drain takes it."""
    try:
        rollout = read_rollout(sent)
    except S2TError:
        return
    assert Rollout.from_json(rollout.to_json()) == rollout
    assert read_rollout(pack(rollout)).rollout_id == rollout.rollout_id


def cached_selection(sent: bytes) -> None:
    """A value of the selection cache in Redis: whatever stands there, a reply can be true."""
    reply = decode_selection(sent, QUERY, "llm")
    if reply is not None:
        check_reply(QUERY, reply)


def status_details(sent: bytes) -> None:
    """The trailing metadata of a failed call, as our clients read them."""
    wire.errors._read_details(sent)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "request": request,
    "selection": selection,
    "tokens": tokens,
    "authorization": authorization,
    "label_entry": label_entry,
    "cached_selection": cached_selection,
    "status_details": status_details,
}


def seeds(name: str) -> list[bytes]:
    """Good inputs to start from."""
    if name == "request":
        parameters = pb.GenerationParameters(
            text="a prompt", mode=pb.MODE_S2T, budget=0.1, stop=["x"], max_new_tokens=9
        )
        chat = pb.GenerationParameters(
            messages=pb.Messages(messages=[pb.Message(role="user", content="hi")]),
            labels=pb.LabelOptions(store=True, task="t", split="train"),
            sampling=pb.Sampling(temperature=0.5, seed=1),
            timeout_seconds=2.0,
        )
        ids = pb.GenerationParameters(token_ids=pb.TokenIds(ids=[1, 2, 3]), threshold=0.2)
        return [
            pb.GenerateRequest(request_id="r", parameters=p).SerializeToString()
            for p in (parameters, chat, ids)
        ]
    if name == "selection":
        reply = selection_pb2.ScoreResponse(log_probs=[-1.0, -2.0], top_ids=[3], llm_digest="llm")
        return [wire.write_query(QUERY).SerializeToString(), reply.SerializeToString()]
    if name == "tokens":
        return [b"# ours\ngenerate,admin: 0123456789abcdef\nscore: fedcba9876543210\n", b"a" * 16]
    if name == "authorization":
        return [b"Bearer 0123456789abcdef"]
    if name == "cached_selection":
        return [json.dumps([[[-1.0, -2.0], 3]]).encode()]
    if name == "label_entry":
        from tests.helpers.rollouts import make_rollout

        rollout = make_rollout(1)
        return [rollout.to_json().encode(), pack(rollout)]
    return []
