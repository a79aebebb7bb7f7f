"""Who makes a harvest's rollouts: both models in this process, or a running service.

A `RolloutSource` takes prompts and gives scored rollouts with their labels, in any order. What is
done and kept, `harvest` knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from s2t_shared.decode.generate import Generator
from s2t_shared.errors import OverloadedError, S2TError, SelectorUnavailableError, StoreError
from s2t_shared.labels.label import Digests, Label, Rollout, rollout_of
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.pb.v1 import generation_pb2_grpc as pb_grpc
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
    Trigger,
)
from services.rpc import channels, wire
from services.rpc.ask_many import Target, prompt_fields

TRIGGERS = (Trigger.ENTROPY, Trigger.KL)
RETRIED = (
    SelectorUnavailableError,
    OverloadedError,
    StoreError,
)  # of a service: somebody is away, and will be back
MAX_PAUSE_S = 10.0
WINDOW = 64  # rollouts queued at once in this process


@dataclass(frozen=True, kw_only=True)
class HarvestOptions:
    """`triggers`: a position becomes a label when one of them lies in the top `budget` of all
    positions, or above its threshold in `thresholds`, when they are given. `candidates`: K.
    `intervene`: S2T rollouts instead of greedy ones, selecting by KL where that is among the
    triggers. `calibrate_on`: first prompts that give the thresholds."""

    task: str = ""
    split: str = "train"
    triggers: tuple[Trigger, ...] = TRIGGERS
    budget: float = 0.1
    thresholds: tuple[LabelRule, ...] = ()
    candidates: int = 16
    max_new_tokens: int = 256
    intervene: bool = False
    calibrate_on: int = 64

    def label_options(self, problem_id: str, rules: tuple[LabelRule, ...]) -> LabelOptions:
        return LabelOptions(
            store=True, task=self.task, problem_id=problem_id, split=self.split, rules=rules
        )


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One rollout to make. `calibrating`: greedy, every position a label."""

    request_id: str
    problem_id: str
    prompt: Prompt
    rules: tuple[LabelRule, ...]
    calibrating: bool = False


class RolloutSource(Protocol):
    """Makes rollouts. `keeps`: whether the labels are the caller's to keep (else the service has
    stored them). precision: of the arithmetic, where it is known."""

    digests: Digests
    precision: str
    keeps: bool

    def make_rollouts(
        self,
        asked: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: Callable[[RolloutRequest, Rollout | S2TError], None],
    ) -> None:
        """Call `on_rollout` for each, in any order. What was not stored by a service is a full
        Rollout; otherwise it has counts only."""


def _policy(asked: RolloutRequest, options: HarvestOptions) -> Policy:
    rule = CandidateRule(options.candidates)
    if asked.calibrating or not options.intervene:
        return Policy(candidates=rule)
    selecting = next((r for r in asked.rules if r.trigger is Trigger.KL), asked.rules[0])
    return Policy(
        mode=Mode.S2T, trigger=selecting.trigger, threshold=selecting.threshold, candidates=rule
    )


class InProcess:
    """Both models in this process."""

    keeps = True

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.precision = str(generator.engine.proposer.runtime.model.dtype)
        self.digests = Digests(
            generator.engine.proposer.runtime.digest,
            generator.llm_digest,
            generator.tokenizer.digest,
            generator.tokenizer.template_digest,
        )

    def make_rollouts(
        self,
        asked: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: Callable[[RolloutRequest, Rollout | S2TError], None],
    ) -> None:
        waiting: dict[str, RolloutRequest] = {}

        def requests() -> Iterator[GenerateRequest]:
            for a in asked:
                waiting[a.request_id] = a
                yield GenerateRequest(
                    request_id=a.request_id,
                    prompt=a.prompt,
                    labels=options.label_options(a.problem_id, a.rules),
                    options=DecodeOptions(
                        policy=_policy(a, options),
                        score_rollout=True,
                        version="",
                        max_new_tokens=options.max_new_tokens,
                    ),
                )

        for request, answer in self._generator.generate(requests(), window=WINDOW):
            a = waiting.pop(request.request_id)
            on_rollout(a, self._rollout(a, request, answer, options))

    def _rollout(
        self,
        asked: RolloutRequest,
        request: GenerateRequest,
        answer: Answer | S2TError,
        options: HarvestOptions,
    ) -> Rollout | S2TError:
        if isinstance(answer, S2TError):
            return answer
        if answer.usage.degraded_steps:
            return SelectorUnavailableError(next(s.degraded for s in answer.steps if s.degraded))
        prompt_ids = self._generator.tokenizer.encode(request.prompt)
        return rollout_of(
            prompt_ids,
            answer.steps,
            request.policy.candidates,
            request.labels,
            self.digests,
            asked.request_id,
            "intervened" if options.intervene else "plain",
        )


class ByService:
    """A running service, asked over gRPC. `collect`: its labels come back to be kept here; else
    they go the way of all its labels, into its store and lake, and are done when they are durable
    there.

    Whoever of the service is away is waited for, up to `patience_s` without any answer.
    """

    def __init__(
        self, target: Target, collect: bool, concurrency: int = 0, patience_s: float = 600.0
    ) -> None:
        self._target, self.keeps, self._patience_s = target, collect, patience_s
        with channels.open_channel(
            target.address, Path(target.authority) if target.authority else None, False
        ) as channel:
            try:
                d = pb_grpc.GenerationServiceStub(channel).DescribeService(
                    pb.DescribeServiceRequest(),
                    timeout=30,
                    metadata=channels.call_metadata(target.token),
                )
            except grpc.RpcError as error:
                raise wire.error_of(error) from error
        if not d.llm_digest:
            raise SelectorUnavailableError(
                "the service has no LLM to select with (llm_digest is empty); start a "
                "selector, then harvest"
            )
        self.precision = ""
        self.digests = Digests(d.slm_digest, d.llm_digest, d.tokenizer_digest, d.template_digest)
        self._concurrency = concurrency or 64 * max(1, d.proposers)

    def make_rollouts(
        self,
        asked: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: Callable[[RolloutRequest, Rollout | S2TError], None],
    ) -> None:
        asyncio.run(self._roll(iter(asked), options, on_rollout))

    async def _roll(
        self,
        asked: Iterator[RolloutRequest],
        options: HarvestOptions,
        on_rollout: Callable[[RolloutRequest, Rollout | S2TError], None],
    ) -> None:
        authority = Path(self._target.authority) if self._target.authority else None
        self._heard_at = time.monotonic()
        async with channels.open_channel(self._target.address, authority) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)

            async def worker() -> None:
                for a in asked:  # shared by all workers
                    on_rollout(a, await self._ask(stub, a, options))

            await asyncio.gather(*(worker() for _ in range(self._concurrency)))

    async def _ask(
        self, stub: pb_grpc.GenerationServiceStub, asked: RolloutRequest, options: HarvestOptions
    ) -> Rollout | S2TError:
        request = pb.GenerateRequest(
            request_id=asked.request_id, parameters=self._parameters(asked, options)
        )
        pause = 0.2
        while True:
            try:
                reply = await stub.Generate(
                    request,
                    timeout=self._patience_s,
                    metadata=channels.call_metadata(self._target.token),
                )
                self._heard_at = time.monotonic()
                if reply.answer.rollout:
                    return Rollout.from_json(reply.answer.rollout)
                return _counted(asked, reply.answer)
            except grpc.RpcError as error:
                failure = wire.error_of(error)
            if (
                not isinstance(failure, RETRIED)
                or time.monotonic() - self._heard_at > self._patience_s
            ):
                return failure
            await asyncio.sleep(pause)
            pause = min(MAX_PAUSE_S, 2 * pause)

    def _parameters(
        self, asked: RolloutRequest, options: HarvestOptions
    ) -> pb.GenerationParameters:
        policy, collect = _policy(asked, options), self.keeps or asked.calibrating
        return pb.GenerationParameters(
            **prompt_fields(asked.prompt),
            mode=f"MODE_{policy.mode.name}",
            trigger=f"TRIGGER_{policy.trigger.name}",
            threshold=policy.threshold,
            score_rollout=True,
            candidates=options.candidates,
            version="none",
            max_new_tokens=options.max_new_tokens,
            labels=pb.LabelOptions(
                store=not collect,
                durable=not collect,
                collect=collect,
                task=options.task,
                problem_id=asked.problem_id,
                split=options.split,
                rules=[
                    pb.LabelRule(trigger=f"TRIGGER_{r.trigger.name}", threshold=r.threshold)
                    for r in asked.rules
                ],
            ),
        )


def _counted(asked: RolloutRequest, answer: pb.Answer) -> Rollout:
    """A rollout that the service has stored, as far as it matters here: how many labels and
    tokens."""
    blank = Label(
        label_id="",
        position=1,
        candidate_ids=(),
        slm_log_probs=(),
        llm_log_probs=(),
        llm_top_id=0,
        llm_top_rank=0,
        mass=0.0,
        kl=0.0,
        entropy=0.0,
    )
    return Rollout(
        rollout_id="",
        request_id=asked.request_id,
        problem_id=asked.problem_id,
        task="",
        split="",
        source="",
        token_ids=tuple(answer.token_ids),
        prompt_length=0,
        entropy=(),
        kl=(),
        llm_top_rank=(),
        labels=(blank,) * answer.labels_stored,
        slm_digest="",
        llm_digest="",
        tokenizer_digest="",
        template_digest="",
        created_at=0.0,
    )
