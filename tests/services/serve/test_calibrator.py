"""Thresholds of the LLM that answers now: one that comes late, is replaced, or does not last."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from s2t_shared.decode.calibrate import load_calibration
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.scripted import ScriptedSelector
from s2t_shared.errors import SelectorUnavailableError
from s2t_shared.types import (
    CALIBRATED,
    DecodeOptions,
    GenerateRequest,
    Mode,
    Policy,
    Prompt,
    ScoreQuery,
    ScoreReply,
    Trigger,
)
from services.serve.calibrator import Calibrator
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.proposer_service import ProposerService
from tests.helpers.serving import FixedVersions, becomes, scripted_slm

PROMPTS = [Prompt(text="one two"), Prompt(text="three")]
OWN = {trigger for trigger in CALIBRATED if not trigger.needs_llm}
BY_KL = GenerateRequest(
    request_id="r",
    prompt=Prompt(text="a question"),
    options=DecodeOptions(policy=Policy(mode=Mode.S2T, trigger=Trigger.KL)),
    budget=0.1,
)


@dataclass
class Proposer:
    llm: ScriptedSelector
    calibrator: Calibrator
    service: ProposerService

    @property
    def triggers(self) -> set[Trigger]:
        return set(self.calibrator.calibration().thresholds)


def with_proposer(
    folder: Path, llm: ScriptedSelector, work: Callable[[Proposer], Awaitable[None]]
) -> None:
    async def main() -> None:
        slm = scripted_slm()
        thread = EngineThread(Engine(slm, llm), slm.tokenizer)
        calibrator = Calibrator(
            engine=thread,
            tokenizer=slm.tokenizer,
            selector=llm,
            folder=folder,
            prompts=PROMPTS,
            max_new_tokens=8,
            watch_s=0.01,
            retry_s=0.01,
        )
        service = ProposerService(
            engine=thread,
            tokenizer=slm.tokenizer,
            selector=llm,
            versions=FixedVersions(),
            labels=LabelRecorder(None),
            calibration=calibrator.calibration,
        )
        try:
            await calibrator.start()
            await work(Proposer(llm, calibrator, service))
        finally:
            service.close()

    asyncio.run(main())


def test_an_llm_that_comes_late_is_taken_up(tmp_path: Path) -> None:
    """Proposers calibrated without it, and refused `kl` until they were restarted."""

    async def work(proposer: Proposer) -> None:
        assert proposer.triggers == OWN
        with pytest.raises(SelectorUnavailableError, match="as soon as a selector"):
            await proposer.service.answer(BY_KL)
        proposer.llm.available = True
        proposer.llm.digest = "llm"
        assert await becomes(lambda: proposer.triggers == set(CALIBRATED))
        answer = await proposer.service.answer(BY_KL)
        assert answer.versions.llm == "llm" and not answer.usage.degraded_steps
        assert load_calibration(tmp_path, "scripted", "llm") is not None

    with_proposer(tmp_path, ScriptedSelector(digest="", available=False), work)


def test_another_llm_gets_its_own_thresholds(tmp_path: Path) -> None:
    """KL thresholds hold for one pair; those of the SLM's own signals stay."""

    async def work(proposer: Proposer) -> None:
        assert proposer.triggers == set(CALIBRATED)
        proposer.llm.digest = "new"
        assert proposer.triggers == OWN, "at once"
        assert await becomes(lambda: proposer.triggers == set(CALIBRATED))
        asked = len(proposer.llm.queries)
        proposer.llm.digest = "old"
        assert await becomes(lambda: proposer.triggers == set(CALIBRATED))
        assert len(proposer.llm.queries) == asked, "kept from before"

    with_proposer(tmp_path, ScriptedSelector(digest="old"), work)


def test_thresholds_of_an_earlier_start_are_used(tmp_path: Path) -> None:
    async def nothing(proposer: Proposer) -> None:
        pass

    async def asks_nothing(proposer: Proposer) -> None:
        assert proposer.triggers == set(CALIBRATED)
        assert not proposer.llm.queries

    with_proposer(tmp_path, ScriptedSelector(), nothing)
    with_proposer(tmp_path, ScriptedSelector(), asks_nothing)


def test_an_llm_that_is_lost_meanwhile_stops_no_start(tmp_path: Path) -> None:
    """The start failed with "none of the training prompts could be rolled out"."""

    async def work(proposer: Proposer) -> None:
        assert proposer.triggers == OWN
        proposer.llm.available = True
        assert await becomes(lambda: proposer.triggers == set(CALIBRATED))

    with_proposer(tmp_path, ScriptedSelector(digest="llm", available=False), work)


def test_thresholds_are_not_made_of_another_llms_scores(tmp_path: Path) -> None:
    """An LLM that is replaced while its thresholds are measured."""

    class Replaced(ScriptedSelector):
        def _answer(self, query: ScoreQuery) -> Future[ScoreReply]:
            future: Future[ScoreReply] = Future()
            reply = super()._answer(query).result()
            future.set_result(replace(reply, llm_digest=self.replies_as or self.digest))
            return future

        replies_as = "another"

    llm = Replaced(digest="llm")

    async def work(proposer: Proposer) -> None:
        assert proposer.triggers == OWN
        assert load_calibration(tmp_path, "scripted", "llm") is None
        llm.replies_as = ""
        assert await becomes(lambda: proposer.triggers == set(CALIBRATED))

    with_proposer(tmp_path, llm, work)
