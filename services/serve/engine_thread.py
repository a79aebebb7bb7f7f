"""One thread that owns an engine, and the answers that are decoded on it.

Requests come in through a queue. Pieces of answers go out to the asyncio loops that asked for them.
Knows the engine and the text around it; no Ray, no network, no labels.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from s2t_shared.decode.engine import Engine, EngineLoad
from s2t_shared.decode.generate import AnswerBuilder, EncodedRequest
from s2t_shared.decode.heartbeat import Heartbeat
from s2t_shared.decode.interfaces import PromptScore, SLMInfo
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import ProposerLostError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.types import AnswerPiece, Step
from services.metrics.decode_meter import DecodeMeter
from services.serve.prompt_reading import PromptReading

log = logging.getLogger(__name__)
WAIT_S = 0.005  # while all sequences wait for the LLM, new requests are looked for this often
JOIN_S = 1.0


class OngoingAnswer:
    """Carries the pieces of one answer from the engine's thread to the running asyncio loop."""

    def __init__(self, arrived_at: float | None = None) -> None:
        """arrived_at: when its request came, `time.monotonic()`; None: it is nobody's, and not
        counted."""
        self.arrived_at = arrived_at
        self._loop = asyncio.get_running_loop()
        self._pieces: list[AnswerPiece] = []
        self._is_last = False
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def put(self, piece: AnswerPiece, is_last: bool) -> None:
        """Add a piece. Called on the engine's thread."""
        self._call(partial(self._put, piece, is_last))

    def fail(self, error: Exception) -> None:
        """No piece will follow: `next_piece` raises the error. Called on the engine's thread."""
        self._call(partial(self._fail, error))

    async def next_piece(self) -> tuple[AnswerPiece, bool]:
        """What is new, merged into one piece, and whether it is the last. Raises what the answer
        failed with."""
        await self._news.wait()
        if not self._pieces:
            assert self._failure is not None
            raise self._failure
        pieces, self._pieces = self._pieces, []
        if self._failure is None:
            self._news.clear()
        text = "".join(piece.text for piece in pieces)
        steps = tuple(step for piece in pieces for step in piece.steps)
        return AnswerPiece(text, steps), self._is_last

    def _call(self, on_loop: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(on_loop)

    def _put(self, piece: AnswerPiece, is_last: bool) -> None:
        self._pieces.append(piece)
        self._is_last = is_last
        self._news.set()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._news.set()


class EngineThread:
    """Owns an engine.

    What one request raises ends that request. What the engine's step raises, which all share, ends
    the thread, and so the replica: every answer then fails with ProposerLostError.

    check_when_idle: called before the thread waits for a request. What it raises ends the thread:
    a bug found there must end the replica, not an answer. meter: counts what is decided.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        check_when_idle: Callable[[], None] = lambda: None,
        meter: DecodeMeter | None = None,
    ) -> None:
        self.meter = meter
        self._engine = engine
        self._tokenizer = tokenizer
        self._check_when_idle = check_when_idle
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ongoing: dict[LiveSequence, tuple[AnswerBuilder, OngoingAnswer]] = {}
        self._readings: deque[PromptReading] = deque()
        self._closed = False
        self._ended = False
        self._heartbeat = Heartbeat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    @property
    def slm(self) -> SLMInfo:
        return self._engine.proposer.info

    @property
    def load(self) -> EngineLoad:
        """What the engine holds now."""
        return self._engine.load

    @property
    def kv_usage(self) -> float | None:
        """Share of the SLM's KV memory that live sequences hold, 0..1; None: not known."""
        return self._engine.proposer.kv_usage

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still answer requests: one that was given up never can, though
        it may turn again."""
        return self._thread.is_alive() and not self._ended

    @property
    def silent_s(self) -> float:
        """Seconds since the thread's loop has turned; 0 while there is nothing to do."""
        return self._heartbeat.silent_s

    @property
    def capacity(self) -> int:
        """Sequences that can run at once, as far as known."""
        return self._engine.capacity

    async def submit(
        self,
        request: EncodedRequest,
        local_selector: LocalSelector | None = None,
        arrived_at: float | None = None,
    ) -> tuple[AnswerBuilder, OngoingAnswer]:
        """Start an answer. A caller that is cancelled meanwhile leaves nothing behind.

        arrived_at: as in `OngoingAnswer`.

        Raises:
            InvalidRequestError: the request cannot be answered.
            VersionNotFoundError: there is no local selector of the named version.
            ProposerLostError: the thread has ended.
        """
        answer = OngoingAnswer(arrived_at)
        accepted: Future[AnswerBuilder] = Future()
        self._inbox.put(partial(self._accept, request, local_selector, answer, accepted))
        if self._ended:
            self._empty_inbox()
        try:
            return await asyncio.wrap_future(accepted), answer
        except asyncio.CancelledError:
            accepted.add_done_callback(self._cancel_accepted)
            raise

    async def read_prompt(self, token_ids: Sequence[int], count: int) -> list[PromptScore]:
        """Scores of `token_ids[1:]`, each with the SLM's top `count` ids: one chunk of the prompt a
        step, beside the decoding of answers. A caller that is cancelled leaves nothing behind.

        Raises:
            InvalidRequestError: the SLM's runtime does not say.
            ProposerLostError: the thread has ended.
        """
        reading = PromptReading(token_ids, count)
        self._inbox.put(partial(self._begin_reading, reading))
        if self._ended:
            self._empty_inbox()
        return await reading.found

    def cancel(self, builder: AnswerBuilder) -> None:
        """End an answer. Its KV is free within one step of the engine."""
        self._inbox.put(builder.cancel)

    def give_up(self) -> None:
        """Fail all answers with ProposerLostError, and take no more: the thread hangs, or has
        ended."""
        self._ended = True
        for _, answer in list(self._ongoing.values()):
            answer.fail(_lost())
        for reading in list(self._readings):
            reading.fail(_lost())
        self._empty_inbox()

    def close(self) -> None:
        """End the thread. Answers that are being decoded fail with ProposerLostError."""
        self._inbox.put(self._close)
        self._thread.join(JOIN_S)

    # -- on the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
        except Exception:  # the thread's own border: nobody is above
            log.exception("the engine's thread ends")
        finally:
            self.give_up()

    def _turn(self) -> None:
        if self._engine.idle and not self._readings:
            self._check_when_idle()
            self._heartbeat.rest()
            call = self._inbox.get()
            self._heartbeat.beat()
            call()
        self._empty_inbox()
        for sequence, steps in self._engine.step():
            self._deliver(sequence, steps)
        if self._readings:
            self._read_on(self._readings[0])
        self._engine.wait(WAIT_S)
        self._heartbeat.beat()

    def _empty_inbox(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _close(self) -> None:
        self._closed = True

    def _accept(
        self,
        request: EncodedRequest,
        local_selector: LocalSelector | None,
        answer: OngoingAnswer,
        accepted: Future[AnswerBuilder],
    ) -> None:
        if not accepted.set_running_or_notify_cancel():  # the caller has gone away meanwhile
            return
        if self._ended:
            accepted.set_exception(_lost())
            return
        try:
            builder = AnswerBuilder(request, self._tokenizer, self._engine, local_selector)
        except Exception as error:  # noqa: BLE001 - whatever a request causes ends that request
            accepted.set_exception(error)
            return
        for sequence in builder.sequences:
            self._ongoing[sequence] = (builder, answer)
        accepted.set_result(builder)

    def _begin_reading(self, reading: PromptReading) -> None:
        if self._ended:
            reading.fail(_lost())
            return
        self._readings.append(reading)

    def _read_on(self, reading: PromptReading) -> None:
        """Read the next chunk of the oldest prompt."""
        try:
            reading.read_on(self._engine.proposer)
        except Exception as error:  # noqa: BLE001 - whatever a request causes ends that request
            reading.fail(error)
        if reading.is_over:
            self._readings.popleft()

    def _cancel_accepted(self, accepted: Future[AnswerBuilder]) -> None:
        """For a caller that went away while its request was being accepted."""
        if not accepted.cancelled() and accepted.exception() is None:
            self.cancel(accepted.result())

    def _deliver(self, sequence: LiveSequence, steps: Sequence[Step]) -> None:
        if sequence not in self._ongoing:  # its answer has failed
            return
        builder, answer = self._ongoing[sequence]
        if self.meter is not None and answer.arrived_at is not None:
            self.meter.count(sequence, steps, answer.arrived_at, time.monotonic())
        try:
            piece = builder.push(sequence, steps)
        except Exception as error:  # noqa: BLE001 - whatever an answer causes ends that answer
            for other in builder.sequences:
                self._ongoing.pop(other, None)
                if self.meter is not None:
                    self.meter.forget(other)
            builder.cancel()
            answer.fail(error)
            return
        if sequence.finish_reason is not None:
            del self._ongoing[sequence]
        if piece.text or piece.steps or builder.done:
            answer.put(piece, builder.done)


def _lost() -> ProposerLostError:
    return ProposerLostError("the proposer that answered has failed; send the request again")
