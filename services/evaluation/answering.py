"""Who answers an evaluation's requests: a pair in this process, or a running service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.pair import Pair
from s2t_shared.types import GenerateRequest
from services.rpc.ask_many import Outcome, Target, answer_all, describe

OnOutcome = Callable[[GenerateRequest, Outcome], None]


class Answerer(Protocol):
    """Answers requests as they come, over the decode path that serves."""

    @property
    def tokenizer(self) -> TextTokenizer | None:
        """Turns token ids into text; None where none is at hand."""

    def identity(self) -> dict[str, str]:
        """What answers: digests of SLM and LLM, version of the local selector."""

    def prepare(self, request: GenerateRequest) -> None:
        """Measure what such requests need beforehand, so that it is in no row's time."""

    def answer(self, requests: Sequence[GenerateRequest], on_outcome: OnOutcome) -> None:
        """Answer all requests; each one's outcome is handed over when it is known.

        The requests have one policy and budget.
        """


@dataclass(frozen=True)
class PairAnswerer:
    """A pair in this process. calibration_prompts: training prompts to calibrate budgets on."""

    pair: Pair
    calibration_prompts: Path | None = None
    say: Callable[[str], None] = lambda line: None

    @property
    def tokenizer(self) -> TextTokenizer | None:
        return self.pair.tokenizer

    def identity(self) -> dict[str, str]:
        local = self.pair.local_selector
        return {
            "slm": self.pair.engine.proposer.info.digest,
            "llm": self.pair.llm_digest,
            "local_selector": local.version if local else "",
        }

    def prepare(self, request: GenerateRequest) -> None:
        """Calibrate the request's budget, and forget the prompts that an earlier row has read."""
        self._calibrated(request)
        self.pair.forget()

    def answer(self, requests: Sequence[GenerateRequest], on_outcome: OnOutcome) -> None:
        if not requests:
            return
        first = self._calibrated(requests[0])
        policy = first.options.policy
        ready = []
        for request in requests:
            options = replace(request.options, policy=policy)
            ready.append(replace(request, options=options, budget=None))
        for request, outcome in self.pair.run(ready):
            on_outcome(request, outcome)

    def _calibrated(self, request: GenerateRequest) -> GenerateRequest:
        return self.pair.with_thresholds(request, self.calibration_prompts, self.say)


@dataclass(frozen=True)
class ServiceAnswerer:
    """A running service, asked `concurrency` requests at a time."""

    target: Target
    concurrency: int = 32
    tokenizer: TextTokenizer | None = None

    def identity(self) -> dict[str, str]:
        service = describe(self.target)
        return {
            "slm": service.slm_digest,
            "llm": service.llm_digest,
            "local_selector": service.live_version,
        }

    def prepare(self, request: GenerateRequest) -> None:
        """Nothing: a service has calibrated."""

    def answer(self, requests: Sequence[GenerateRequest], on_outcome: OnOutcome) -> None:
        answer_all(self.target, requests, self.concurrency, on_answer=on_outcome)
