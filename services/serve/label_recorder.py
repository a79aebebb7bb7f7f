"""What a proposer does with the LLM's selections in a finished answer: they become labels.

Knows answers, rollouts and the label writer; no engine, no network.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial

from s2t_shared.errors import ConfigError, SelectorUnavailableError, StoreError
from s2t_shared.labels.label import Digests, Rollout, rollout_of
from s2t_shared.labels.writer import DROP_REASONS, LabelWriter
from s2t_shared.splits import check_split
from s2t_shared.types import Answer, GenerateRequest, LabelOptions, Mode, TraceHeaders
from services.metrics.registry import Reading
from services.rpc import tracing

log = logging.getLogger(__name__)
DURABLE_TIMEOUT_S = 30.0
PLAIN_MODES = (Mode.GREEDY, Mode.SAMPLE)


class LabelRecorder:
    """Makes labels of answers and hands them to the writer.

    writer: None where no Redis is configured: then labels can be collected, but not stored.
    durable_timeout_s: seconds that an answer waits at most until its labels are stored durably.
    """

    def __init__(
        self, writer: LabelWriter | None, durable_timeout_s: float = DURABLE_TIMEOUT_S
    ) -> None:
        self._writer = writer
        self._durable_timeout_s = durable_timeout_s

    @property
    def dropped(self) -> int:
        """Labels that were lost since the start, for whatever reason."""
        return sum(self._writer.dropped.values()) if self._writer is not None else 0

    def readings(self) -> Iterator[Reading]:
        """For the metrics; from any thread."""
        if self._writer is None:
            return
        yield Reading("s2t_labels_written_total", self._writer.written)
        for reason in DROP_REASONS:  # those at 0 too, or no query would see the first one rise
            labels = self._writer.dropped[reason]
            yield Reading("s2t_labels_dropped_total", labels, (reason.replace(" ", "_"),))
        with suppress(StoreError):  # the disk refuses: then dropped labels tell of it
            usage = self._writer.spool_usage()
            yield Reading("s2t_spool_bytes", usage.bytes)
            yield Reading("s2t_spool_rollouts", usage.entries)

    def check(self, options: LabelOptions) -> None:
        """Check what a request wants of its labels, before it is decoded.

        Raises:
            EvaluationSplitError: labels of an evaluation split are wanted.
            ConfigError: durable labels are wanted, but no Redis is configured.
        """
        if options.store or options.collect:
            check_split(options.split)
        if options.store and options.durable and self._writer is None:
            raise ConfigError(
                "durable labels were asked for, but no Redis is configured (redis.url)"
            )

    async def record(
        self,
        request: GenerateRequest,
        prompt_ids: tuple[int, ...],
        answer: Answer,
        digests: Digests,
    ) -> Answer:
        """The answer with what became of its labels. `answer` holds every Step.

        Raises:
            SelectorUnavailableError: labels are wanted, but the LLM did not answer everywhere, or
                two LLMs did.
            StoreError: the labels could not be stored durably.
        """
        options = request.labels
        if not options.store and not options.collect:
            return answer
        degraded = answer.usage.degraded_steps
        if (options.durable or options.collect) and degraded:
            raise SelectorUnavailableError(
                f"the LLM did not answer at {degraded} positions; nothing was kept, "
                "send the request again"
            )
        if (options.durable or options.collect) and _llms(answer) - {digests.llm}:
            raise SelectorUnavailableError(
                "the LLM was replaced by another one while it answered; nothing was kept, send "
                "the request again"
            )
        # Not on the loop: hashes and statistics of a long answer take a while.
        rollout = await asyncio.to_thread(make_rollout, request, prompt_ids, answer, digests)
        if options.store and self._writer is not None:
            await self.store(rollout, options.durable, request.trace)
            answer = replace(answer, labels_stored=len(rollout.labels))
        if options.collect:
            answer = replace(answer, rollout=rollout.to_json().encode())
        return answer

    async def store(self, rollout: Rollout, durable: bool, trace: TraceHeaders = ()) -> None:
        """Hand a rollout to the writer; with `durable` wait until it is stored.

        trace: what storing it belongs to.

        Raises:
            StoreError: it is not stored durably.
        """
        assert self._writer is not None
        says_nothing_of_the_llm = not rollout.labels and not rollout.llm_top_rank
        if says_nothing_of_the_llm:
            return
        span = tracing.start("labels.append", trace, "client", labels=len(rollout.labels))
        stored = self._writer.write([rollout])
        stored.add_done_callback(partial(_end, span, self._writer))
        if not durable:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(stored), self._durable_timeout_s)
        except (StoreError, TimeoutError) as error:
            reason = str(error) or "not in time"
            log.warning("labels of a request that wanted them durable: %s", reason)
            raise StoreError(
                "the labels could not be stored durably; send the request again"
            ) from error

    def close(self) -> None:
        """Store what is queued."""
        if self._writer is not None:
            self._writer.close()


def _end(span: tracing.Span, writer: LabelWriter, stored: Future[None]) -> None:
    error = stored.exception()
    if error is None:
        span.set({"place": "redis" if writer.writes_to_redis else "spool"})
    span.end("" if error is None else type(error).__name__)


def _llms(answer: Answer) -> set[str]:
    return {step.llm_digest for step in answer.steps if step.llm_digest}


def make_rollout(
    request: GenerateRequest, prompt_ids: tuple[int, ...], answer: Answer, digests: Digests
) -> Rollout:
    """The rollout of an answer that holds every Step."""
    policy = request.options.policy
    source = "online"
    if request.options.score_rollout:
        source = "plain" if policy.mode in PLAIN_MODES else "intervened"
    return rollout_of(
        prompt_ids=prompt_ids,
        steps=answer.steps,
        rule=policy.candidates,
        options=request.labels,
        digests=digests,
        request_id=request.request_id,
        source=source,
    )
