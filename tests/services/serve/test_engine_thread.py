"""The engine's thread: pieces to the loop that asked, ends of callers, ends of the thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from s2t_shared.decode.engine import Engine, EngineLoad
from s2t_shared.decode.generate import EncodedRequest
from s2t_shared.decode.interfaces import PromptScores
from s2t_shared.decode.scripted import ScriptedSLM, ScriptedTokenizer
from s2t_shared.errors import InvalidRequestError, ProposerLostError
from s2t_shared.types import AnswerPiece, DecodeOptions, GenerateRequest, Prompt, Step
from services.serve.engine_thread import EngineThread, OngoingAnswer
from tests.helpers.serving import WORDS, becomes, scripted_slm, slow_slm


def encoded(*token_ids: int, **options: Any) -> EncodedRequest:
    request = GenerateRequest(
        request_id="r", prompt=Prompt(token_ids=token_ids), options=DecodeOptions(**options)
    )
    return EncodedRequest(request=request, token_ids=token_ids)


REQUEST = encoded(1, 2)
NOTHING = EngineLoad(0, 0, 0)


def test_pieces_that_wait_are_merged_in_order() -> None:
    async def run() -> None:
        answer = OngoingAnswer()
        steps = [Step(index=i, token_id=i) for i in range(3)]
        answer.put(AnswerPiece("a", (steps[0],)), False)
        answer.put(AnswerPiece("", (steps[1],)), False)
        await asyncio.sleep(0)  # the loop takes over what other threads have put
        assert await answer.next_piece() == (AnswerPiece("a", (steps[0], steps[1])), False)
        answer.put(AnswerPiece("b", (steps[2],)), True)
        assert await answer.next_piece() == (AnswerPiece("b", (steps[2],)), True)

    asyncio.run(run())


def test_an_answer_arrives_whole() -> None:
    slm = scripted_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        builder, answer = await engine.submit(REQUEST)
        text = ""
        steps: list[Step] = []
        is_last = False
        while not is_last:
            piece, is_last = await answer.next_piece()
            text += piece.text
            steps += piece.steps
        assert text == " " + " ".join(WORDS)
        assert [step.index for step in steps] == list(range(len(WORDS) + 1))  # and the end
        assert builder.done

    asyncio.run(run())
    engine.close()


def test_a_prompt_is_read_beside_an_answer() -> None:
    slm = slow_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        builder, _ = await engine.submit(REQUEST)
        scores = await engine.read_prompt((1, 2, 3), 1)
        assert [score.support.ids for score in scores] == [(2,), (3,)]
        assert not builder.done
        leaving = asyncio.create_task(engine.read_prompt((1,) * 100_000, 1))
        await asyncio.sleep(0.01)
        leaving.cancel()
        assert await engine.read_prompt((1, 2), 1), "it stands behind the one that left"
        engine.cancel(builder)

    asyncio.run(run())
    engine.close()


def test_a_prompt_fails_with_the_thread_and_alone() -> None:
    class Mute(ScriptedSLM):
        def read_prompt(self, token_ids: Sequence[int], count: int) -> PromptScores:
            raise InvalidRequestError("it does not say")

    slm = Mute(WORDS)
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        with pytest.raises(InvalidRequestError, match="does not say"):
            await engine.read_prompt((1, 2), 1)
        _, answer = await engine.submit(REQUEST)
        await answer.next_piece()
        engine.close()
        with pytest.raises(ProposerLostError):
            await engine.read_prompt((1, 2), 1)

    asyncio.run(run())


def test_a_refused_request_leaves_nothing() -> None:
    slm = scripted_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        with pytest.raises(InvalidRequestError, match="no tokens"):
            await engine.submit(encoded())

    asyncio.run(run())
    assert engine.load == NOTHING and engine.is_alive
    engine.close()


def test_a_caller_that_leaves_while_it_is_accepted_leaves_nothing() -> None:
    """Before the engine takes the request, or just after it: nothing is decoded for nobody."""
    slm = slow_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        for pause in (0.0, 0.0, 0.001, 0.003):
            call = asyncio.create_task(engine.submit(REQUEST))
            await asyncio.sleep(pause)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            if call.cancelled():
                assert await becomes(lambda: engine.load == NOTHING)
            else:  # it was accepted before
                builder, _ = call.result()
                engine.cancel(builder)
        assert await becomes(lambda: engine.load == NOTHING)

    asyncio.run(run())
    engine.close()


def test_a_request_that_is_accepted_too_late_is_cancelled() -> None:
    """Its caller went away while the engine's thread was accepting it."""
    slm = slow_slm()
    accepting = threading.Event()
    may_go_on = threading.Event()

    def check(*of_the_request: object) -> None:
        accepting.set()
        may_go_on.wait(5)

    slm.check = check  # type: ignore[method-assign]
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        call = asyncio.create_task(engine.submit(REQUEST))
        assert await becomes(accepting.is_set)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        may_go_on.set()
        await asyncio.sleep(0.05)  # now it is accepted
        assert await becomes(lambda: engine.load == NOTHING, 0.25)

    asyncio.run(run())
    engine.close()


def test_a_closed_thread_ends() -> None:
    slm = scripted_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)
    assert engine.is_alive
    engine.close()
    assert not engine.is_alive


def test_a_bug_that_is_found_when_idle_ends_the_thread() -> None:
    """Serve then starts the replica anew."""
    slm = scripted_slm()

    def check() -> None:
        assert slm.open_sequences == 0, "KV leaked"

    slm.open_sequences = 1
    engine = EngineThread(Engine(slm), slm.tokenizer, check)
    deadline = time.monotonic() + 5
    while engine.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_max_new_tokens_reaches_the_engine() -> None:
    slm = scripted_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)
    request = encoded(1, max_new_tokens=2)

    async def run() -> None:
        builder, answer = await engine.submit(request)
        is_last = False
        while not is_last:
            _, is_last = await answer.next_piece()
        assert builder.answer("slm").text == " one two"

    asyncio.run(run())
    engine.close()


# -- what goes wrong ------------------------------------------------------------------------------


def test_when_the_thread_ends_its_answers_fail() -> None:
    """They were waited for until Serve had killed the replica. Another proposer can go on."""
    slm = slow_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)

    async def run() -> None:
        _, answer = await engine.submit(REQUEST)
        await answer.next_piece()
        slm.sleep = lambda _: 1 / 0  # type: ignore[assignment,return-value]
        with pytest.raises(ProposerLostError):
            while True:
                await asyncio.wait_for(answer.next_piece(), 5)
        with pytest.raises(ProposerLostError):
            await asyncio.wait_for(engine.submit(REQUEST), 5)

    asyncio.run(run())
    assert not engine.is_alive


def test_what_was_decided_before_the_end_still_comes() -> None:
    async def run() -> None:
        answer = OngoingAnswer()
        step = Step(index=0, token_id=7)
        answer.put(AnswerPiece("a", (step,)), False)
        answer.fail(ProposerLostError("lost"))
        await asyncio.sleep(0)
        assert await answer.next_piece() == (AnswerPiece("a", (step,)), False)
        for _ in range(2):
            with pytest.raises(ProposerLostError):
                await asyncio.wait_for(answer.next_piece(), 1)

    asyncio.run(run())


class TokenizerWithGaps(ScriptedTokenizer):
    """Cannot decode a word of its own, as slow tokenizers with padding ids cannot."""

    def decode(self, token_ids: Sequence[int]) -> str:
        if self.id_of("three") in token_ids:
            raise IndexError("a padding id")
        return super().decode(token_ids)


def test_a_tokenizers_error_ends_one_answer_only() -> None:
    """It ended the thread, and with it the replica."""
    tokenizer = TokenizerWithGaps()
    slm = scripted_slm(tokenizer=tokenizer)
    engine = EngineThread(Engine(slm), tokenizer)

    async def run() -> None:
        _, doomed = await engine.submit(REQUEST)
        _, other = await engine.submit(encoded(1, max_new_tokens=2))
        with pytest.raises(IndexError, match="padding"):
            while True:
                await asyncio.wait_for(doomed.next_piece(), 5)
        is_last = False
        text = ""
        while not is_last:
            piece, is_last = await asyncio.wait_for(other.next_piece(), 5)
            text += piece.text
        assert text == " one two"
        assert await becomes(lambda: engine.load == NOTHING)

    asyncio.run(run())
    assert engine.is_alive
    engine.close()


def test_a_bug_in_one_request_ends_that_request() -> None:
    slm = scripted_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)
    checked = slm.check

    def check(token_ids: Sequence[int], *rest: Any) -> None:
        assert 13 not in token_ids
        checked(token_ids, *rest)

    slm.check = check  # type: ignore[method-assign]

    async def run() -> None:
        with pytest.raises(AssertionError):
            await asyncio.wait_for(engine.submit(encoded(13)), 5)
        builder, _ = await asyncio.wait_for(engine.submit(REQUEST), 5)
        assert await becomes(lambda: builder.done)

    asyncio.run(run())
    assert engine.is_alive
    engine.close()


def test_a_step_that_hangs_is_noticed_and_its_answers_fail() -> None:
    """The thread is alive, so that health stayed green for ever."""
    slm = slow_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)
    goes_on = threading.Event()

    async def run() -> None:
        await asyncio.sleep(0.1)
        assert engine.silent_s == 0, "it waits for work"
        _, answer = await engine.submit(REQUEST)
        await answer.next_piece()
        slm.sleep = lambda _: goes_on.wait(20)  # type: ignore[assignment,return-value]
        assert await becomes(lambda: engine.silent_s > 0.3)
        engine.give_up()
        with pytest.raises(ProposerLostError):
            while True:
                await asyncio.wait_for(answer.next_piece(), 5)
        with pytest.raises(ProposerLostError):
            await asyncio.wait_for(engine.submit(REQUEST), 5)

    asyncio.run(run())
    goes_on.set()
    engine.close()
    assert not engine.is_alive


def test_what_was_given_up_stays_unhealthy() -> None:
    """It turned again, was healthy, and refused every request for ever."""
    slm = scripted_slm()
    engine = EngineThread(Engine(slm), slm.tokenizer)
    engine.give_up()
    assert engine._thread.is_alive() and not engine.is_alive
    engine.close()
