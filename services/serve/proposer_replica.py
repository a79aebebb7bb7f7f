"""A proposer replica: the decode loop with the SLM. Its jobs: 1. run the engine on its own thread
and fan its Steps out to requests, 2. keep the live local selector loaded, 3. hand labels to the
writer, 4. calibrate at start.

All requests of all modes share one engine and so one batch.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch

from s2t_shared.config import Config
from s2t_shared.decode.calibrate import (
    calibration_prompts,
    load_calibration,
    measure_calibration,
    store_calibration,
)
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import AnswerBuilder, Generator, with_thresholds
from s2t_shared.decode.interfaces import LLMInfo
from s2t_shared.decode.proposer import Proposer
from s2t_shared.decode.selection_cache import CachedSelector
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import (
    ConfigError,
    OverloadedError,
    S2TError,
    SelectorUnavailableError,
    StoreError,
    VersionNotFoundError,
)
from s2t_shared.labels.label import Digests, Rollout, check_split, rollout_of
from s2t_shared.labels.stream import LabelStream
from s2t_shared.labels.writer import LabelWriter
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime, resolve_model
from s2t_shared.model.tokenizer import Tokenizer, reserved_ids
from s2t_shared.policy import Calibration
from s2t_shared.types import Answer, GenerateRequest, Mode, Step, Trigger
from s2t_shared.versions.registry import Registry
from services.bench.harvest import Load
from services.serve.remote_selector import RemoteSelector
from services.serve.version_watcher import VersionWatcher

log = logging.getLogger(__name__)
SELECTOR_START_S = 120.0
DURABLE_S = 30.0  # an answer waits so long at most for its labels


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a proposer sends to the gateway: pieces of text, then the finished answer."""

    text: str = ""
    answer: Answer | None = None
    step_texts: tuple[str, ...] = ()
    labels_stored: int = 0
    rollout: bytes = b""  # as JSON


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a proposer runs."""

    slm_digest: str
    tokenizer_digest: str
    template_digest: str
    llm_digest: str
    max_length: int
    live_version: str
    canary: tuple[str, float]  # its name ("" for none) and its share of the requests
    calibrated: tuple[Trigger, ...]
    labels_dropped: dict[str, int]  # by reason, since the start
    load: Load


@dataclass
class _Job:
    builder: AnswerBuilder
    deliver: Callable[[str, bool], None]  # (text piece, finished)


class EngineThread:
    """Owns an engine on one thread. Requests come in through a queue; pieces go out through their
    callbacks."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self.thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self.thread.start()

    @property
    def load(self) -> Load:
        return self._engine.load

    def submit(
        self,
        request: GenerateRequest,
        selector: LocalSelector | None,
        deliver: Callable[[str, bool], None],
    ) -> Future[AnswerBuilder]:
        """Queue a request; the future holds its builder, or the error that refused it."""
        accepted: Future[AnswerBuilder] = Future()

        def start() -> None:
            if not accepted.set_running_or_notify_cancel():  # the caller has gone away meanwhile
                return
            try:
                builder = AnswerBuilder(request, self._tokenizer, self._engine, selector)
            except S2TError as error:
                accepted.set_exception(error)
                return
            self._jobs |= {id(s): _Job(builder, deliver) for s in builder.sequences}
            accepted.set_result(builder)

        self._inbox.put(start)
        return accepted

    def cancel(self, builder: AnswerBuilder) -> None:
        self._inbox.put(builder.cancel)

    def cancel_accepted(self, accepted: Future[AnswerBuilder]) -> None:
        """For a caller that went away while its request was being accepted."""
        if not accepted.cancelled() and accepted.exception() is None:
            self.cancel(accepted.result())

    def _run(self) -> None:
        while True:
            if self._engine.idle:
                # a bug found here ends the replica, not an answer
                self._engine.proposer.runtime.pool.check()
                self._inbox.get()()
            while not self._inbox.empty():
                self._inbox.get()()
            for sequence, steps in self._engine.step():
                self._fold(sequence, steps)
            self._engine.wait(0.005)

    def _fold(self, sequence: LiveSequence, steps: Sequence[Step]) -> None:
        job = self._jobs[id(sequence)]
        piece = job.builder.push(sequence, steps)
        if sequence.finish_reason is not None:
            del self._jobs[id(sequence)]
        if piece or job.builder.done:
            job.deliver(piece, job.builder.done)


class ProposerReplica:
    """The Serve deployment."""

    async def __init__(self, config: Config, selector_handle: Any = None) -> None:  # type: ignore[misc]
        torch.set_num_threads(config.slm.threads)
        self._config = config
        self._tokenizer = Tokenizer.load(resolve_model(config.slm_model), config.slm.chat_template)
        runtime = ModelRuntime.load(
            config.slm_model, config.slm.dtype, config.slm.device, config.slm.kv_bytes
        )
        runtime.switch  # noqa: B018 - wrap the layers now, before the engine's thread runs the model
        reserved = reserved_ids(self._tokenizer, runtime.vocab_rows)
        self._remote = await self._connect(config, runtime, selector_handle)
        self._store = LabelStream(config.redis.url) if config.redis.url else None
        self._writer = (
            LabelWriter(self._store, config.spool, config.labels.spool_mib << 20)
            if self._store
            else None
        )
        selector = (
            CachedSelector(self._remote, self._store, config.redis.cache_ttl_s)
            if self._store
            else self._remote
        )
        self._live = VersionWatcher(Registry(config.versions), runtime, self._tokenizer.digest)
        p = config.proposer
        engine = Engine(
            Proposer(runtime, reserved, p.prefill_chunk_tokens),
            selector,
            self._live.lookup,
            p.max_num_seqs,
            p.selection_timeout_s,
            p.max_draft_tokens,
            p.read_ahead_tokens,
        )
        self._runtime = runtime
        self._calibration = await asyncio.to_thread(self._calibrate, engine)
        self._engine = EngineThread(engine, self._tokenizer)
        self._ongoing = 0
        log.info(
            "proposer ready: slm %s, live selector %s",
            runtime.digest,
            self._live.live_version or "none",
        )

    async def _connect(self, config: Config, runtime: ModelRuntime, handle: Any) -> RemoteSelector:
        async def addresses() -> list[str]:
            if config.selector.addresses or handle is None:
                return list(config.selector.addresses)
            return [
                str(a)
                for a in await asyncio.wait_for(handle.broadcast("address").results_async(), 10)
            ]

        fallback = LLMInfo("", "", runtime.eos_ids, runtime.max_length)
        remote = RemoteSelector(addresses, config.security, self._tokenizer.digest, fallback)
        if handle is not None or config.selector.addresses:
            for _ in range(int(SELECTOR_START_S * 5)):
                await remote.refresh()
                remote.check()
                if remote.reachable:
                    break
                await asyncio.sleep(0.2)
        return remote

    def _calibrate(self, engine: Engine) -> Calibration:
        """Thresholds of this pair: from an earlier start, else measured now."""
        folder, llm = self._config.data_dir / "calibration", self._remote.info.digest
        if (known := load_calibration(folder, self._runtime.digest, llm)) is not None:
            return known
        settings = self._config.calibration
        prompts = calibration_prompts(self._tokenizer, settings.count, settings.prompts)
        generator = Generator(self._tokenizer, engine)
        calibration = measure_calibration(
            generator, prompts, settings.max_new_tokens, self._remote.reachable
        )
        store_calibration(folder, self._runtime.digest, llm, calibration)
        return calibration

    async def stream(self, request: GenerateRequest) -> AsyncIterator[Reply]:
        """Text as it comes, then the answer. Raises S2TError; a caller that goes away frees its
        rows."""
        if self._ongoing >= self._config.proposer.max_ongoing_requests:
            raise OverloadedError(
                f"{self._ongoing} requests are being answered; try again in a moment"
            )
        request, selector = await self._check(request)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[str, bool]]()
        self._ongoing += 1
        builder: AnswerBuilder | None = None

        def deliver(text: str, done: bool) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (text, done))

        try:
            submitted = self._engine.submit(request, selector, deliver)
            try:
                builder = accepted = await asyncio.wrap_future(submitted)
            except asyncio.CancelledError:
                submitted.add_done_callback(self._engine.cancel_accepted)
                raise
            finished = False
            while not finished:
                text, finished = await events.get()
                while not events.empty():  # one message for all that came meanwhile
                    more, finished = events.get_nowait()
                    text += more
                if text and not finished:
                    yield Reply(text=text)
            yield replace(await self._finish(request, accepted), text=text)
        finally:
            self._ongoing -= 1
            if builder is not None and not builder.done:
                self._engine.cancel(builder)

    async def answer(self, request: GenerateRequest) -> Reply:
        """The finished answer alone."""
        async for reply in self.stream(request):
            last = reply
        return last

    async def _check(
        self, request: GenerateRequest
    ) -> tuple[GenerateRequest, LocalSelector | None]:
        """The request with its thresholds, and the local selector that serves it: both of one
        version."""
        if request.labels.store or request.labels.collect:
            check_split(request.labels.split)
        if request.labels.store and request.labels.durable and self._writer is None:
            raise ConfigError(
                "durable labels were asked for, but no Redis is configured (redis.url)"
            )
        if request.policy.mode is Mode.LLM and not self._remote.reachable:
            raise SelectorUnavailableError(
                "no selector (LLM) can be reached, and mode llm is the LLM's own answer; "
                "try again in a moment, or choose a mode that goes on without the LLM"
            )
        selector = await self._local_selector(request)
        request = replace(request, selector=selector.version if selector else "")
        calibration = (
            selector.calibration.or_else(self._calibration) if selector else self._calibration
        )
        request = with_thresholds(request, calibration)
        if request.score_rollout and not self._remote.info.digest:
            raise SelectorUnavailableError(
                "no selector (LLM) is running, so a rollout cannot be scored"
            )
        return request, selector

    async def _local_selector(self, request: GenerateRequest) -> LocalSelector | None:
        if request.selector:
            return await self._live.obtain(request.selector)
        if request.selector == "":
            return None
        selector = self._live.choose(request.request_id)
        if selector is None and request.policy.mode is Mode.S2T_LOCAL:
            raise VersionNotFoundError(
                "no local selector is live; train one (s2t train), or ask for version 'none'"
            )
        return selector

    async def _finish(self, request: GenerateRequest, builder: AnswerBuilder) -> Reply:
        uses_llm = request.policy.needs_llm or request.score_rollout
        answer = builder.answer(self._runtime.digest, self._remote.info.digest if uses_llm else "")
        labels, stored = request.labels, 0
        if (labels.durable or labels.collect) and answer.usage.degraded_steps:
            raise SelectorUnavailableError(
                f"the LLM did not answer at {answer.usage.degraded_steps} positions; "
                "nothing was kept, send the request again"
            )
        rollout = None
        if (
            labels.store or labels.collect
        ):  # off the loop: hashing and statistics of a long answer take a while
            rollout = await asyncio.to_thread(self._rollout, request, builder, answer)
        if rollout is not None and labels.store and self._writer is not None:
            await self._keep(rollout, self._writer, labels.durable)
            stored = len(rollout.labels)
        shown = tuple(s for s in answer.steps if s.triggered or s.degraded or request.score_rollout)
        answer = replace(answer, steps=shown if request.return_steps else ())
        texts = tuple(self._tokenizer.decode([s.token_id]) for s in answer.steps)
        return Reply(
            answer=answer,
            step_texts=texts,
            labels_stored=stored,
            rollout=rollout.to_json().encode() if rollout and labels.collect else b"",
        )

    async def _keep(self, rollout: Rollout, writer: LabelWriter, durable: bool) -> None:
        if not rollout.labels and not rollout.llm_top_rank:  # it says nothing of the LLM
            return
        stored = writer.write([rollout])
        if durable:
            try:
                await asyncio.wait_for(asyncio.wrap_future(stored), DURABLE_S)
            except (StoreError, TimeoutError) as error:
                log.warning(
                    "labels of a request that wanted them durable: %s", error or "not in time"
                )
                raise StoreError(
                    "the labels could not be stored durably; send the request again"
                ) from error

    def _rollout(self, request: GenerateRequest, builder: AnswerBuilder, answer: Answer) -> Rollout:
        digests = Digests(
            self._runtime.digest,
            self._remote.info.digest,
            self._tokenizer.digest,
            self._tokenizer.template_digest,
        )
        scored = "plain" if request.policy.mode in (Mode.GREEDY, Mode.SAMPLE) else "intervened"
        return rollout_of(
            builder.sequences[0].request.token_ids,
            answer.steps,
            request.policy.candidates,
            request.labels,
            digests,
            request.request_id,
            scored if request.score_rollout else "online",
        )

    async def describe(self) -> Description:
        return Description(
            slm_digest=self._runtime.digest,
            tokenizer_digest=self._tokenizer.digest,
            template_digest=self._tokenizer.template_digest,
            llm_digest=self._remote.info.digest,
            max_length=self._runtime.max_length,
            live_version=self._live.live_version,
            canary=self._live.canary,
            calibrated=tuple(self._calibration.thresholds),
            labels_dropped=dict(self._writer.dropped) if self._writer else {},
            load=self._engine.load,
        )

    def __del__(self) -> None:
        writer: LabelWriter | None = getattr(self, "_writer", None)  # none after a failed start
        if writer is not None:  # Serve ends us in good order: what is queued is stored first
            writer.close()

    def check_health(self) -> None:
        if not self._engine.thread.is_alive():
            raise RuntimeError("the engine thread has died")
