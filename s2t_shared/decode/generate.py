"""A prompt in, an answer out: the text around the engine. One request may be several sequences (majority@n).

`AnswerBuilder` is the fold from Steps to text, usage and the final `Answer`; the proposer replica and the in-process
`Generator` share it. Knows text and the engine; no transport, no storage.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import DeadlineExceededError, InvalidRequestError, S2TError, SelectorUnavailableError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.tokenizer import TextStream, Tokenizer
from s2t_shared.policy import CALIBRATED, Calibration
from s2t_shared.types import (
    Answer,
    DecodeRequest,
    FinishReason,
    LabelOptions,
    LabelRule,
    Mode,
    Policy,
    Prompt,
    Sampling,
    Step,
    Usage,
    Versions,
)

MAX_SAMPLES = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH, MAX_STOP_TOTAL = 256, 1024  # characters: of one stop string, of all


@dataclass(frozen=True)
class GenerateRequest:
    """One question. `samples` is n of majority@n. `timeout_s` 0: no deadline. `selector`: None live, "" none.
    `budget`: share of steps that may trigger; None: `policy.threshold` stands as it is."""

    request_id: str
    prompt: Prompt
    policy: Policy = Policy()
    budget: float | None = None
    sampling: Sampling = Sampling()
    samples: int = 8
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    timeout_s: float = 0.0
    selector: str | None = None
    score_rollout: bool = False
    return_steps: bool = False
    labels: LabelOptions = LabelOptions()
    answer_pattern: str = ""
    keep_support: bool = False
    fresh_selections: bool = False


def check_request(request: GenerateRequest) -> None:
    """Raises InvalidRequestError: a text-level field is out of range (the engine checks the rest)."""
    if not 1 <= request.samples <= MAX_SAMPLES:
        raise InvalidRequestError(f"samples={request.samples}: must be 1..{MAX_SAMPLES}")
    if len(request.stop) > MAX_STOP_STRINGS or any(not s for s in request.stop):
        raise InvalidRequestError(f"stop: at most {MAX_STOP_STRINGS} strings, none empty")
    longest, total = max(map(len, request.stop), default=0), sum(map(len, request.stop))
    if longest > MAX_STOP_LENGTH or total > MAX_STOP_TOTAL:
        raise InvalidRequestError(f"stop: the longest string has {longest} characters, all have {total}; at most "
                                  f"{MAX_STOP_LENGTH} each and {MAX_STOP_TOTAL} together are accepted")
    sampling = request.sampling
    if not 0.0 <= sampling.temperature <= 100.0:
        raise InvalidRequestError(f"temperature={sampling.temperature}: must be 0..100")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequestError(f"top_p={sampling.top_p}: must be above 0 and at most 1")
    if sampling.top_k < 0:
        raise InvalidRequestError(f"top_k={sampling.top_k}: must be 0 (off) or more")
    for rule in request.labels.rules:
        if rule.trigger not in CALIBRATED or not math.isfinite(rule.threshold):
            raise InvalidRequestError(f"label rule {rule.trigger.value} > {rule.threshold}: give a finite threshold of "
                                      f"{', '.join(t.value for t in CALIBRATED)}")


def with_thresholds(request: GenerateRequest, calibration: Calibration) -> GenerateRequest:
    """The request with its budgets turned into thresholds.

    Raises:
        InvalidRequestError: a budget is out of range. ConfigError: a trigger is not calibrated.
    """
    policy, labels = request.policy, request.labels
    if request.budget is not None and policy.can_trigger:
        policy = replace(policy, threshold=calibration.threshold(policy.trigger, request.budget))
    if labels.store and request.score_rollout and not labels.rules:
        labels = replace(labels, rules=tuple(LabelRule(t, calibration.threshold(t, labels.budget))
                                             for t in labels.triggers or (policy.trigger,)))
    return replace(request, policy=policy, labels=labels, budget=None)


def extract_answer(text: str, pattern: str = "") -> str | None:
    """The final answer a text states: the last match of `pattern` (its groups joined), when given; else
    \\boxed{...}, else the numbers (or words) after the last "answer (is)", else the last number."""
    if pattern:
        found = [m.groups() or (m.group(),) for m in re.finditer(pattern, text)]
        return " ".join(found[-1]).strip() if found else None
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", text):
        return str(boxed[-1]).strip()
    stated = re.findall(r"(?i)answer(?:\s+is)?\s*:?\s*([^\n]+)", text)
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", stated[-1] if stated else text)
    if stated:
        return " ".join(n.replace(",", "") for n in numbers) or stated[-1].strip().rstrip(".") or None
    return numbers[-1].replace(",", "") if numbers else None


class AnswerBuilder:
    """Folds the Steps of one request into text and its `Answer`."""

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, engine: Engine,
                 local_selector: LocalSelector | None = None) -> None:
        """Queue the request's sequences on `engine`. `local_selector`: as in `Engine.add`.

        Raises:
            InvalidRequestError, VersionNotFoundError.
        """
        check_request(request)
        self.request, self._engine = request, engine
        token_ids = tokenizer.encode(request.prompt)
        deadline = time.monotonic() + request.timeout_s if request.timeout_s > 0 else None
        base = DecodeRequest(request.request_id, token_ids, request.policy, request.sampling, request.max_new_tokens,
                             deadline, request.score_rollout, request.keep_support,
                             request.fresh_selections, request.selector)
        if request.policy.mode is Mode.MAJORITY:
            policy = replace(request.policy, mode=Mode.SAMPLE)
            requests = [replace(base, policy=policy, request_id=f"{request.request_id}/{i}",
                                sampling=replace(request.sampling, seed=request.sampling.seed * MAX_SAMPLES + i))
                        for i in range(request.samples)]
        else:
            requests = [base]
        self.sequences = [engine.add(r, local_selector) for r in requests]
        self._streams = {id(s): TextStream(tokenizer, request.stop) for s in self.sequences}
        self._open = len(self.sequences)

    def push(self, sequence: LiveSequence, steps: Sequence[Step]) -> str:
        """Fold one event of the engine; returns text to stream now (nothing for majority until the vote)."""
        stream = self._streams[id(sequence)]
        piece = ""
        for step in steps:
            # A stop id is not text, whatever its tokenizer makes of it.
            piece += stream.push(step.token_id) if step.token_id not in sequence.stop_ids else ""
            if stream.stopped:  # what was decided behind a stop string is not part of the answer
                sequence.cut(step.index + 1)
                if sequence.finish_reason is None:
                    self._engine.cancel(sequence)
                break
        if sequence.finish_reason is not None:
            piece += stream.finish()
            self._open -= 1
        return piece if len(self.sequences) == 1 else ""

    @property
    def done(self) -> bool:
        return self._open == 0

    def cancel(self) -> None:
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                self._engine.cancel(sequence)

    def answer(self, slm: str, llm: str) -> Answer:
        """The finished answer. `slm`, `llm`: digests for the versions.

        Raises:
            DeadlineExceededError: the request's own deadline passed first.
            SelectorUnavailableError: the LLM's own answer was asked for, and the LLM made none of it.
        """
        if any(s.finish_reason is FinishReason.DEADLINE for s in self.sequences):
            done = sum(len(s.steps) for s in self.sequences)
            raise DeadlineExceededError(f"the deadline of {self.request.timeout_s:g} s passed after {done} tokens; "
                                        "allow more time or fewer tokens")
        chosen = self._vote() if len(self.sequences) > 1 else self.sequences[0]
        stream = self._streams[id(chosen)]
        if self.request.policy.mode is Mode.LLM and all(s.degraded for s in chosen.steps):
            raise SelectorUnavailableError(
                f"the LLM answered at none of the {len(chosen.steps)} steps of a mode llm answer; "
                "send the request again, or choose a mode that goes on without the LLM")
        reason = FinishReason.STOP if stream.stopped else chosen.finish_reason
        assert reason is not None
        usage = sum((s.usage for s in self.sequences), Usage())
        usage = replace(usage, prompt_tokens=chosen.usage.prompt_tokens)
        return Answer(chosen.output_ids, stream.text, reason, usage, Versions(slm, llm, chosen.selector_version),
                      tuple(chosen.steps))

    def _vote(self) -> LiveSequence:
        """The first sample with the most frequent extracted answer (never "any is right")."""
        answers = [extract_answer(self._streams[id(s)].text, self.request.answer_pattern) for s in self.sequences]
        votes = Counter(a for a in answers if a is not None)
        if not votes:
            return self.sequences[0]
        winner = max(votes, key=lambda a: (votes[a], -answers.index(a)))
        return self.sequences[answers.index(winner)]


@dataclass
class Generator:
    """In-process generation: a tokenizer and an engine, no service around them."""

    tokenizer: Tokenizer
    engine: Engine
    llm_digest: str = ""

    def generate(self, requests: Iterable[GenerateRequest], window: int = 256
                 ) -> Iterator[tuple[GenerateRequest, Answer | S2TError]]:
        """Answers as they finish (not in input order); a request's own error comes in its place.

        At most `window` requests are queued at once.
        """
        pending = iter(requests)
        live: dict[int, AnswerBuilder] = {}
        active: set[int] = set()
        exhausted = False
        while not exhausted or active:
            while not exhausted and len(active) < window:
                request = next(pending, None)
                if request is None:
                    exhausted = True
                    break
                try:
                    builder = AnswerBuilder(request, self.tokenizer, self.engine)
                except S2TError as error:
                    yield request, error
                    continue
                active.add(id(builder))
                live |= {id(s): builder for s in builder.sequences}
            for sequence, steps in self.engine.step():
                builder = live[id(sequence)]
                builder.push(sequence, steps)
                if builder.done and id(builder) in active:
                    active.remove(id(builder))
                    for s in builder.sequences:
                        del live[id(s)]
                    yield builder.request, self._outcome(builder)
            self.engine.wait()

    def _outcome(self, builder: AnswerBuilder) -> Answer | S2TError:
        try:
            uses_llm = builder.request.policy.needs_llm or builder.request.score_rollout
            return builder.answer(self.engine.proposer.runtime.digest, self.llm_digest if uses_llm else "")
        except S2TError as error:
            return error
