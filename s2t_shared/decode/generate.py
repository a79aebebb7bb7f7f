"""A prompt in, an answer out: the text around the engine. One request may be several sequences
(majority@n).

`AnswerBuilder` folds Steps into text, usage and the final `Answer`. The proposer replica and the
in-process `Generator` share it. Knows text and the engine; no transport, no storage.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from s2t_shared.answers import extract_answer
from s2t_shared.decode.engine import Engine
from s2t_shared.decode.sequence import LiveSequence
from s2t_shared.errors import (
    DeadlineExceededError,
    OverloadedError,
    S2TError,
    SelectorUnavailableError,
)
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.text_stream import TextStream
from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.policy import Calibration
from s2t_shared.requests import check_request
from s2t_shared.types import (
    MAX_SAMPLES,
    Answer,
    AnswerPiece,
    DecodeRequest,
    FinishReason,
    GenerateRequest,
    LabelRule,
    Mode,
    Progress,
    Step,
    Usage,
    Versions,
)

# -- requests -------------------------------------------------------------------------------------


def with_thresholds(request: GenerateRequest, calibration: Calibration) -> GenerateRequest:
    """The request with its budgets turned into thresholds.

    Raises:
        InvalidRequestError: a budget is out of range.
        ConfigError: a trigger is not calibrated.
    """
    options = request.options
    policy = options.policy
    labels = request.labels
    if request.budget is not None and policy.can_trigger:
        threshold = calibration.threshold(policy.trigger, request.budget)
        options = replace(options, policy=replace(policy, threshold=threshold))
    if labels.store and options.score_rollout and not labels.rules:
        triggers = labels.triggers or (policy.trigger,)
        rules = tuple(LabelRule(t, calibration.threshold(t, labels.budget)) for t in triggers)
        labels = replace(labels, rules=rules)
    return replace(request, options=options, labels=labels, budget=None)


@dataclass(frozen=True, kw_only=True)
class EncodedRequest:
    """A checked request and its prompt's token ids. deadline, start_by, turn: as in
    `DecodeRequest`. decided_text: of what another proposer has decided, None at the beginning."""

    request: GenerateRequest
    token_ids: tuple[int, ...]
    decided_text: SequenceText | None = None
    deadline: float | None = None
    start_by: float | None = None
    turn: float = 0.0


def encode_request(request: GenerateRequest, tokenizer: TextTokenizer) -> EncodedRequest:
    """Check a request, tokenize its prompt, read what is decided already, and start the time it
    has. Needs no engine.

    Raises:
        InvalidRequestError: a field is out of range, or the prompt cannot be tokenized.
    """
    check_request(request)
    deadline = time.monotonic() + request.timeout_s if request.timeout_s > 0 else None
    token_ids = tokenizer.encode(request.prompt)
    decided_text = None
    if request.progress is not None:
        decided_text = SequenceText(tokenizer, request.stop)
        decided_text.read(request.progress.token_ids)
    return EncodedRequest(
        request=request, token_ids=token_ids, decided_text=decided_text, deadline=deadline
    )


def decode_requests(encoded: EncodedRequest) -> list[DecodeRequest]:
    """The sequences of a request: one, or `samples` sampled ones for majority@n."""
    request = encoded.request
    one = DecodeRequest(
        request_id=request.request_id,
        token_ids=encoded.token_ids,
        options=request.options,
        deadline=encoded.deadline,
        start_by=encoded.start_by,
        turn=encoded.turn,
        trace=request.trace,
    )
    progress = request.progress
    if request.options.policy.mode is not Mode.MAJORITY:
        if progress is None:
            return [one]
        return [replace(one, decided=progress.decided, llm_forwards=progress.llm_forwards)]
    assert progress is None, "of several samples nothing is shown before the last one ends"
    policy = replace(request.options.policy, mode=Mode.SAMPLE)
    sampling = request.options.sampling
    found = []
    for i in range(request.samples):
        own = replace(sampling, seed=sampling.seed * MAX_SAMPLES + i)
        options = replace(request.options, policy=policy, sampling=own)
        found.append(replace(one, request_id=f"{request.request_id}/{i}", options=options))
    return found


# -- answers --------------------------------------------------------------------------------------


class SequenceText:
    """The text of one sequence. The engine calls it with each emitted id; True ends the answer."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, stop)
        self._pieces: deque[str] = deque()
        self._failure: Exception | None = None

    def __call__(self, token_id: int) -> bool:
        try:
            piece = self._stream.push(token_id)
        except Exception as error:  # noqa: BLE001 - a tokenizer raises anything, and others decode
            self._failure = error
            piece = ""
        self._pieces.append(piece)
        return self._stream.stopped or self._failure is not None

    def read(self, token_ids: Iterable[int]) -> None:
        """Take in ids whose text was handed out already, by somebody else."""
        for token_id in token_ids:
            self._stream.push(token_id)

    def next_piece(self) -> str:
        """What the next Step added to the text: nothing for an id that ended the answer."""
        return self._pieces.popleft() if self._pieces else ""

    def finish(self) -> str:
        """The rest of the text, at the end of the answer. Raises what the tokenizer raised."""
        if self._failure is not None:
            raise self._failure
        return self._stream.finish()

    @property
    def text(self) -> str:
        return self._stream.text


class AnswerBuilder:
    """Folds the Steps of one request into text and its `Answer`."""

    def __init__(
        self,
        encoded: EncodedRequest,
        tokenizer: TextTokenizer,
        engine: Engine,
        local_selector: LocalSelector | None = None,
    ) -> None:
        """Queue the request's sequences on `engine`. `local_selector` as in `Engine.add`.

        Raises:
            InvalidRequestError: the request cannot be answered.
            VersionNotFoundError: there is no local selector of the named version.
        """
        self.request = encoded.request
        self._engine = engine
        self.sequences: list[LiveSequence] = []
        self._texts: dict[LiveSequence, SequenceText] = {}
        self._steps: dict[LiveSequence, list[Step]] = {}  # with their text
        for decode in decode_requests(encoded):
            text = encoded.decided_text or SequenceText(tokenizer, encoded.request.stop)
            sequence = engine.add(replace(decode, stopping=text), local_selector)
            self.sequences.append(sequence)
            self._texts[sequence] = text
            self._steps[sequence] = list(decode.decided)
        self._open = len(self.sequences)

    def push(self, sequence: LiveSequence, steps: Sequence[Step]) -> AnswerPiece:
        """Fold one event of the engine. Returns what can be streamed now.

        For majority@n nothing, until the last sample ends: then the winner's text and Steps.
        """
        text = self._texts[sequence]
        new = [step.changed(text=text.next_piece()) for step in steps]
        rest = ""
        if sequence.finish_reason is not None:
            self._open -= 1
            if sequence.finish_reason is FinishReason.LLM_FAILED:
                self.cancel()  # the other samples have nothing left to vote on
            rest = text.finish()
            if new:
                new[-1] = new[-1].changed(text=new[-1].text + rest)
                rest = ""
        self._steps[sequence] += new
        if len(self.sequences) == 1:
            return AnswerPiece("".join(step.text for step in new) + rest, tuple(new))
        if not self.done:
            return AnswerPiece()
        winner = self._vote()
        return AnswerPiece(self._texts[winner].text, tuple(self._steps[winner]))

    @property
    def done(self) -> bool:
        """Whether every sequence has ended."""
        return self._open == 0

    def progress(self, steps: Sequence[Step], slm_digest: str) -> Progress | None:
        """What new Steps add to the answer's progress; None where nothing is shown yet."""
        if not steps or len(self.sequences) > 1:
            return None
        [sequence] = self.sequences
        return Progress(
            slm=slm_digest,
            version=sequence.version,
            threshold=self.request.options.policy.threshold,
            llm_forwards=sequence.llm_forwards,
            token_ids=tuple(step.token_id for step in steps),
            steps=tuple(s for s in steps if s.triggered or s.degraded or s.llm_digest),
        )

    def cancel(self) -> None:
        """End what is still being decoded."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                self._engine.cancel(sequence)

    def answer(self, slm_digest: str) -> Answer:
        """The finished answer, with every Step.

        Raises:
            OverloadedError: it was not begun, because its deadline could not be met any more.
            DeadlineExceededError: the request's own deadline passed first.
            SelectorUnavailableError: the LLM did not answer, and the request chose to fail then; or
                the LLM's own answer was asked for, and the LLM made none of it.
        """
        for s in self.sequences:
            if s.finish_reason is FinishReason.LLM_FAILED:
                raise SelectorUnavailableError(
                    f"the LLM was needed behind token {len(s.steps)} and did not answer "
                    f"({s.llm_failure}); the request chose to fail then: send it again, or choose "
                    "on_llm_failure=degrade"
                )
        if any(s.finish_reason is FinishReason.DEADLINE for s in self.sequences):
            if not any(s.was_begun or s.request.start_by is None for s in self.sequences):
                raise OverloadedError(
                    f"waited for a place in the batch until the deadline of "
                    f"{self.request.timeout_s:g} s could not be met any more; nothing was begun"
                )
            decoded = sum(len(s.steps) for s in self.sequences)
            raise DeadlineExceededError(
                f"the deadline of {self.request.timeout_s:g} s passed after {decoded} tokens; "
                "allow more time or fewer tokens"
            )
        chosen = self._vote()
        asked_llm = self.request.options.policy.mode is Mode.LLM
        if asked_llm and all(step.degraded for step in chosen.steps):
            raise SelectorUnavailableError(
                f"the LLM answered at none of the {len(chosen.steps)} steps of a mode llm answer; "
                "send the request again, or choose a mode that goes on without the LLM"
            )
        assert chosen.finish_reason is not None
        usage = sum((s.usage for s in self.sequences), Usage())
        return Answer(
            token_ids=chosen.output_ids,
            text=self._texts[chosen].text,
            finish_reason=chosen.finish_reason,
            usage=replace(usage, prompt_tokens=chosen.usage.prompt_tokens),
            versions=Versions(slm_digest, _llm_digest(chosen.steps), chosen.version),
            steps=tuple(self._steps[chosen]),
        )

    def _vote(self) -> LiveSequence:
        """The first sample with the most frequent extracted answer (never "any is right")."""
        pattern = self.request.answer_pattern
        if len(self.sequences) == 1:
            return self.sequences[0]
        answers = [extract_answer(self._texts[s].text, pattern) for s in self.sequences]
        votes = Counter(answer for answer in answers if answer is not None)
        if not votes:
            return self.sequences[0]
        winner = max(votes, key=lambda answer: (votes[answer], -answers.index(answer)))
        return self.sequences[answers.index(winner)]


def _llm_digest(steps: Sequence[Step]) -> str:
    """Of the last LLM that answered, "" when none did."""
    return next((step.llm_digest for step in reversed(steps) if step.llm_digest), "")


def shown_steps(request: GenerateRequest, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The Steps that an answer carries: the triggered and degraded ones, or all of a scored
    rollout."""
    if not request.return_steps:
        return ()
    every = request.options.score_rollout
    return tuple(step for step in steps if every or step.triggered or step.degraded)


# -- in this process ------------------------------------------------------------------------------


@dataclass
class Generator:
    """Generation in this process: a tokenizer and an engine, no service around them."""

    tokenizer: TextTokenizer
    engine: Engine

    def generate(
        self, requests: Iterable[GenerateRequest], window: int = 256
    ) -> Iterator[tuple[GenerateRequest, Answer | S2TError]]:
        """Answers as they finish, not in input order. A request's own error comes in its place.

        At most `window` requests are queued at once.
        """
        builders: dict[LiveSequence, AnswerBuilder] = {}
        try:
            yield from self._generate(iter(requests), window, builders)
        finally:  # a caller that stops asking
            for builder in builders.values():
                builder.cancel()
            while builders and not self.engine.idle:
                self.engine.step()

    def _generate(
        self,
        waiting: Iterator[GenerateRequest],
        window: int,
        builders: dict[LiveSequence, AnswerBuilder],
    ) -> Iterator[tuple[GenerateRequest, Answer | S2TError]]:
        active = 0
        more = True
        while more or active:
            while more and active < window:
                request = next(waiting, None)
                if request is None:
                    more = False
                    break
                try:
                    builder = self._builder(request)
                except S2TError as error:
                    yield request, error
                    continue
                builders |= dict.fromkeys(builder.sequences, builder)
                active += 1
            for sequence, steps in self.engine.step():
                builder = builders[sequence]
                builder.push(sequence, steps)
                if builder.done:
                    for finished in builder.sequences:
                        del builders[finished]
                    active -= 1
                    yield builder.request, self._outcome(builder)
            self.engine.wait()

    def stream(self, request: GenerateRequest) -> Iterator[AnswerPiece]:
        """Pieces of one answer as they are decided. The last piece carries the answer.

        Raises:
            S2TError: the request cannot be answered.
        """
        builder = self._builder(request)
        try:
            while not builder.done:
                for sequence, steps in self.engine.step():
                    piece = builder.push(sequence, steps)
                    if piece.text or piece.steps:
                        yield piece
                self.engine.wait()
            yield AnswerPiece(answer=self._answer(builder))
        finally:
            builder.cancel()
            while not self.engine.idle:  # what was cancelled gives its KV back
                self.engine.step()

    def _builder(self, request: GenerateRequest) -> AnswerBuilder:
        return AnswerBuilder(encode_request(request, self.tokenizer), self.tokenizer, self.engine)

    def _outcome(self, builder: AnswerBuilder) -> Answer | S2TError:
        try:
            return self._answer(builder)
        except S2TError as error:
            return error

    def _answer(self, builder: AnswerBuilder) -> Answer:
        return builder.answer(self.engine.proposer.info.digest)
