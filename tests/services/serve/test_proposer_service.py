"""A proposer over a scripted SLM and a scripted LLM: what becomes of a request, in milliseconds."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from s2t_shared.decode.engine import EngineLoad
from s2t_shared.decode.generate import EncodedRequest
from s2t_shared.decode.scripted import ScriptedSelector, ScriptedTokenizer
from s2t_shared.errors import (
    ConfigError,
    DeadlineExceededError,
    EvaluationSplitError,
    OverloadedError,
    ProposerLostError,
    SelectorUnavailableError,
    VersionNotFoundError,
)
from s2t_shared.labels.label import Rollout
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    ChosenBy,
    DecodeOptions,
    GenerateRequest,
    LabelOptions,
    Mode,
    OnLLMFailure,
    Policy,
    Prompt,
    ScoreQuery,
    ScoreReply,
    Step,
    Trigger,
)
from services.serve.engine_thread import EngineThread
from services.serve.proposer_service import ProposerService
from tests.helpers.serving import (
    ALTERNATIVE,
    LLM_TEXT,
    SLM_TEXT,
    UNSURE_AT,
    FixedVersions,
    becomes,
    local_selector,
    proposer_service,
    scripted_llm,
    scripted_slm,
    slow_slm,
)

S2T = Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.3)
REQUEST = GenerateRequest(
    request_id="r", prompt=Prompt(text="a prompt"), options=DecodeOptions(policy=S2T)
)


def with_options(request: GenerateRequest, **options: Any) -> GenerateRequest:
    return replace(request, options=replace(request.options, **options))


def with_mode(mode: Mode, **fields: Any) -> GenerateRequest:
    return with_options(replace(REQUEST, **fields), policy=replace(S2T, mode=mode))


def run(service: ProposerService, work: Callable[[ProposerService], Awaitable[Any]]) -> Any:
    """The result of asynchronous work; the service has forgotten all requests afterwards."""

    async def main() -> Any:
        result = await work(service)
        assert await becomes(lambda: holds_nothing(service))
        return result

    try:
        return asyncio.run(main())
    finally:
        service.close()


def holds_nothing(service: ProposerService) -> bool:
    return service.ongoing_requests == 0 and service.load == EngineLoad(0, 0, 0)


def answer_of(service: ProposerService, request: GenerateRequest) -> Answer:
    answer: Answer = run(service, lambda s: s.answer(request))
    return answer


async def all_pieces(service: ProposerService, request: GenerateRequest) -> list[AnswerPiece]:
    return [piece async for piece in service.stream(request)]


# -- answers and their Steps ----------------------------------------------------------------------


def test_the_llm_selects_at_divergence_points() -> None:
    answer = answer_of(proposer_service(), replace(REQUEST, return_steps=True))
    assert answer.text == LLM_TEXT
    assert tuple(step.index for step in answer.steps) == UNSURE_AT
    assert all(step.chosen_by is ChosenBy.LLM and step.flipped for step in answer.steps)
    assert (answer.usage.triggers, answer.usage.flips) == (2, 2)
    assert (answer.versions.slm, answer.versions.llm) == ("scripted", "scripted")


def test_a_budget_becomes_the_threshold_of_the_calibration() -> None:
    request = with_options(replace(REQUEST, budget=0.01), policy=replace(S2T, threshold=9.0))
    assert answer_of(proposer_service(), request).text == LLM_TEXT


@pytest.mark.parametrize("mode", [Mode.GREEDY, Mode.S2T, Mode.TAKEOVER, Mode.SAMPLE, Mode.MAJORITY])
@pytest.mark.parametrize("score_rollout", [False, True], ids=["", "scored"])
@pytest.mark.parametrize("stop", [(), ("other six",), ("three",), ("eight nine",)], ids=str)
def test_streamed_steps_are_those_of_the_answer(
    mode: Mode, score_rollout: bool, stop: tuple[str, ...]
) -> None:
    """In order, each once, never different from the final ones; their text is the answer's."""
    request = with_options(
        with_mode(mode, stream_steps=True, return_steps=True, samples=3, stop=stop),
        score_rollout=score_rollout,
    )
    pieces: list[AnswerPiece] = run(proposer_service(), lambda s: all_pieces(s, request))
    assert all(piece.answer is None for piece in pieces[:-1])
    answer = pieces[-1].answer
    assert answer is not None
    steps = [step for piece in pieces for step in piece.steps]
    assert [step.index for step in steps] == list(range(len(answer.token_ids)))
    assert tuple(step.token_id for step in steps) == answer.token_ids
    assert "".join(step.text for step in steps) == answer.text
    assert "".join(piece.text for piece in pieces) == answer.text
    for piece in pieces:
        assert "".join(step.text for step in piece.steps) == piece.text
    shown = [s for s in steps if score_rollout or s.triggered or s.degraded]
    assert tuple(shown) == answer.steps
    if mode in (Mode.S2T, Mode.TAKEOVER) and stop in ((), ("eight nine",)):
        assert len([s for s in steps if s.triggered]) == len(UNSURE_AT)


def test_steps_come_as_they_are_decided() -> None:
    """Not only at the end: the first ones are there while the answer is being decoded."""

    async def first_steps(service: ProposerService) -> tuple[Step, ...]:
        stream = service.stream(replace(REQUEST, stream_steps=True))
        first = await anext(stream)
        await stream.aclose()
        return first.steps

    steps: tuple[Step, ...] = run(proposer_service(slow_slm()), first_steps)
    assert 1 <= len(steps) < 100 and steps[0].index == 0


def test_the_models_numbers_stay_in_the_process() -> None:
    request = with_options(
        replace(REQUEST, stream_steps=True, return_steps=True),
        score_rollout=True,
        keep_support=True,
    )
    pieces: list[AnswerPiece] = run(proposer_service(), lambda s: all_pieces(s, request))
    answer = pieces[-1].answer
    assert answer is not None
    steps = [*answer.steps, *(step for piece in pieces for step in piece.steps)]
    assert len(steps) == 2 * len(answer.token_ids)
    assert all(step.support is None and step.llm is None for step in steps)
    assert all(step.entropy is not None and step.kl is not None for step in steps)


def test_without_stream_steps_only_text_comes() -> None:
    pieces: list[AnswerPiece] = run(proposer_service(), lambda s: all_pieces(s, REQUEST))
    assert not any(piece.steps for piece in pieces)
    assert "".join(piece.text for piece in pieces) == LLM_TEXT


FAILING = with_options(REQUEST, on_llm_failure=OnLLMFailure.FAIL)

# -- without the LLM ------------------------------------------------------------------------------


def test_without_the_llm_answers_are_the_slms_and_say_so() -> None:
    """Law 5: a lost LLM degrades steps, it fails no request."""
    slm = scripted_slm()
    service = proposer_service(slm, ScriptedSelector(available=False))
    answer = answer_of(service, replace(REQUEST, return_steps=True))
    assert answer.text == SLM_TEXT
    assert answer.usage.degraded_steps == len(UNSURE_AT)
    assert all("away" in step.degraded for step in answer.steps)


def test_a_late_llm_degrades_too() -> None:
    slm = scripted_slm()
    service = proposer_service(slm, ScriptedSelector(late=True), selection_timeout_s=0.01)
    assert answer_of(service, REQUEST).usage.degraded_steps == len(UNSURE_AT)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (with_mode(Mode.LLM), "no selector .* can be reached, and mode llm"),
        (with_mode(Mode.S2T, labels=LabelOptions(collect=True)), "did not answer at 2 positions"),
    ],
    ids=["mode llm", "collected labels"],
)
def test_what_only_the_llm_can_give_is_unavailable(request_: GenerateRequest, message: str) -> None:
    """The LLM's own answer is never silently the SLM's, and labels are never silently missing."""
    service = proposer_service(scripted_slm(), ScriptedSelector(available=False))
    with pytest.raises(SelectorUnavailableError, match=message):
        answer_of(service, request_)


def test_an_answer_that_chose_to_fail_is_unavailable() -> None:
    """What was decided before has been streamed; the answer itself never comes."""
    slm = scripted_slm()
    service = proposer_service(slm, ScriptedSelector(late=True), selection_timeout_s=0.01)
    pieces: list[AnswerPiece] = []

    async def work(service: ProposerService) -> None:
        with pytest.raises(SelectorUnavailableError, match="behind token 4 .* chose to fail"):
            async for piece in service.stream(replace(FAILING, stream_steps=True)):
                pieces.append(piece)
        assert service.ongoing_requests == 0

    run(service, work)
    assert SLM_TEXT.startswith("".join(piece.text for piece in pieces))
    assert all(piece.answer is None for piece in pieces)
    assert not any(step.degraded for piece in pieces for step in piece.steps)


def test_an_answer_that_chose_to_fail_is_not_begun_without_an_llm() -> None:
    selector = ScriptedSelector(available=False)
    with pytest.raises(SelectorUnavailableError, match="chose to fail"):
        answer_of(proposer_service(scripted_slm(), selector), FAILING)
    assert not selector.queries


def test_an_answer_without_the_llm_cannot_fail_by_it() -> None:
    greedy = with_options(with_mode(Mode.GREEDY), on_llm_failure=OnLLMFailure.FAIL)
    service = proposer_service(scripted_slm(), ScriptedSelector(available=False))
    assert answer_of(service, greedy).text == SLM_TEXT


def test_an_llm_that_is_lost_before_its_first_step_makes_no_answer() -> None:
    service = proposer_service(
        scripted_slm(), ScriptedSelector(late=True), selection_timeout_s=0.01
    )
    with pytest.raises(SelectorUnavailableError, match="at none of the"):
        answer_of(service, with_mode(Mode.LLM))


def test_mode_llm_is_the_llms_answer() -> None:
    answer = answer_of(proposer_service(), with_options(with_mode(Mode.LLM), max_new_tokens=3))
    assert answer.text == " other other other" and answer.usage.llm_forwards == 3


# -- ends -----------------------------------------------------------------------------------------


def test_too_many_requests_are_refused_at_once() -> None:
    async def overload(service: ProposerService) -> None:
        streams = [service.stream(REQUEST) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(OverloadedError, match="2 requests are being answered"):
            await service.answer(REQUEST)
        await close(streams)
        assert (await service.answer(with_options(REQUEST, max_new_tokens=1))).text

    run(proposer_service(slow_slm(), max_ongoing_requests=2), overload)


async def close(streams: list[AsyncGenerator[AnswerPiece, None]]) -> None:
    for stream in streams:
        await stream.aclose()


def test_a_request_that_is_refused_takes_no_place() -> None:
    async def refused(service: ProposerService) -> None:
        for _ in range(3):
            with pytest.raises(VersionNotFoundError):
                await service.answer(with_options(REQUEST, version="v9"))
        await service.answer(REQUEST)

    run(proposer_service(max_ongoing_requests=1), refused)


def test_the_deadline_ends_an_answer() -> None:
    with pytest.raises(DeadlineExceededError, match=r"deadline of 0.02 s passed after \d+ tokens"):
        answer_of(proposer_service(slow_slm()), replace(REQUEST, timeout_s=0.02))


def test_a_burst_overshoots_nothing() -> None:
    """Requests were counted after an await: a burst passed the check together."""

    async def burst(service: ProposerService) -> list[Any]:
        calls = [service.answer(REQUEST) for _ in range(20)]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = run(proposer_service(slow_slm(max_length=40), max_ongoing_requests=5), burst)
    refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    assert len(refused) == 15 and all(error.retry_after_s for error in refused)


class SlowTokenizer(ScriptedTokenizer):
    """Takes seconds for a prompt that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.encoding = threading.Event()
        self.may_go_on = threading.Event()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.text == "slow":
            self.encoding.set()
            assert self.may_go_on.wait(5)
        return super().encode(prompt)


def test_tokenizing_stops_nobody_else() -> None:
    """A prompt of 4 MB stalled all streams of its replica for seconds."""
    tokenizer = SlowTokenizer()

    async def go_on_beside(service: ProposerService) -> None:
        stream = service.stream(REQUEST)
        await anext(stream)
        slow = replace(REQUEST, prompt=Prompt(text="slow"))
        call = asyncio.create_task(service.answer(with_options(slow, max_new_tokens=1)))
        assert await becomes(tokenizer.encoding.is_set)
        for _ in range(20):
            await anext(stream)
        tokenizer.may_go_on.set()
        assert (await call).text
        await stream.aclose()

    run(proposer_service(slow_slm(tokenizer=tokenizer)), go_on_beside)


def test_clients_take_turns() -> None:
    """What admission decides reaches the engine: who has asked for much waits for who has not."""

    async def ask(service: ProposerService) -> list[str]:
        ended: list[str] = []

        async def answer(client: str) -> None:
            await service.answer(replace(REQUEST, client=client))
            ended.append(client)

        calls = [asyncio.create_task(answer("much")) for _ in range(3)]
        await asyncio.sleep(0.02)
        await asyncio.gather(*calls, answer("little"))
        return ended

    ended = run(proposer_service(slow_slm(), max_num_seqs=1), ask)
    assert ended.index("little") < 3


def test_what_admission_decides_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By when to begin, and by when to end."""
    seen: list[EncodedRequest] = []
    submit = EngineThread.submit

    async def spy(self: EngineThread, encoded: EncodedRequest, *others: Any) -> Any:
        seen.append(encoded)
        return await submit(self, encoded, *others)

    monkeypatch.setattr(EngineThread, "submit", spy)

    async def ask(service: ProposerService) -> None:
        await service.answer(REQUEST)  # how long one takes
        first = asyncio.create_task(service.answer(REQUEST))
        assert await becomes(lambda: len(seen) == 2)
        await service.answer(replace(REQUEST, timeout_s=30.0))
        await first

    before = time.monotonic()
    run(proposer_service(slow_slm(), max_num_seqs=1), ask)
    last = seen[-1]
    assert last.deadline is not None and before < last.deadline - 30.0 < time.monotonic()
    assert last.start_by is not None and last.start_by < last.deadline


def test_the_deadline_is_counted_from_the_arrival() -> None:
    """Not from when the prompt was tokenized at last."""
    tokenizer = SlowTokenizer()

    async def late(service: ProposerService) -> None:
        slow = replace(REQUEST, prompt=Prompt(text="slow"), timeout_s=0.05)
        call = asyncio.create_task(service.answer(slow))
        await asyncio.sleep(0.1)
        tokenizer.may_go_on.set()
        with pytest.raises(DeadlineExceededError, match="after 0 tokens"):
            await call

    run(proposer_service(slow_slm(tokenizer=tokenizer)), late)


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
def test_cancelled_calls_leave_nothing(unary: bool) -> None:
    """More than fit the batch: some are cancelled while they run and some while they wait."""

    async def cancel_all(service: ProposerService) -> None:
        before = len(asyncio.all_tasks())

        async def ask(number: int) -> None:
            request = replace(REQUEST, request_id=str(number))
            await (service.answer(request) if unary else all_pieces(service, request))

        for _ in range(3):
            calls = [asyncio.create_task(ask(i)) for i in range(10)]
            assert await becomes(lambda: service.load == EngineLoad(4, 6, 4))
            for call in calls:
                call.cancel()
            assert await becomes(lambda: holds_nothing(service), 0.25)
            await asyncio.gather(*calls, return_exceptions=True)
        assert await becomes(lambda: len(asyncio.all_tasks()) <= before)

    run(proposer_service(slow_slm(), max_num_seqs=4), cancel_all)


def test_a_dead_engine_thread_is_unhealthy() -> None:
    service = proposer_service()
    service.check_health()
    service.close()
    with pytest.raises(RuntimeError, match="engine thread has died"):
        service.check_health()


@pytest.mark.parametrize("where", ["step", "tokenizer"])
def test_a_proposer_that_hangs_is_unhealthy_and_lets_its_answers_go(where: str) -> None:
    """Its threads are alive. The gateway asks another proposer, long before Serve has replaced
    this one."""
    slm = slow_slm()
    goes_on = threading.Event()
    if where == "step":
        slm.sleep = lambda _: goes_on.wait(20)  # type: ignore[assignment,return-value]
    else:
        slm.tokenizer.encode = lambda _: goes_on.wait(20)  # type: ignore[assignment,return-value]
    service = proposer_service(slm, stall_timeout_s=0.2)

    async def main() -> None:
        service.check_health()
        call = asyncio.create_task(service.answer(REQUEST))
        await asyncio.sleep(0.5)
        with pytest.raises(RuntimeError, match="hangs"):
            service.check_health()
        if where == "step":
            with pytest.raises(ProposerLostError):
                await asyncio.wait_for(call, 5)
        goes_on.set()
        await asyncio.gather(call, return_exceptions=True)

    asyncio.run(main())
    service.close()


# -- labels ---------------------------------------------------------------------------------------


def test_selections_are_collected_as_labels() -> None:
    labels = LabelOptions(collect=True, task="t", problem_id="p")
    answer = answer_of(proposer_service(), replace(REQUEST, labels=labels))
    rollout = Rollout.from_json(answer.rollout)
    assert (rollout.task, rollout.problem_id, rollout.source) == ("t", "p", "online")
    assert [label.position for label in rollout.labels] == [
        rollout.prompt_length + i for i in (4, 6)
    ]
    assert answer.labels_stored == 0 and json.loads(answer.rollout)["request_id"] == "r"


class ReplacedSelector(ScriptedSelector):
    """An LLM that is replaced by another one after its first reply."""

    def _answer(self, query: ScoreQuery) -> Future[ScoreReply]:
        reply = super()._answer(query)
        self.digest = "new"
        return reply


def test_an_llm_that_is_replaced_meanwhile_leaves_no_mixed_labels() -> None:
    """Labels carried the digest of the LLM that was known when the answer ended."""
    slm = scripted_slm()
    selector = ReplacedSelector(slm.tokenizer.id_of(ALTERNATIVE), digest="old")
    labels = LabelOptions(collect=True)
    service = proposer_service(slm, selector)
    with pytest.raises(SelectorUnavailableError, match="replaced by another one"):
        answer_of(service, replace(REQUEST, labels=labels))


def test_an_answer_says_which_llm_answered() -> None:
    slm = scripted_slm()
    selector = ReplacedSelector(slm.tokenizer.id_of(ALTERNATIVE), digest="old")
    answer = answer_of(proposer_service(slm, selector), replace(REQUEST, return_steps=True))
    assert [step.llm_digest for step in answer.steps] == ["old", "new"]
    assert answer.versions.llm == "new"
    degraded = answer_of(proposer_service(slm, ScriptedSelector(available=False)), REQUEST)
    assert degraded.versions.llm == "", "no LLM took part"


@pytest.mark.parametrize(
    ("mode", "source"), [(Mode.GREEDY, "plain"), (Mode.SAMPLE, "plain"), (Mode.S2T, "intervened")]
)
def test_a_scored_rollout_says_how_it_was_made(mode: Mode, source: str) -> None:
    labels = LabelOptions(collect=True, store=True, triggers=(Trigger.ENTROPY,))
    request = with_options(with_mode(mode, labels=labels), score_rollout=True)
    rollout = Rollout.from_json(answer_of(proposer_service(), request).rollout)
    assert rollout.source == source and len(rollout.labels) == len(UNSURE_AT)
    assert len(rollout.llm_top_rank) == len(rollout.token_ids) - rollout.prompt_length


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LabelOptions(store=True, split="test"), EvaluationSplitError, "evaluation split"),
        (LabelOptions(collect=True, split="dev"), EvaluationSplitError, "evaluation split"),
        (LabelOptions(store=True, durable=True), ConfigError, "no Redis is configured"),
    ],
)
def test_impossible_labels_are_refused_before_decoding(
    labels: LabelOptions, error: type[Exception], message: str
) -> None:
    slm = scripted_slm()
    selector = scripted_llm(slm)
    with pytest.raises(error, match=message):
        answer_of(proposer_service(slm, selector), replace(REQUEST, labels=labels))
    assert not selector.queries


# -- versions -------------------------------------------------------------------------------------

LIVE = local_selector("v1")
CANARY = local_selector("v2")
OLD = local_selector("v0")


def versions() -> FixedVersions:
    return FixedVersions(
        live=LIVE, on_trial=CANARY, share=0.3, canary_ids=frozenset({"c"}), others=[OLD]
    )


@pytest.mark.parametrize(
    ("request_id", "version", "served_by"),
    [
        ("a", None, "v1"),
        ("c", None, "v2"),
        ("c", "v1", "v1"),
        ("a", "v0", "v0"),
        ("c", "", ""),
    ],
)
def test_which_version_serves_a_request(
    request_id: str, version: str | None, served_by: str
) -> None:
    """The canary its share, a named version always; the answer names what served it."""
    request = with_options(with_mode(Mode.S2T_LOCAL, request_id=request_id), version=version)
    answer = answer_of(proposer_service(versions=versions()), request)
    assert answer.versions.local_selector == served_by
    assert answer.text == LLM_TEXT and answer.usage.llm_forwards == 0


def test_a_swap_does_not_touch_a_request_under_way() -> None:
    """Law 6: the whole answer is one version's."""
    serving = versions()

    async def swap(service: ProposerService) -> Answer:
        request = with_options(REQUEST, max_new_tokens=20)
        stream = service.stream(request)
        await anext(stream)
        serving.live = CANARY
        pieces = [piece async for piece in stream]
        answer = pieces[-1].answer
        assert answer is not None
        return answer

    answer: Answer = run(proposer_service(slow_slm(), versions=serving), swap)
    assert answer.versions.local_selector == "v1"


def test_local_mode_without_a_live_version_is_refused() -> None:
    with pytest.raises(VersionNotFoundError, match="no local selector is live"):
        answer_of(proposer_service(), with_mode(Mode.S2T_LOCAL))


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(VersionNotFoundError, match="v9"):
        answer_of(proposer_service(versions=versions()), with_options(REQUEST, version="v9"))


# -- what it says of itself -----------------------------------------------------------------------


def test_a_proposer_describes_itself() -> None:
    description = run(proposer_service(versions=versions()), lambda s: s.describe())
    assert (description.slm_digest, description.llm_digest) == ("scripted", "scripted")
    assert (description.live_version, description.canary_version) == ("v1", "v2")
    assert description.canary_share == 0.3
    assert description.calibrated_triggers == (Trigger.ENTROPY,)


def test_a_lost_llm_keeps_its_digest() -> None:
    """Which LLM the labels and versions are of is known, whether or not it can be asked."""
    for available in (True, False):
        service = proposer_service(scripted_slm(), ScriptedSelector(available=available))
        description = run(service, lambda s: s.describe())
        assert description.llm_digest == "scripted"
        assert description.llm_reachable == available
