"""What the wire refuses, fills in and counts, message by message."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from s2t_shared import errors
from s2t_shared.config import DefaultsConfig
from s2t_shared.decode.decide import with_figures
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import selection_pb2
from s2t_shared.types import (
    Answer,
    ChosenBy,
    FinishReason,
    LabelRule,
    Mode,
    OnLLMFailure,
    PositionScores,
    Proposals,
    ScoreQuery,
    ScoreReply,
    Step,
    Support,
    Trigger,
    Usage,
    Versions,
)
from services.rpc import wire
from services.rpc.wire import selection


def test_score_survives_the_wire() -> None:
    """Ragged candidate groups, an empty one among them, come back in their places."""
    query = ScoreQuery(
        token_ids=(1, 2, 3),
        positions=(0, 1, 2),
        candidate_ids=((5, 6), (), (7,)),
        excluded_ids=(9,),
        vocab_size=11,
        sequence_id="s",
    )
    assert (
        wire.read_query(
            selection_pb2.ScoreRequest.FromString(wire.write_query(query).SerializeToString())
        )
        == query
    )
    reply = ScoreReply(
        (PositionScores((-0.5, -1.5), 5), PositionScores((), 2), PositionScores((-2.0,), 7)), "d"
    )
    sent = selection_pb2.ScoreResponse.FromString(
        wire.write_reply(reply, "tok").SerializeToString()
    )
    assert (sent.llm_digest, sent.tokenizer_digest) == ("d", "tok")
    assert wire.read_reply(query, sent) == reply


def test_inconsistent_score_request_is_refused() -> None:
    request = selection_pb2.ScoreRequest(
        token_ids=[1], positions=[0], candidate_ids=[1, 2], candidate_counts=[1]
    )
    with pytest.raises(errors.InvalidRequestError, match="add up to 1"):
        wire.read_query(request)


@pytest.mark.parametrize(
    ("counts", "positions", "tokens", "message"),
    [
        ([1], [0, 0], 2, "candidate_counts: 1 given for 2 positions"),
        ([1, 1], [0], 2, "2 given for 1 positions"),
        ([1, 1], [0, 1], 1, "positions: 2 given for 1 token_ids"),
        ([], [], 0, "add up to 0"),
        ([65], [0], 1, "at most 64"),
        ([1] * 200_000, [0] * 200_000, 9, "positions: 200000 given for 9 token_ids"),
    ],
)
def test_score_counts_are_checked_first(
    counts: list[int], positions: list[int], tokens: int, message: str
) -> None:
    request = selection_pb2.ScoreRequest(
        token_ids=[1] * tokens,
        positions=positions,
        candidate_counts=counts,
        candidate_ids=[1] * max(1, sum(counts)),
    )
    with pytest.raises(errors.InvalidRequestError, match=message):
        wire.read_query(request)


class CountingList(list):
    """Counts the elements that slices of it, and slices of those, copy."""

    copied = 0

    def __getitem__(self, where):
        found = super().__getitem__(where)
        if not isinstance(where, slice):
            return found
        CountingList.copied += len(found)
        return CountingList(found)


def test_score_is_parsed_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 groups of one took 20 s of the selector's event loop: each group copied the rest."""
    n = 2_000
    ones = CountingList([1] * n)
    request = SimpleNamespace(
        token_ids=ones,
        positions=CountingList(range(n)),
        candidate_ids=ones,
        candidate_counts=ones,
        excluded_ids=CountingList(),
        vocab_size=0,
        sequence_id="",
    )
    monkeypatch.setattr(selection, "list", CountingList, raising=False)
    monkeypatch.setattr(CountingList, "copied", 0)
    assert selection.read_query(request).candidate_ids == ((1,),) * n
    assert CountingList.copied <= 4 * n


def asked(parameters: pb.GenerationParameters) -> pb.GenerateRequest:
    return pb.GenerateRequest(parameters=parameters)


def test_request_defaults_and_fields() -> None:
    """What a client leaves out comes from the deployment; what it says is kept."""
    defaults = DefaultsConfig(
        mode=Mode.S2T_LOCAL, trigger=Trigger.MARGIN, budget=0.03, candidates=5, store_labels=True
    )
    bare = wire.read_request(asked(pb.GenerationParameters(text="x")), defaults, 7.0)
    assert (bare.options.policy.mode, bare.options.policy.trigger, bare.budget) == (
        Mode.S2T_LOCAL,
        Trigger.MARGIN,
        0.03,
    )
    assert (
        bare.options.policy.candidates.k == 5
        and bare.labels.store
        and bare.timeout_s == 7.0
        and bare.request_id
    )
    assert bare.options.version is None and bare.labels.problem_id == ""
    full = wire.read_request(
        asked(
            pb.GenerationParameters(
                token_ids=pb.TokenIds(ids=[1, 2]),
                mode=pb.MODE_TAKEOVER,
                trigger=pb.TRIGGER_KL,
                threshold=0.0,
                candidates=3,
                proposals=pb.PROPOSALS_ADAPTED,
                sampling=pb.Sampling(temperature=0.0, seed=4),
                samples=2,
                stop=["."],
                timeout_seconds=1.5,
                version="none",
                labels=pb.LabelOptions(store=False),
            )
        ),
        defaults,
        7.0,
    )
    assert (
        full.budget is None
        and full.options.policy.threshold == 0.0
        and full.options.policy.proposals is Proposals.ADAPTED
    )
    assert (
        full.options.sampling.temperature == 0.0
        and full.options.version == ""
        and not full.labels.store
    )
    assert full.prompt.token_ids == (1, 2) and full.timeout_s == 1.5 and full.stop == (".",)
    for default in OnLLMFailure:
        defaults = DefaultsConfig(on_llm_failure=default)
        bare = wire.read_request(asked(pb.GenerationParameters(text="x")), defaults, 7.0)
        assert bare.options.on_llm_failure is default
        for chosen in OnLLMFailure:
            said = wire.write_settings("x", on_llm_failure=chosen.value)
            read = wire.read_request(asked(said), defaults, 7.0)
            assert read.options.on_llm_failure is chosen
    for wanted, left, effective in (
        (9.0, 7.0, 7.0),
        (0.0, 7.0, 7.0),
        (9.0, None, 9.0),
        (0.0, None, 0.0),
    ):
        limited = asked(pb.GenerationParameters(text="x", timeout_seconds=wanted))
        assert wire.read_request(limited, defaults, left).timeout_s == effective
    harvest = wire.read_request(
        asked(
            pb.GenerationParameters(
                text="x",
                labels=pb.LabelOptions(
                    collect=True, rules=[pb.LabelRule(trigger=pb.TRIGGER_KL, threshold=0.5)]
                ),
            )
        ),
        DefaultsConfig(),
        None,
    )
    assert harvest.labels.collect and not harvest.labels.durable and not harvest.labels.store
    assert harvest.labels.rules == (LabelRule(Trigger.KL, 0.5),)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (pb.GenerationParameters(), "prompt: missing"),
        (pb.GenerationParameters(text="x", mode=99), "mode=99: unknown"),  # type: ignore[arg-type]
        (pb.GenerationParameters(text="x", trigger=99), "trigger=99: unknown"),  # type: ignore[arg-type]
    ],
)
def test_bad_requests_name_the_field(parameters: pb.GenerationParameters, message: str) -> None:
    with pytest.raises(errors.InvalidRequestError, match=message):
        wire.read_request(asked(parameters), DefaultsConfig(), None)


def test_answer_on_the_wire() -> None:
    """Steps carry what the LLM and the SLM said, ranks and divergence included."""
    support = Support((4, 5, 6), (-0.2, -2.0, -3.0))
    llm = PositionScores((-3.0, -0.1, -4.0), 5)
    step = Step(
        index=3,
        token_id=5,
        chosen_by=ChosenBy.LLM,
        triggered=True,
        signal=0.7,
        candidate_ids=(4, 5),
        scores=(-3.0, -0.1),
        slm_top_id=4,
        llm_digest="b",
        support=support,
        llm=llm,
    )
    answer = Answer(
        token_ids=(1, 5),
        text="t",
        finish_reason=FinishReason.LENGTH,
        usage=Usage(
            prompt_tokens=2,
            completion_tokens=2,
            triggers=1,
            flips=1,
            llm_forwards=1,
            degraded_steps=0,
        ),
        versions=Versions("a", "b", "c"),
        steps=(step,),
    )
    answer = replace(answer, steps=(with_figures(replace(step, text="five")),), labels_stored=1)
    sent = wire.write_answer(answer)
    assert sent.finish_reason == pb.FINISH_REASON_LENGTH
    assert sent.usage.flips == sent.labels_stored == 1
    (told,) = sent.steps
    assert told.slm_top_id == 4 and told.llm_top_id == 5 and told.llm_top_rank == 1
    assert told.chosen_by == pb.CHOSEN_BY_LLM and told.kl > 0.5 and told.text == "five"
    assert told.llm_digest == "b" and wire.read_step(told).llm_digest == "b"
