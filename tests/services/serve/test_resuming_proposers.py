"""Proposers that die at any moment: the client sees one answer, the undisturbed one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s2t_shared.decode.scripted import ScriptedSelector, ScriptedTokenizer
from s2t_shared.errors import (
    DeadlineExceededError,
    OverloadedError,
    ProposerLostError,
    S2TError,
    VersionError,
    VersionNotFoundError,
)
from s2t_shared.policy import BUDGETS, Calibration
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    DecodeOptions,
    GenerateRequest,
    LabelOptions,
    Mode,
    Policy,
    Prompt,
    ScoreQuery,
    ScoreReply,
    ServiceDescription,
    Trigger,
)
from services.client import Client
from services.serve.proposer_service import ProposerService
from services.serve.resuming_proposers import ResumingProposers
from tests.helpers.serving import (
    ALTERNATIVE,
    LLM_TEXT,
    FixedVersions,
    gateway_address,
    gateway_config,
    local_selector,
    proposer_service,
    scripted_slm,
)

S2T = Policy(mode=Mode.S2T, trigger=Trigger.ENTROPY, threshold=0.3)
REQUEST = GenerateRequest(
    request_id="r",
    prompt=Prompt(text="a prompt"),
    options=DecodeOptions(policy=S2T, max_new_tokens=12),
    samples=3,
    return_steps=True,
    stream_steps=True,
)
TOKENIZER = ScriptedTokenizer()  # of all replicas: ids are the same words everywhere
STREAMED = [mode for mode in Mode if mode is not Mode.MAJORITY]


def with_mode(mode: Mode, **fields: Any) -> GenerateRequest:
    options = replace(REQUEST.options, policy=replace(S2T, mode=mode))
    return replace(REQUEST, options=options, **fields)


class SlowLLM(ScriptedSelector):
    """Takes a moment, for in mode llm the SLM takes none."""

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        time.sleep(0.002)
        return super().submit(queries)


def replica(version: str = "v1", **options: Any) -> ProposerService:
    """Slow enough that its pieces are of about one token each."""
    slm = scripted_slm(step_s=0.002, tokenizer=TOKENIZER)
    versions = FixedVersions(live=local_selector(version), others=[local_selector("v1")])
    if "versions" in options:
        versions = options.pop("versions")
    llm = SlowLLM(prefers=slm.tokenizer.id_of(ALTERNATIVE))
    return proposer_service(slm, llm, versions=versions, **options)


class Mortal:
    """Asks one replica after the other; the n-th dies after `lives[n]` pieces, the last one never.

    asked: the requests in their order.
    """

    def __init__(self, replicas: Sequence[Any], lives: Sequence[int]) -> None:
        self._replicas = replicas
        self._lives = lives
        self.asked: list[GenerateRequest] = []

    def _next(self, request: GenerateRequest) -> tuple[Any, int | None]:
        number = len(self.asked)
        self.asked.append(request)
        last = len(self._replicas) - 1
        life = self._lives[number] if number < len(self._lives) else None
        return self._replicas[min(number, last)], life

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        service, life = self._next(request)
        if life == 0:
            raise ProposerLostError("dead")
        count = 0
        async with aclosing(service.stream(request)) as pieces:
            async for piece in pieces:
                yield piece
                count += 1
                if count == life:
                    raise ProposerLostError("dead")

    async def answer(self, request: GenerateRequest) -> Answer:
        service, life = self._next(request)
        if life is not None:
            raise ProposerLostError("dead")
        answer: Answer = await service.answer(request)
        return answer

    async def describe(self) -> ServiceDescription:
        description: ServiceDescription = await self._replicas[0].describe()
        return description

    async def count_dropped_labels(self) -> int:
        return 0


async def pieces_of(proposers: Any, request: GenerateRequest) -> list[AnswerPiece]:
    return [piece async for piece in proposers.stream(request)]


def disturbed(
    replicas: Sequence[ProposerService], lives: Sequence[int], request: GenerateRequest
) -> tuple[list[AnswerPiece], Mortal]:
    """The pieces that a client gets, and what became of the proposers."""
    mortal = Mortal(replicas, lives)
    try:
        return asyncio.run(pieces_of(ResumingProposers(mortal), request)), mortal
    finally:
        for service in replicas:
            service.close()


def undisturbed(request: GenerateRequest) -> list[AnswerPiece]:
    with closing(replica()) as service:
        return asyncio.run(pieces_of(ResumingProposers(service), request))


def answer_in(pieces: Sequence[AnswerPiece]) -> Answer:
    """The only answer, without the count that a lost proposer's queries belong to."""
    assert all(piece.answer is None for piece in pieces[:-1])
    answer = pieces[-1].answer
    assert answer is not None
    return replace(answer, usage=replace(answer.usage, llm_forwards=0))


@pytest.mark.parametrize("mode", STREAMED, ids=lambda mode: mode.value)
def test_a_stream_goes_on_where_it_was(mode: Mode) -> None:
    """Token ids, Steps and text, wherever the first proposer dies; the second one decides only
    what was not shown."""
    request = with_mode(mode)
    whole = undisturbed(request)
    steps = [step for piece in whole for step in piece.steps]
    resumed_at = set()
    for life in range(len(steps)):
        pieces, mortal = disturbed([replica(), replica()], [life], request)
        assert answer_in(pieces) == answer_in(whole)
        assert [step for piece in pieces for step in piece.steps] == steps
        assert "".join(piece.text for piece in pieces) == answer_in(whole).text
        assert all(piece.progress is None for piece in pieces), "it stays inside the service"
        if len(mortal.asked) == 2:
            progress = mortal.asked[1].progress
            resumed_at.add(len(progress.token_ids) if progress is not None else 0)
    assert len(resumed_at) >= 3, "it died at few places only: this compares little"


def test_a_stop_string_that_was_half_said_ends_the_answer() -> None:
    """Its beginning is held back by the first proposer, and known to the second."""
    request = with_mode(Mode.GREEDY, stop=("five six",))
    for life in (4, 5, 6):
        pieces, _ = disturbed([replica(), replica()], [life], request)
        assert "".join(piece.text for piece in pieces) == " one two three four "
        assert answer_in(pieces) == answer_in(undisturbed(request))


def test_without_steps_the_client_gets_text_only() -> None:
    request = replace(REQUEST, stream_steps=False)
    pieces, mortal = disturbed([replica(), replica()], [3], request)
    assert len(mortal.asked) == 2 and not any(piece.steps for piece in pieces)
    assert all(piece.text or piece.answer is not None for piece in pieces)
    assert "".join(piece.text for piece in pieces) == LLM_TEXT
    assert answer_in(pieces) == answer_in(undisturbed(request))


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
def test_an_answer_in_one_message_is_made_again(mode: Mode) -> None:
    request = with_mode(mode)

    async def main() -> tuple[Answer, Answer]:
        first, second = replica(), replica()
        with closing(first), closing(second):
            mortal = Mortal([first, second], [1])
            return await ResumingProposers(mortal).answer(request), await second.answer(request)

    found, expected = asyncio.run(main())
    assert found == expected


def test_a_majority_is_voted_again_as_a_whole() -> None:
    request = with_mode(Mode.MAJORITY)
    pieces, mortal = disturbed([replica(), replica()], [0], request)
    assert len(mortal.asked) == 2
    assert answer_in(pieces) == answer_in(undisturbed(request))


def test_an_answer_survives_many_proposers() -> None:
    """As long as each of them decides something."""
    request = with_mode(Mode.S2T)
    pieces, mortal = disturbed([replica() for _ in range(6)], [1] * 5, request)
    assert len(mortal.asked) == 6
    assert answer_in(pieces) == answer_in(undisturbed(request))
    decided = [asked.progress for asked in mortal.asked[1:]]
    counts = [len(progress.token_ids) for progress in decided if progress is not None]
    assert counts == sorted(set(counts)) and len(counts) == 5


def test_labels_are_those_of_the_undisturbed_answer() -> None:
    """The LLM's selections at the dead proposer are labels too."""
    labels = LabelOptions(collect=True, task="t", problem_id="p")
    request = replace(REQUEST, labels=labels)

    def rollout(pieces: list[AnswerPiece]) -> dict[str, Any]:
        answer = pieces[-1].answer
        assert answer is not None
        found: dict[str, Any] = json.loads(answer.rollout)
        del found["created_at"]
        return found

    expected = rollout(undisturbed(request))
    assert len(expected["labels"]) == 2
    pieces, mortal = disturbed([replica(), replica()], [6], request)
    assert mortal.asked[1].progress is not None and mortal.asked[1].progress.steps
    assert rollout(pieces) == expected


# -- what an answer was begun with ----------------------------------------------------------------


def test_the_version_is_that_of_the_beginning() -> None:
    """Law 6: another version is live on the second proposer, and serves new answers only."""
    request = with_mode(Mode.S2T_LOCAL)
    pieces, mortal = disturbed([replica("v1"), replica("v2")], [3], request)
    assert len(mortal.asked) == 2
    assert answer_in(pieces).versions.local_selector == "v1"


def test_a_version_that_is_gone_ends_the_answer() -> None:
    elsewhere = replica(versions=FixedVersions(live=local_selector("v2")))
    with pytest.raises(VersionNotFoundError, match="v1"):
        disturbed([replica("v1"), elsewhere], [3], with_mode(Mode.S2T_LOCAL))


def test_the_threshold_is_that_of_the_beginning() -> None:
    """The second proposer has measured others: of those its Steps would not trigger."""
    request = replace(REQUEST, budget=0.1)
    second = replica()
    second._calibration = lambda: Calibration({Trigger.ENTROPY: dict.fromkeys(BUDGETS, 9.0)})
    pieces, mortal = disturbed([replica(), second], [3], request)
    assert mortal.asked[1].progress is not None
    assert mortal.asked[1].progress.threshold == pytest.approx(0.3)
    assert "".join(piece.text for piece in pieces) == LLM_TEXT


def test_another_slm_does_not_go_on() -> None:
    """An answer of two models is none."""
    second = replica()
    info = second._engine.slm
    second._engine._engine.proposer = type(  # the same SLM under another digest
        "Other", (), {"info": replace(info, digest="other"), "kv_slots_in_use": 0}
    )()
    with pytest.raises(VersionError, match="SLM has been replaced"):
        disturbed([replica(), second], [3], REQUEST)


# -- limits ---------------------------------------------------------------------------------------


class Failing:
    """Fails each request with the next of `errors`, then for ever with the last."""

    def __init__(self, *errors: S2TError, progress: AnswerPiece | None = None) -> None:
        self._errors = errors
        self._progress = progress
        self.asked: list[GenerateRequest] = []

    def _error(self, request: GenerateRequest) -> S2TError:
        self.asked.append(request)
        assert len(self.asked) < 20, "it is asked for ever"
        return self._errors[min(len(self.asked), len(self._errors)) - 1]

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        error = self._error(request)
        if self._progress is not None:
            yield self._progress
        raise error

    async def answer(self, request: GenerateRequest) -> Answer:
        raise self._error(request)


LOST = ProposerLostError("lost")


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_request_that_kills_every_proposer_ends(limit: int, unary: bool) -> None:
    proposers = Failing(LOST)
    resuming = ResumingProposers(proposers, max_resumes=limit)
    work = resuming.answer(REQUEST) if unary else pieces_of(resuming, REQUEST)
    with pytest.raises(ProposerLostError):
        asyncio.run(work)
    assert len(proposers.asked) == limit + 1


@pytest.mark.parametrize(
    ("errors", "asked"),
    [((OverloadedError("full"),), 1), ((LOST, OverloadedError("full")), 3)],
    ids=["at once", "behind a loss"],
)
def test_overload_is_told_at_once_unless_a_proposer_was_lost(
    errors: tuple[S2TError, ...], asked: int
) -> None:
    proposers = Failing(*errors)
    with pytest.raises(OverloadedError):
        asyncio.run(pieces_of(ResumingProposers(proposers, max_resumes=2), REQUEST))
    assert len(proposers.asked) == asked


def test_other_errors_are_not_tried_elsewhere() -> None:
    proposers = Failing(VersionNotFoundError("v9"))
    with pytest.raises(VersionNotFoundError):
        asyncio.run(pieces_of(ResumingProposers(proposers), REQUEST))
    assert len(proposers.asked) == 1


def test_what_was_shown_without_its_progress_is_not_shown_twice() -> None:
    proposers = Failing(LOST, progress=AnswerPiece("text"))
    with pytest.raises(ProposerLostError):
        asyncio.run(pieces_of(ResumingProposers(proposers), REQUEST))
    assert len(proposers.asked) == 1


def test_the_deadline_is_the_requests_own() -> None:
    """A second proposer gets what the first one left of it."""
    now = [0.0]

    class Slow(Failing):
        def _error(self, request: GenerateRequest) -> S2TError:
            now[0] += 4.0
            return super()._error(request)

    proposers = Slow(LOST)
    resuming = ResumingProposers(proposers, max_resumes=9, clock=lambda: now[0])
    with pytest.raises(DeadlineExceededError, match="deadline of 10 s"):
        asyncio.run(pieces_of(resuming, replace(REQUEST, timeout_s=10.0)))
    assert [request.timeout_s for request in proposers.asked] == [10.0, 6.0, 2.0]


def test_a_full_proposer_takes_over_what_has_begun() -> None:
    """Its client reads already: to be refused now would be a failed answer."""
    full = replica(max_ongoing_requests=0)
    pieces, _ = disturbed([replica(), full], [3], REQUEST)
    assert answer_in(pieces).text == LLM_TEXT
    with closing(replica(max_ongoing_requests=0)) as service, pytest.raises(OverloadedError):
        asyncio.run(service.answer(REQUEST))


def test_a_client_that_leaves_closes_the_proposers_stream() -> None:
    class Endless:
        closed = False

        async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
            try:
                while True:
                    yield AnswerPiece("x")
                    await asyncio.sleep(0)
            finally:
                self.closed = True

    async def main() -> bool:
        proposers = Endless()
        stream = ResumingProposers(proposers).stream(REQUEST)  # type: ignore[arg-type]
        await anext(stream)
        await stream.aclose()
        return proposers.closed

    assert asyncio.run(main())


# -- through the gateway --------------------------------------------------------------------------


def test_a_gateways_client_notices_nothing(tmp_path: Path) -> None:
    def ask(address: str) -> list[AnswerPiece]:
        with Client(address) as client:
            settings: dict[str, Any] = {"mode": "s2t", "threshold": 0.3, "return_steps": True}
            return list(client.stream("a prompt", stream_steps=True, **settings))

    async def main(lives: Sequence[int]) -> list[AnswerPiece]:
        replicas = [replica(), replica()]
        config = gateway_config(tmp_path)
        async with gateway_address(config, Mortal(replicas, lives)) as address:
            pieces = await asyncio.to_thread(ask, address)
        for service in replicas:
            service.close()
        return pieces

    whole, resumed = asyncio.run(main([])), asyncio.run(main([4]))
    assert answer_in(resumed) == answer_in(whole)
    steps = [[step for piece in pieces for step in piece.steps] for pieces in (whole, resumed)]
    assert steps[0] == steps[1]
