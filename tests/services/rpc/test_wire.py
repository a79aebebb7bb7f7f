"""The wire in both directions: reading what was written gives the value back, for every type and field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.config import DefaultsConfig
from s2t_shared.errors import InvalidRequestError
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
    Policy,
    Prompt,
    Proposals,
    PublishedVersion,
    Sampling,
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


def test_what_a_service_says_survives() -> None:
    description = ServiceDescription(
        slm_digest="a",
        tokenizer_digest="b",
        template_digest="c",
        llm_digest="d",
        max_length=5,
        live_version="v1",
        canary_version="v2",
        canary_share=0.25,
        calibrated_triggers=(Trigger.KL, Trigger.MARGIN),
        proposers=2,
        running_sequences=3,
        waiting_sequences=4,
        live_kv_slots=6,
    )
    assert wire.read_description(wire.write_description(description)) == description
    version = PublishedVersion(
        name="v1",
        kind="prefix",
        reads="base",
        live=True,
        created_at=1.5,
        share=0.75,
        metrics={"agree_at_1": 0.5},
    )
    assert wire.read_version(wire.write_version(version)) == version
    counts = LabelCounts(1, 2, 3, 4)
    assert wire.read_label_counts(wire.write_label_counts(counts)) == counts


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


@pytest.mark.parametrize("settings", [{"mode": "nope"}, {"trigger": "x"}, {"colour": "red"}])
def test_an_unknown_setting_is_named(settings: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="unknown mode, trigger or setting"):
        wire.write_settings("p", **settings)
