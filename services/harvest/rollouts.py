"""Makes a harvest's rollouts: with both models in this process, or through a running service.

A `RolloutSource` takes prompts and gives scored rollouts with their labels, in any order. Which
prompts, and what becomes of the labels, is the business of `run`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from s2t_shared.decode.generate import Generator
from s2t_shared.errors import (
    OverloadedError,
    S2TError,
    SelectorUnavailableError,
    ServiceUnavailableError,
    StoreError,
)
from s2t_shared.labels.label import Digests, Rollout, rollout_of
from s2t_shared.pair import Pair
from s2t_shared.types import (
    Answer,
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    LabelOptions,
    LabelRule,
    Mode,
    Policy,
    Prompt,
    ServiceDescription,
    Trigger,
)
from services.rpc.ask_many import AsyncCaller, Target, describe, pause_before_retry

TRIGGERS = (Trigger.ENTROPY, Trigger.KL)
# A part of the service is away or full, and will be back.
RETRIED = (SelectorUnavailableError, ServiceUnavailableError, OverloadedError, StoreError)
MAX_PAUSE_S = 10.0
WINDOW = 64  # rollouts queued at once in this process
ROLLOUTS_PER_PROPOSER = 64  # requests to a service in flight
FOLLOW_S = 10.0  # how often a harvest looks for more or fewer proposers


@dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """What becomes a label.

    triggers: a position becomes a label when one of them lies in the top `budget` of all positions.
    thresholds: instead of triggers and budget, a label lies above one of these.
    candidates: K. intervene: S2T rollouts instead of greedy ones, selecting by KL where that is
    among the triggers. calibrate_on: how many first prompts give the thresholds.
    """

    task: str = ""
    split: str = "train"
    triggers: tuple[Trigger, ...] = TRIGGERS
    budget: float = 0.1
    thresholds: tuple[LabelRule, ...] = ()
    candidates: int = 16
    max_new_tokens: int = 256
    intervene: bool = False
    calibrate_on: int = 64


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One rollout to make.

    group: of problems that are held out together, "" for none.
    calibrating: a greedy one that comes back with its labels, whoever stores the others.
    """

    request_id: str
    problem_id: str
    group: str = ""
    prompt: Prompt
    rules: tuple[LabelRule, ...]
    calibrating: bool = False


@dataclass(frozen=True)
class RolloutCounts:
    """The size of a rollout: its labels, and the tokens of its answer."""

    labels: int
    tokens: int

    @classmethod
    def of(cls, rollout: Rollout | RolloutCounts) -> RolloutCounts:
        if isinstance(rollout, RolloutCounts):
            return rollout
        return cls(len(rollout.labels), len(rollout.token_ids) - rollout.prompt_length)


# Counts stand for a rollout that a service has stored.
RolloutOutcome = Rollout | RolloutCounts | S2TError
OnRollout = Callable[[RolloutRequest, RolloutOutcome], None]


class RolloutSource(Protocol):
    """Makes rollouts.

    returns_labels: rollouts come back with their labels, for the caller to write; else a service
    has stored them. precision: of the arithmetic, as "torch.float32"; "" where it is unknown.
    """

    digests: Digests
    precision: str
    returns_labels: bool

    def make_rollouts(
        self,
        requests: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: OnRollout,
    ) -> None:
        """Call `on_rollout` with the outcome of each request, in any order."""


def generate_request(
    request: RolloutRequest, options: HarvestOptions, labels: LabelOptions
) -> GenerateRequest:
    """The request for the answer that becomes the rollout."""
    decode = DecodeOptions(
        policy=_policy(request, options),
        max_new_tokens=options.max_new_tokens,
        version="",
        score_rollout=True,
    )
    return GenerateRequest(
        request_id=request.request_id, prompt=request.prompt, options=decode, labels=labels
    )


def _policy(request: RolloutRequest, options: HarvestOptions) -> Policy:
    rule = CandidateRule(options.candidates)
    if request.calibrating or not options.intervene:
        return Policy(candidates=rule)
    by_kl = [rule for rule in request.rules if rule.trigger is Trigger.KL]
    selecting = (by_kl or request.rules)[0]
    return Policy(
        mode=Mode.S2T,
        trigger=selecting.trigger,
        threshold=selecting.threshold,
        candidates=rule,
    )


class PairRollouts:
    """Makes rollouts with both models in this process."""

    returns_labels = True

    def __init__(self, pair: Pair) -> None:
        self._generator: Generator = pair.generator
        self.precision = str(pair.dtype)
        self.digests = Digests(
            pair.engine.proposer.info.digest,
            pair.llm_digest,
            pair.tokenizer.digest,
            pair.tokenizer.template_digest,
        )

    def make_rollouts(
        self,
        requests: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: OnRollout,
    ) -> None:
        waiting: dict[str, RolloutRequest] = {}

        def to_generate() -> Iterator[GenerateRequest]:
            for request in requests:
                waiting[request.request_id] = request
                labels = LabelOptions(
                    store=True,
                    task=options.task,
                    problem_id=request.problem_id,
                    group=request.group,
                    split=options.split,
                    rules=request.rules,
                )
                yield generate_request(request, options, labels)

        for question, answer in self._generator.generate(to_generate(), window=WINDOW):
            request = waiting.pop(question.request_id)
            on_rollout(request, self._rollout(question, answer, options))

    def _rollout(
        self, question: GenerateRequest, answer: Answer | S2TError, options: HarvestOptions
    ) -> Rollout | S2TError:
        if isinstance(answer, S2TError):
            return answer
        degraded = [step.degraded for step in answer.steps if step.degraded]
        if degraded:
            return SelectorUnavailableError(degraded[0])
        return rollout_of(
            self._generator.tokenizer.encode(question.prompt),
            answer.steps,
            question.options.policy.candidates,
            question.labels,
            self.digests,
            question.request_id,
            "intervened" if options.intervene else "plain",
        )


class ServiceRollouts:
    """Makes rollouts through a running service, over gRPC.

    returns_labels: rollouts come back with their labels. Otherwise the labels go into the service's
    stream and lake like all its labels, and an answer comes when they are durable there.
    A part of the service that is away is waited for, up to `patience_s` seconds without any answer.
    """

    def __init__(
        self,
        target: Target,
        returns_labels: bool,
        concurrency: int = 0,
        patience_s: float = 600.0,
    ) -> None:
        """concurrency: requests in flight; 0: as many as the proposers can take, and more or fewer
        when Serve changes their number.

        Raises:
            SelectorUnavailableError: the service has no LLM.
            S2TError: it cannot be asked.
        """
        self._target = target
        self._patience_s = patience_s
        self.returns_labels = returns_labels
        service = describe(target)
        if not service.llm_reachable:
            raise SelectorUnavailableError(
                "the service has no LLM to select with now; start a selector, then harvest"
            )
        self.precision = ""
        self.digests = Digests(
            service.slm_digest,
            service.llm_digest,
            service.tokenizer_digest,
            service.template_digest,
        )
        self._follows_proposers = concurrency == 0
        self._concurrency = concurrency or _concurrency(service)
        self._answered_at = time.monotonic()

    def make_rollouts(
        self,
        requests: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: OnRollout,
    ) -> None:
        asyncio.run(self._make_rollouts(iter(requests), options, on_rollout))

    async def _make_rollouts(
        self, requests: Iterator[RolloutRequest], options: HarvestOptions, on_rollout: OnRollout
    ) -> None:
        self._answered_at = time.monotonic()
        async with self._target.open_channel() as channel:
            caller = AsyncCaller(self._target, channel)

            workers: set[asyncio.Task[None]] = set()
            exhausted = False

            async def worker() -> None:
                nonlocal exhausted
                for request in requests:  # shared by all workers
                    on_rollout(request, await self._ask(caller, request, options))
                    if len(workers) > self._concurrency:
                        return
                exhausted = True

            while workers or not exhausted:
                if not exhausted:
                    missing = self._concurrency - len(workers)
                    workers |= {asyncio.create_task(worker()) for _ in range(missing)}
                ended, workers = await asyncio.wait(
                    workers, timeout=FOLLOW_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in ended:
                    task.result()
                if not ended and self._follows_proposers:
                    self._concurrency = await asyncio.to_thread(self._wanted_concurrency)

    def _wanted_concurrency(self) -> int:
        """By the proposers that run now; unchanged while the service does not say."""
        try:
            return _concurrency(describe(self._target))
        except S2TError:
            return self._concurrency

    async def _ask(
        self, caller: AsyncCaller, request: RolloutRequest, options: HarvestOptions
    ) -> RolloutOutcome:
        """One rollout. Retries until it comes, or until no answer came for too long."""
        collect = self.returns_labels or request.calibrating
        labels = LabelOptions(
            store=not collect,
            durable=not collect,
            collect=collect,
            task=options.task,
            problem_id=request.problem_id,
            group=request.group,
            split=options.split,
            rules=request.rules,
        )
        question = generate_request(request, options, labels)
        pause = 0.2
        while True:
            answer = await caller.answer(question, self._patience_s)
            if isinstance(answer, Answer):
                self._answered_at = time.monotonic()
                if answer.rollout:
                    return Rollout.from_json(answer.rollout)
                return RolloutCounts(answer.labels_stored, len(answer.token_ids))
            waited = time.monotonic() - self._answered_at
            if not isinstance(answer, RETRIED) or waited > self._patience_s:
                return answer
            wanted = pause_before_retry(answer)
            await asyncio.sleep(pause if wanted is None else min(MAX_PAUSE_S, wanted))
            pause = min(MAX_PAUSE_S, 2 * pause)


def _concurrency(service: ServiceDescription) -> int:
    return ROLLOUTS_PER_PROPOSER * max(1, service.proposers)
