"""The wire in both directions: reading what was written gives the value back, for every field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.config import DefaultsConfig
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.pb.v1 import admin_pb2, selection_pb2
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    CandidateRule,
    ChosenBy,
    DecodeOptions,
    FinishReason,
    GenerateRequest,
    LabelCounts,
    LabelOptions,
    LabelRule,
    Message,
    Mode,
    OnLLMFailure,
    Policy,
    PositionScores,
    Prompt,
    Proposals,
    PublishedVersion,
    Sampling,
    ScoreQuery,
    ScoreReply,
    ServiceDescription,
    Step,
    Trigger,
    Usage,
    Versions,
)
from services.rpc import wire

REAL = st.floats(-1e6, 1e6)
REAL32 = st.floats(-1e6, 1e6, width=32)
COUNT = st.integers(0, 2**31 - 1)
IDS = st.lists(COUNT, max_size=4).map(tuple)
SOME_IDS = st.lists(COUNT, min_size=1, max_size=4).map(tuple)
TEXT = st.text(max_size=8)
TRIGGERS = st.sampled_from(Trigger)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


MESSAGES = st.lists(st.builds(Message, role=TEXT, content=TEXT), min_size=1, max_size=2).map(tuple)
PROMPTS = (
    st.builds(Prompt, text=TEXT)
    | st.builds(Prompt, messages=MESSAGES)
    | st.builds(Prompt, token_ids=SOME_IDS)
)
POLICIES = st.builds(
    Policy,
    mode=st.sampled_from(Mode),
    trigger=TRIGGERS,
    candidates=st.builds(CandidateRule, st.integers(1, 64), REAL),
    proposals=st.sampled_from(Proposals),
)
OPTIONS = st.builds(
    DecodeOptions,
    policy=POLICIES,
    sampling=st.builds(Sampling, REAL, REAL, COUNT, COUNT),
    max_new_tokens=COUNT,
    version=maybe(st.text("v0123456789-", max_size=6)),
    score_rollout=st.booleans(),
    fresh_selections=st.booleans(),
    on_llm_failure=st.sampled_from(OnLLMFailure),
)
LABELS = st.builds(
    LabelOptions,
    store=st.booleans(),
    task=TEXT,
    problem_id=TEXT,
    split=st.text(min_size=1, max_size=5),
    triggers=st.lists(TRIGGERS, max_size=2).map(tuple),
    budget=REAL,
    rules=st.lists(st.builds(LabelRule, TRIGGERS, REAL), max_size=2).map(tuple),
    durable=st.booleans(),
    collect=st.booleans(),
)
REQUESTS = st.builds(
    GenerateRequest,
    request_id=st.text(min_size=1, max_size=5),
    prompt=PROMPTS,
    options=OPTIONS,
    budget=REAL,
    samples=COUNT,
    stop=st.lists(TEXT, max_size=2).map(tuple),
    timeout_s=st.floats(0, 1e6),
    return_steps=st.booleans(),
    labels=LABELS,
)
STEPS = st.builds(
    Step,
    index=COUNT,
    token_id=COUNT,
    chosen_by=st.sampled_from(ChosenBy),
    triggered=st.booleans(),
    signal=maybe(REAL),
    candidate_ids=IDS,
    scores=st.lists(REAL32, max_size=4).map(tuple),
    slm_top_id=maybe(COUNT),
    llm_top_id=maybe(COUNT),
    llm_top_rank=maybe(st.integers(-1, 63)),
    entropy=maybe(REAL),
    kl=maybe(REAL),
    degraded=TEXT,
    text=TEXT,
)
USAGES = st.builds(
    Usage,
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    triggers=COUNT,
    flips=COUNT,
    llm_forwards=COUNT,
    degraded_steps=COUNT,
)
ANSWERS = st.builds(
    Answer,
    token_ids=IDS,
    text=TEXT,
    finish_reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    usage=USAGES,
    versions=st.builds(Versions, TEXT, TEXT, TEXT),
    steps=st.lists(STEPS, max_size=2).map(tuple),
    labels_stored=COUNT,
    rollout=st.binary(max_size=4),
)
DESCRIPTIONS = st.builds(
    ServiceDescription,
    slm_digest=TEXT,
    tokenizer_digest=TEXT,
    template_digest=TEXT,
    llm_digest=TEXT,
    llm_reachable=st.booleans(),
    max_length=COUNT,
    live_version=TEXT,
    canary_version=TEXT,
    canary_share=REAL,
    calibrated_triggers=st.lists(TRIGGERS, max_size=3).map(tuple),
    proposers=COUNT,
    running_sequences=COUNT,
    waiting_sequences=COUNT,
    live_kv_slots=COUNT,
)
VERSIONS = st.builds(
    PublishedVersion,
    name=TEXT,
    kind=TEXT,
    reads=TEXT,
    live=st.booleans(),
    created_at=REAL,
    share=REAL,
    metrics=st.dictionaries(TEXT, REAL, max_size=2),
)
PIECES = st.builds(AnswerPiece, TEXT, st.lists(STEPS, max_size=2).map(tuple), maybe(ANSWERS))


@given(REQUESTS, st.booleans())
def test_a_request_survives(request: GenerateRequest, by_threshold: bool) -> None:
    """No default of the deployment may creep into a request that says everything."""
    defaults = DefaultsConfig(mode=Mode.LLM, budget=0.5, candidates=3, store_labels=True)
    if by_threshold:
        policy = Policy(mode=Mode.S2T, threshold=1.25, candidates=CandidateRule(5, 0.0))
        request = GenerateRequest(
            request_id=request.request_id,
            prompt=request.prompt,
            options=DecodeOptions(policy=policy),
            labels=request.labels,
        )
    message = pb.GenerateRequest(
        request_id=request.request_id, parameters=wire.write_request(request)
    )
    sent = pb.GenerateRequest.FromString(message.SerializeToString())
    assert wire.read_request(sent, defaults, None) == request


@given(ANSWERS)
def test_an_answer_survives(answer: Answer) -> None:
    sent = pb.Answer.FromString(wire.write_answer(answer).SerializeToString())
    assert wire.read_answer(sent) == answer


@given(PIECES)
def test_a_piece_survives(piece: AnswerPiece) -> None:
    message = wire.write_piece("r", piece)
    assert message.request_id == "r"
    sent = pb.StreamGenerateResponse.FromString(message.SerializeToString())
    assert wire.read_piece(sent) == piece


@given(DESCRIPTIONS)
def test_a_description_survives(description: ServiceDescription) -> None:
    message = wire.write_description(description).SerializeToString()
    assert wire.read_description(pb.DescribeServiceResponse.FromString(message)) == description


@given(VERSIONS)
def test_a_version_survives(version: PublishedVersion) -> None:
    message = wire.write_version(version).SerializeToString()
    assert wire.read_version(admin_pb2.Version.FromString(message)) == version


@given(st.builds(LabelCounts, COUNT, COUNT, COUNT, COUNT))
def test_label_counts_survive(counts: LabelCounts) -> None:
    message = wire.write_label_counts(counts).SerializeToString()
    assert wire.read_label_counts(admin_pb2.CountLabelsResponse.FromString(message)) == counts


@given(st.data())
def test_a_query_and_its_reply_survive(data: st.DataObject) -> None:
    """Ragged groups of candidates, empty ones among them, come back in their places."""
    groups = data.draw(st.lists(IDS, min_size=1, max_size=4))
    query = ScoreQuery(
        token_ids=tuple(range(len(groups))) + data.draw(IDS),
        positions=tuple(range(len(groups))),
        candidate_ids=tuple(groups),
        excluded_ids=data.draw(IDS),
        vocab_size=data.draw(COUNT),
        sequence_id=data.draw(TEXT),
    )
    sent = selection_pb2.ScoreRequest.FromString(wire.write_query(query).SerializeToString())
    assert wire.read_query(sent) == query
    positions = []
    for group in groups:
        log_probs = data.draw(st.lists(REAL32, min_size=len(group), max_size=len(group)))
        positions.append(PositionScores(tuple(log_probs), data.draw(COUNT)))
    reply = ScoreReply(tuple(positions), data.draw(TEXT))
    answer = selection_pb2.ScoreResponse.FromString(
        wire.write_reply(reply, "tok").SerializeToString()
    )
    assert wire.read_reply(query, answer) == reply


def test_a_reply_that_does_not_fit_is_refused() -> None:
    query = ScoreQuery(token_ids=(1,), positions=(0,), candidate_ids=((5, 6),))
    for log_probs, top_ids in (([-1.0], [5]), ([-1.0, -2.0], []), ([-1.0, -2.0, -3.0], [5])):
        response = selection_pb2.ScoreResponse(log_probs=log_probs, top_ids=top_ids)
        with pytest.raises(SelectorUnavailableError, match="does not fit its query"):
            wire.read_reply(query, response)


def test_steps_are_streamed_only_where_they_can_be() -> None:
    """`stream_steps` is of the streaming call."""
    parameters = wire.write_settings("a prompt")
    streamed = pb.StreamGenerateRequest(parameters=parameters, stream_steps=True)
    assert wire.read_request(streamed, DefaultsConfig(), None).stream_steps
    whole = pb.GenerateRequest(parameters=parameters)
    assert not wire.read_request(whole, DefaultsConfig(), None).stream_steps


def test_what_a_person_leaves_out_is_the_deployments_choice() -> None:
    defaults = DefaultsConfig(mode=Mode.TAKEOVER, trigger=Trigger.MARGIN, budget=0.07)

    def read(**settings: Any) -> GenerateRequest:
        parameters = wire.write_settings("a prompt", **settings)
        return wire.read_request(pb.StreamGenerateRequest(parameters=parameters), defaults, None)

    bare = read()
    assert bare.options.policy.mode is Mode.TAKEOVER and bare.budget == 0.07
    named = read(mode="majority@4", trigger="kl-reverse", sampling={"seed": 3}, version="none")
    assert named.options.policy.mode is Mode.MAJORITY and named.samples == 4
    assert named.options.policy.trigger is Trigger.KL_REVERSE
    assert named.options.sampling == Sampling(seed=3) and named.options.version == ""
    labels = LabelOptions(store=True, task="t", triggers=(Trigger.KL,))
    assert read(labels=labels).labels == labels


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "nope"}, "mode='nope': unknown"),
        ({"mode": "greedy@3"}, "only majority takes a number"),
        ({"trigger": "x"}, "trigger='x': unknown"),
        ({"colour": "red"}, "unknown setting.*colour"),
        ({"sampling": {"warmth": 1}}, "unknown setting.*warmth"),
        ({"budget": 0.1, "threshold": 0.5}, "not both"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        wire.write_settings("p", **settings)


@pytest.mark.parametrize("second", [{"role": "user"}, {"role": "u", "text": "x"}, "text", 3])
def test_a_wrong_chat_message_is_named(second: Any) -> None:
    with pytest.raises(InvalidRequestError, match="message 1 must have the keys role and content"):
        wire.write_settings([{"role": "user", "content": "x"}, second])


def test_modes_are_named_as_everywhere() -> None:
    """Members of the enum, capitals and dashes name a mode too."""
    for mode in (Mode.S2T_LOCAL, "s2t_local", "S2T_LOCAL", "s2t-local"):
        assert wire.write_settings("p", mode=mode).mode == pb.MODE_S2T_LOCAL
    assert not wire.write_settings("p", mode="majority").HasField("samples")
