"""What a proposer does with a request: thresholds, local selector, decoding, labels.

Knows the engine's thread and the collaborators it is given; no Ray, no network, no models.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol

from s2t_shared.decode.alternatives import TokenTexts, with_alternatives
from s2t_shared.decode.engine import EngineLoad
from s2t_shared.decode.generate import (
    AnswerBuilder,
    EncodedRequest,
    encode_request,
    shown_steps,
    with_thresholds,
)
from s2t_shared.decode.heartbeat import Heartbeat
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    SelectorUnavailableError,
    VersionError,
    VersionNotFoundError,
)
from s2t_shared.labels.label import Digests
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.policy import Calibration
from s2t_shared.requests import check_request
from s2t_shared.types import (
    Answer,
    AnswerPiece,
    GenerateRequest,
    Mode,
    OnLLMFailure,
    Prompt,
    ServiceDescription,
    Step,
)
from services.metrics.registry import Reading, Registry
from services.metrics.table import Role
from services.rpc import logs
from services.serve.admission import Admission, Ticket
from services.serve.answer_trace import traced
from services.serve.engine_thread import EngineThread
from services.serve.label_recorder import LabelRecorder
from services.serve.prompt_reading import prompt_steps

MAX_BYTES_PER_TOKEN = 32  # of a whole prompt: tokens of text have 3 to 5


class SelectorStatus(Protocol):
    """What a proposer must know of the LLM selector beside its replies."""

    @property
    def info(self) -> LLMInfo: ...

    @property
    def reachable(self) -> bool: ...


class ServingVersions(Protocol):
    """The local selectors that requests can get: `VersionWatcher`, or a fixed set in tests."""

    @property
    def live_version(self) -> str: ...

    @property
    def live_created_at(self) -> float: ...

    @property
    def canary_version(self) -> str: ...

    @property
    def canary_share(self) -> float: ...

    def choose(self, request_id: str) -> LocalSelector | None:
        """The local selector of a request that names none; None when none is live."""

    async def obtain(self, version: str) -> LocalSelector:
        """Raises VersionNotFoundError, VersionError."""


class ProposerService:
    """Answers requests on one engine. All requests of all modes share its batch.

    calibration: says which thresholds hold now.
    """

    def __init__(
        self,
        *,
        engine: EngineThread,
        tokenizer: TextTokenizer,
        selector: SelectorStatus,
        versions: ServingVersions,
        labels: LabelRecorder,
        calibration: Callable[[], Calibration],
        max_ongoing_requests: int = 256,
        max_queue_s: float = 0.0,
        stall_timeout_s: float = math.inf,
    ) -> None:
        """max_ongoing_requests, max_queue_s: as in `Admission`. stall_timeout_s: a step that takes
        longer hangs."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._selector = selector
        self._versions = versions
        self._labels = labels
        self._calibration = calibration
        self._admission = Admission(
            lambda: engine.capacity,
            max_ongoing_requests=max_ongoing_requests,
            max_queue_s=max_queue_s,
        )
        self._stall_timeout_s = stall_timeout_s
        # Not on the loop, nor on the engine's thread: a long prompt takes a second.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._tokenizing_beat = Heartbeat()
        self.registry = Registry(Role.PROPOSER)
        if engine.meter is not None:
            self.registry.add(engine.meter.readings)
        self.registry.add(self._readings)
        self.registry.add(labels.readings)

    @property
    def ongoing_requests(self) -> int:
        """Requests that are being answered or wait for it."""
        return len(self._admission)

    @property
    def load(self) -> EngineLoad:
        """What the engine holds now."""
        return self._engine.load

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[AnswerPiece, None]:
        """Pieces of the answer as they are decided. The last one carries the answer.

        A caller that goes away frees the answer's KV.

        Raises:
            OverloadedError: it cannot begin, or not be finished, in time.
            S2TError: the request cannot be answered.
        """
        arrived_at = time.monotonic()
        logs.about(request.request_id)
        check_request(request)
        with traced(request) as trace, self._admission.admit(request) as ticket:
            request, local_selector = await self._prepare(trace.request)
            encoded = await self._encode(request, ticket)
            builder, ongoing = await self._engine.submit(encoded, local_selector, arrived_at)
            ticket.sequences = builder.sequences
            try:
                if request.prompt_alternatives is not None and request.progress is None:
                    yield AnswerPiece(prompt=await self._prompt(request, encoded))
                is_last = False
                while not is_last:
                    piece, is_last = await ongoing.next_piece()
                    trace.sees(piece)
                    piece = self._travelling_piece(request, builder, piece)
                    if not is_last and (piece.text or piece.progress):
                        yield piece
                yield replace(piece, answer=await self._finish(request, builder))
            finally:
                trace.ends(builder.sequences[0])
                if not builder.done:
                    self._engine.cancel(builder)

    async def answer(self, request: GenerateRequest) -> Answer:
        """The finished answer alone. Raises as `stream`."""
        answer = None
        async for piece in self.stream(request):
            answer = piece.answer
        assert answer is not None
        return answer

    async def describe(self) -> ServiceDescription:
        """What this proposer runs, and what it holds now."""
        slm = self._engine.slm
        load = self.load
        return ServiceDescription(
            slm_digest=slm.digest,
            tokenizer_digest=self._tokenizer.digest,
            template_digest=self._tokenizer.template_digest,
            llm_digest=self._selector.info.digest,
            llm_reachable=self._selector.reachable,
            max_length=slm.max_length,
            live_version=self._versions.live_version,
            canary_version=self._versions.canary_version,
            canary_share=self._versions.canary_share,
            calibrated_triggers=tuple(self._calibration().thresholds),
            running_sequences=load.running,
            waiting_sequences=load.waiting,
            live_kv_slots=load.kv_slots,
        )

    async def count_dropped_labels(self) -> int:
        """Labels that were lost since the start, for whatever reason."""
        return self._labels.dropped

    def _readings(self) -> Iterator[Reading]:
        load = self.load
        yield Reading("s2t_sequences_running", load.running)
        yield Reading("s2t_sequences_waiting", load.waiting)
        yield Reading("s2t_sequences_parked", load.parked)
        yield Reading("s2t_requests_ongoing", self.ongoing_requests)
        usage = self._engine.kv_usage
        if usage is not None:
            yield Reading("s2t_kv_usage_ratio", usage)
        versions = self._versions
        names = (versions.live_version, versions.canary_version)
        digests = (self._engine.slm.digest, self._selector.info.digest)
        yield Reading("s2t_version_info", labels=(*digests, *names))
        yield Reading("s2t_canary_share", versions.canary_share)
        if versions.live_version:
            yield Reading("s2t_version_created_timestamp_seconds", versions.live_created_at)

    def check_health(self) -> None:
        """Raises RuntimeError: nothing can be answered any more, because a thread has died or
        hangs. Answers under way have then failed with ProposerLostError."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine thread has died")
        silent_s = max(self._engine.silent_s, self._tokenizing_beat.silent_s)
        if silent_s > self._stall_timeout_s:
            self._engine.give_up()
            raise RuntimeError(f"one step has taken {silent_s:.0f} s: it hangs")

    def close(self) -> None:
        """End decoding and store the labels that are queued."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._engine.close()
        self._labels.close()

    # -- before and after decoding ----------------------------------------------------------------

    async def _prepare(
        self, request: GenerateRequest
    ) -> tuple[GenerateRequest, LocalSelector | None]:
        """Choose the local selector, and the thresholds: its own where it has them."""
        self._labels.check(request.labels)
        request = self._as_begun(request)
        options = request.options
        begins = request.progress is None  # one that has begun goes on as if nothing had happened
        if begins and options.policy.mode is Mode.LLM and not self._selector.reachable:
            raise SelectorUnavailableError(
                "no selector (LLM) can be reached, and mode llm is the LLM's own answer; "
                "try again in a moment, or choose a mode that goes on without the LLM"
            )
        fails_without = options.on_llm_failure is OnLLMFailure.FAIL and options.needs_llm
        if fails_without and not self._selector.reachable:
            raise SelectorUnavailableError(
                "no selector (LLM) can be reached, and the request chose to fail then; try again "
                "in a moment, or choose on_llm_failure=degrade"
            )
        if options.score_rollout and not self._selector.info.digest:
            raise SelectorUnavailableError(
                "no selector (LLM) is running, so a rollout cannot be scored"
            )
        local_selector = await self._local_selector(request)
        calibration = self._calibration()
        version = ""
        if local_selector is not None:
            calibration = local_selector.calibration.or_else(calibration)
            version = local_selector.version
        request = replace(request, options=replace(options, version=version))
        return _with_thresholds(request, calibration), local_selector

    def _as_begun(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the version and the threshold that its answer was begun with.

        Raises:
            VersionError: it was begun by another SLM.
        """
        progress = request.progress
        if progress is None:
            return request
        if progress.slm != self._engine.slm.digest:
            raise VersionError(
                "the SLM has been replaced while it answered, and an answer is of one SLM only; "
                "send the request again"
            )
        options = request.options
        policy = replace(options.policy, threshold=progress.threshold)
        options = replace(options, policy=policy, version=progress.version)
        return replace(request, options=options, budget=None)

    async def _encode(self, request: GenerateRequest, ticket: Ticket) -> EncodedRequest:
        """Tokenize the prompt, elsewhere. The deadline is counted from the request's arrival.

        Raises:
            InvalidRequestError: the prompt is much too long, or cannot be tokenized.
        """
        longest = MAX_BYTES_PER_TOKEN * self._engine.slm.max_length
        size = _text_bytes(request.prompt)
        if size > longest:
            raise InvalidRequestError(
                f"the prompt has {size} bytes, and prompt and answer together fit "
                f"{self._engine.slm.max_length} tokens: more than {longest} bytes are not read; "
                "shorten the prompt",
                field="prompt",
            )
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._tokenizing, self._tokenize, request)
        return replace(
            encoded, deadline=ticket.deadline, start_by=ticket.start_by, turn=ticket.turn
        )

    def _tokenize(self, request: GenerateRequest) -> EncodedRequest:
        self._tokenizing_beat.beat()
        try:
            return encode_request(request, self._tokenizer)
        finally:
            self._tokenizing_beat.rest()

    async def _prompt(self, request: GenerateRequest, encoded: EncodedRequest) -> tuple[Step, ...]:
        """The prompt's tokens, with what the SLM makes of each.

        Raises:
            DeadlineExceededError: the request's deadline passed first.
            InvalidRequestError: the SLM's runtime does not say.
        """
        shown = request.prompt_alternatives or 0
        token_ids = encoded.token_ids
        try:
            async with asyncio.timeout_at(encoded.deadline):
                scores = await self._engine.read_prompt(token_ids, max(1, shown))
        except TimeoutError:
            raise DeadlineExceededError(
                f"the deadline of {request.timeout_s:g} s passed while the prompt's tokens were "
                "scored; allow more time or a shorter prompt"
            ) from None
        loop = asyncio.get_running_loop()
        show = partial(prompt_steps, token_ids, scores, shown, self._tokenizer, self._texts)
        return await loop.run_in_executor(self._tokenizing, show)

    async def _local_selector(self, request: GenerateRequest) -> LocalSelector | None:
        version = request.options.version
        if version:
            return await self._versions.obtain(version)
        if version == "":
            return None
        local_selector = self._versions.choose(request.request_id)
        if local_selector is None and request.options.policy.mode is Mode.S2T_LOCAL:
            raise VersionNotFoundError(
                "no local selector is live; train one (s2t train), or ask for version 'none'"
            )
        return local_selector

    def _travelling_piece(
        self, request: GenerateRequest, builder: AnswerBuilder, piece: AnswerPiece
    ) -> AnswerPiece:
        """The piece as the gateway gets it: with what another proposer needs to go on from here."""
        steps = _travelling(piece.steps)
        keeps_numbers = request.labels.store or request.labels.collect
        decided = piece.steps if keeps_numbers else steps
        progress = builder.progress(decided, self._engine.slm.digest)
        shown = self._streamed(request, piece.steps) if request.stream_steps else ()
        return replace(piece, steps=shown, progress=progress)

    def _streamed(self, request: GenerateRequest, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """The Steps of a piece, as the request wants them."""
        if request.alternatives is not None:
            steps = tuple(with_alternatives(s, request.alternatives, self._texts) for s in steps)
        return _travelling(steps)

    async def _finish(self, request: GenerateRequest, builder: AnswerBuilder) -> Answer:
        """Build the answer, record its labels, and drop Steps that were not asked for."""
        slm_digest = self._engine.slm.digest
        answer = builder.answer(slm_digest)
        digests = Digests(
            slm=slm_digest,
            llm=answer.versions.llm,
            tokenizer=self._tokenizer.digest,
            template=self._tokenizer.template_digest,
        )
        prompt_ids = builder.sequences[0].request.token_ids
        answer = await self._labels.record(request, prompt_ids, answer, digests)
        return replace(answer, steps=_travelling(shown_steps(request, answer.steps)))


def _with_thresholds(request: GenerateRequest, calibration: Calibration) -> GenerateRequest:
    """The request with its budgets turned into thresholds.

    Raises:
        ConfigError: a trigger is not calibrated.
        SelectorUnavailableError: it is a KL trigger, and no LLM was reached yet.
    """
    try:
        return with_thresholds(request, calibration)
    except ConfigError as error:
        asked = {request.options.policy.trigger, *request.labels.triggers}
        if not any(t.needs_llm and t not in calibration.thresholds for t in asked):
            raise
        raise SelectorUnavailableError(
            f"{error}; they are measured as soon as a selector (LLM) answers: try again in a moment"
        ) from error


def _text_bytes(prompt: Prompt) -> int:
    """Bytes that must be tokenized."""
    texts = [prompt.text or "", *(message.content for message in prompt.messages)]
    return sum(len(text.encode()) for text in texts)


def _travelling(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps without the two models' numbers, which stay in this process."""
    return tuple(replace(step, support=None, llm=None) for step in steps)
