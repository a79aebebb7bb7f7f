"""The engine's rules with scripted models: statuses, LLM calls, drafts, Steps as they are handed
out."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.scripted import ScriptedSelector, ScriptedSLM
from s2t_shared.decode.sequence import LiveSequence, SequenceStatus
from s2t_shared.types import (
    ChosenBy,
    DecodeOptions,
    DecodeRequest,
    FinishReason,
    Mode,
    OnLLMFailure,
    Policy,
    PositionScores,
    ScoreQuery,
    ScoreReply,
    Step,
    Trigger,
)

WORDS = ("a", "b", "c", "d", "e", "f", "g")
S2T = Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.1)
ALWAYS = Policy(mode=Mode.S2T, trigger=Trigger.ALWAYS)
KL = Policy(mode=Mode.S2T, trigger=Trigger.KL, threshold=0.1)


def slm(**options: object) -> ScriptedSLM:
    return ScriptedSLM(WORDS, unsure_at=(4,), alternatives=("x",), **options)  # type: ignore[arg-type]


def request(policy: Policy, **options: object) -> DecodeRequest:
    made = DecodeOptions(policy=policy, **options)  # type: ignore[arg-type]
    return DecodeRequest(request_id="r", token_ids=(7, 8), options=made)


def words(model: ScriptedSLM, sequence: LiveSequence) -> str:
    return model.tokenizer.decode(sequence.output_ids).strip()


def run(engine: Engine, limit: int = 100) -> list[Step]:
    """Run to the end; returns the Steps in the order they were handed out."""
    handed_out: list[Step] = []
    for _ in range(limit):
        for _, steps in engine.step():
            handed_out += steps
        if engine.idle:
            return handed_out
        engine.wait(0.01)
    raise AssertionError("it does not end")


def test_the_llm_selects_at_the_divergence_point_only() -> None:
    model = slm()
    llm = ScriptedSelector(prefers=model.tokenizer.id_of("x"))
    engine = Engine(model, llm)
    sequence = engine.add(request(S2T))
    handed_out = run(engine)
    assert words(model, sequence) == "a b c d x f g"
    assert handed_out == sequence.steps
    assert [step.triggered for step in handed_out] == [i == 4 for i in range(8)]
    assert handed_out[4].chosen_by is ChosenBy.LLM and handed_out[4].flipped
    assert len(llm.queries) == 1 and sequence.finish_reason is FinishReason.STOP
    assert model.kv_slots_in_use == 0


def test_a_sequence_says_what_it_waits_for() -> None:
    """An operator who looks at a stuck batch must see who is waited for."""
    llm = ScriptedSelector(late=True)
    engine = Engine(slm(), llm, selection_timeout_s=60.0, max_num_seqs=1)
    first = engine.add(request(S2T))
    second = engine.add(request(S2T))
    assert first.status is second.status is SequenceStatus.WAITING
    engine.step()
    assert (first.status, second.status) == (SequenceStatus.RUNNING, SequenceStatus.WAITING)
    for _ in range(6):
        engine.step()
    assert first.status is SequenceStatus.AWAITING_LLM
    assert engine.load.running == engine.load.waiting == 1
    engine.cancel(first)
    engine.step()
    assert first.status is SequenceStatus.FINISHED
    assert first.finish_reason is FinishReason.CANCELLED
    assert second.status is SequenceStatus.RUNNING, "it takes the place in the same step"


def test_a_late_llm_degrades_the_step() -> None:
    """One late reply says nothing about the other selectors: the next step asks again. The client
    knows whom to leave alone, and it knows how long the engine waits."""
    llm = ScriptedSelector(late=True)
    model = slm()
    engine = Engine(model, llm, selection_timeout_s=0.01)
    sequence = engine.add(request(S2T))
    run(engine)
    assert words(model, sequence) == "a b c d e f g"
    assert [step.index for step in sequence.steps if step.degraded] == [4]
    assert sequence.steps[4].degraded == "the LLM was late"
    llm.late = False
    again = engine.add(request(S2T))
    run(engine)
    assert not again.steps[4].degraded
    assert [query.patience_s for query in llm.queries] == [0.01, 0.01]


@pytest.mark.parametrize(
    "reply",
    [
        ScoreReply(()),
        ScoreReply((PositionScores((), 1),)),
        ScoreReply((PositionScores((-1.0, math.nan), 1),)),
        ScoreReply((PositionScores((-1.0, -math.inf), 1),)),
        ScoreReply((PositionScores((-1.0, -1.0), -1),)),
        ScoreReply((PositionScores((-1.0, -1.0), 1 << 40),)),
    ],
)
@pytest.mark.parametrize("mode", [Mode.S2T, Mode.TAKEOVER])
def test_a_reply_that_cannot_be_true_degrades_the_step(reply: ScoreReply, mode: Mode) -> None:
    """Its top id became a token, and ended the thread that runs the engine."""

    class WrongSelector(ScriptedSelector):
        def _answer(self, query: ScoreQuery) -> Future[ScoreReply]:
            future: Future[ScoreReply] = Future()
            future.set_result(reply)
            return future

    model = slm()
    engine = Engine(model, WrongSelector())
    sequence = engine.add(request(replace(S2T, mode=mode)))
    run(engine)
    assert words(model, sequence) == "a b c d e f g"
    assert [bool(step.degraded) for step in sequence.steps] == [i == 4 for i in range(8)]
    assert "the LLM's reply" in sequence.steps[4].degraded


@pytest.mark.parametrize("failure", [{"available": False}, {"late": True}], ids=str)
@pytest.mark.parametrize(
    ("policy", "decided"),
    [(S2T, 4), (KL, 3), (Policy(mode=Mode.LLM), 0), (ALWAYS, 0)],
    ids=["s2t", "kl", "llm", "always"],
)
def test_an_answer_may_choose_to_fail(
    policy: Policy, decided: int, failure: dict[str, bool]
) -> None:
    """It ends where the LLM was needed first, and none of its steps did without."""
    model = slm()
    engine = Engine(model, ScriptedSelector(**failure), selection_timeout_s=0.01)  # type: ignore[arg-type]
    sequence = engine.add(request(policy, on_llm_failure=OnLLMFailure.FAIL))
    beside = engine.add(request(policy))
    run(engine)
    assert sequence.finish_reason is FinishReason.LLM_FAILED
    assert sequence.llm_failure in ("the scripted LLM is away", "the LLM was late")
    assert len(sequence.steps) == decided
    assert not sequence.usage.degraded_steps
    assert beside.finish_reason is FinishReason.STOP and beside.usage.degraded_steps
    assert model.kv_slots_in_use == 0


@pytest.mark.parametrize("policy", [ALWAYS, replace(ALWAYS, mode=Mode.LLM), KL], ids=str)
def test_each_step_says_which_llm_answered(policy: Policy) -> None:
    """The LLM can be replaced in the middle of an answer."""
    llm = ScriptedSelector(prefers=1, digest="old")
    engine = Engine(slm(), llm, max_draft_tokens=1)
    sequence = engine.add(request(policy, max_new_tokens=7))
    while len(sequence.steps) < 5:
        engine.step()
    llm.digest = "new"
    run(engine)
    digests = [step.llm_digest for step in sequence.steps]
    asked = [digest for digest in digests if digest]
    assert asked[0] == "old" and asked[-1] == "new" and asked == sorted(asked, reverse=True)
    for step in sequence.steps:
        assert bool(step.llm_digest) == (step.llm is not None)


def test_a_scored_rollout_says_which_llm_scored_it() -> None:
    engine = Engine(slm(), ScriptedSelector(digest="llm"))
    sequence = engine.add(request(Policy(), score_rollout=True))
    run(engine)
    assert {step.llm_digest for step in sequence.steps} == {"llm"}


@pytest.mark.parametrize("max_draft_tokens", [1, 3, 32])
def test_drafts_save_llm_calls_and_change_nothing(max_draft_tokens: int) -> None:
    model = slm()
    llm = ScriptedSelector(prefers=model.tokenizer.id_of("x"))
    engine = Engine(model, llm, max_draft_tokens=max_draft_tokens)
    sequence = engine.add(request(KL))
    handed_out = run(engine)
    assert words(model, sequence) == "a b c d x f g"
    assert handed_out == sequence.steps
    assert (len(llm.queries) == 5) == (max_draft_tokens == 1), "five steps are beyond the warm-up"


def test_a_scored_rollout_is_handed_out_when_it_is_scored() -> None:
    """Steps that were handed out are never replaced, so they wait for the LLM's view."""
    llm = ScriptedSelector()
    engine = Engine(slm(), llm)
    sequence = engine.add(request(Policy(), score_rollout=True))
    for _ in range(8):
        assert not any(steps for _, steps in engine.step())
    assert len(sequence.steps) == 8
    handed_out = run(engine)
    assert handed_out == sequence.steps
    assert all(step.llm is not None and step.kl is not None for step in handed_out)
    assert len(llm.queries) == 1


def test_a_stopping_criterion_ends_the_answer_and_its_rollout_is_still_scored() -> None:
    """A stop string used to cancel the sequence, and a harvest lost its labels."""
    model = slm()
    stop = model.tokenizer.id_of("c")
    asked = request(Policy(), score_rollout=True)
    engine = Engine(model, ScriptedSelector())
    sequence = engine.add(
        DecodeRequest(
            request_id="r",
            token_ids=asked.token_ids,
            options=asked.options,
            stopping=lambda token_id: token_id == stop,
        )
    )
    run(engine)
    assert words(model, sequence) == "a b c"
    assert sequence.finish_reason is FinishReason.STOP
    assert all(step.llm is not None for step in sequence.steps)


def test_a_stopping_criterion_cuts_a_draft() -> None:
    model = slm()
    stop = model.tokenizer.id_of("f")
    engine = Engine(model, ScriptedSelector())
    asked = request(KL)
    sequence = engine.add(
        DecodeRequest(
            request_id="r",
            token_ids=asked.token_ids,
            options=asked.options,
            stopping=lambda token_id: token_id == stop,
        )
    )
    handed_out = run(engine)
    assert words(model, sequence) == "a b c d e f"
    assert handed_out == sequence.steps


def test_llm_mode_goes_on_with_the_slm_and_says_why() -> None:
    engine = Engine(slm(), ScriptedSelector(available=False))
    sequence = engine.add(request(Policy(mode=Mode.LLM)))
    run(engine)
    assert {step.degraded for step in sequence.steps} == {"the scripted LLM is away"}
    assert {step.chosen_by for step in sequence.steps} == {ChosenBy.SLM}


def test_a_deadline_ends_a_sequence_that_waits_for_the_llm() -> None:
    llm = ScriptedSelector(late=True)
    engine = Engine(slm(), llm, selection_timeout_s=60.0)
    asked = request(S2T)
    sequence = engine.add(
        DecodeRequest(
            request_id="r",
            token_ids=asked.token_ids,
            options=asked.options,
            deadline=time.monotonic() + 0.05,
        )
    )
    handed_out = run(engine)
    assert sequence.finish_reason is FinishReason.DEADLINE
    assert [step.token_id for step in handed_out] == list(sequence.output_ids)
    assert not sequence.calls
