"""Fakes with a script: an SLM, an LLM selector and a tokenizer without a model, for tests of what
is around an engine.

>>> slm = ScriptedSLM(["the", "answer", "is", "4"], unsure_at=[3], alternatives=["5"])
>>> engine = Engine(slm, ScriptedSelector(prefers=slm.tokenizer.id_of("5")))

They implement the protocols of `interfaces`, so an `Engine` decodes with them in microseconds and
all its rules hold. Tokens have ids from 1 on; id 0 ends an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from s2t_shared.decode.interfaces import (
    LLMInfo,
    ModelInput,
    ModelOutput,
    NextTokenInput,
    PromptScore,
    PromptScores,
    Proposal,
    SelectionInput,
    SequenceKV,
    SLMInfo,
)
from s2t_shared.errors import InvalidRequestError, SelectorUnavailableError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.types import Policy, PositionScores, Prompt, ScoreQuery, ScoreReply, Support

END = "<end>"
DIGEST = "scripted"


class ScriptedTokenizer:
    """One id a word. Learns new words as they come; id 0 ends an answer."""

    digest = DIGEST
    template_digest = ""

    def __init__(self) -> None:
        self._words = [END]
        self._ids = {END: 0}

    def id_of(self, word: str) -> int:
        """The id of a word, made up when the word is new."""
        if word not in self._ids:
            self._ids[word] = len(self._words)
            self._words.append(word)
        return self._ids[word]

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids:
            return prompt.token_ids
        text = prompt.text or " ".join(message.content for message in prompt.messages)
        if not text:
            raise InvalidRequestError("the prompt is empty: it has no tokens", field="prompt")
        return tuple(self.id_of(word) for word in text.split())

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f" {self._words[token_id]}" for token_id in token_ids if token_id)


@dataclass
class ScriptedKV:
    """The prompt's length is all that a scripted SLM keeps of a sequence."""

    prompt_length: int

    def truncate(self, length: int) -> None:
        assert length >= self.prompt_length


@dataclass
class ScriptedSLM:
    """An `SLMProposer` that says the same words to every prompt.

    words: the answer. unsure_at: indices where `alternatives` are as likely as the word.
    slots: sequences that can run at once. step_s: seconds that one forward takes; `sleep`
    lets them pass.
    """

    words: Sequence[str]
    unsure_at: Collection[int] = ()
    alternatives: Sequence[str] = ()
    tokenizer: ScriptedTokenizer = field(default_factory=ScriptedTokenizer)
    max_length: int = 4096
    slots: int = 64
    step_s: float = 0.0
    sleep: Callable[[float], None] = time.sleep
    open_sequences: int = 0

    @property
    def info(self) -> SLMInfo:
        return SLMInfo(
            digest=DIGEST,
            eos_ids=frozenset({0}),
            max_length=self.max_length,
            vocab_rows=1 << 16,
            excluded_ids=(),
            kv_tokens=self.max_length * self.slots,
        )

    @property
    def kv_slots_in_use(self) -> int:
        return self.open_sequences

    @property
    def kv_usage(self) -> float:
        return self.open_sequences / self.slots

    def check(
        self, token_ids: Sequence[int], policy: Policy, local_selector: LocalSelector | None
    ) -> None:
        if any(token_id < 0 for token_id in token_ids):
            raise InvalidRequestError("token_ids: an id is negative", field="token_ids")

    def fits(self, policy: Policy, tokens: int) -> bool:
        return tokens <= self.max_length

    def open(
        self,
        local_selector: LocalSelector | None,
        policy: Policy,
        token_ids: Sequence[int],
        max_tokens: int,
    ) -> ScriptedKV | None:
        if self.open_sequences == self.slots:
            return None
        self.open_sequences += 1
        return ScriptedKV(len(token_ids))

    def close(self, kv: SequenceKV) -> None:
        self.open_sequences -= 1

    def read_prompt(self, token_ids: Sequence[int], count: int) -> PromptScores:
        """Every token is the SLM's first choice, with probability 1/2."""
        log_prob = math.log(0.5)
        for token_id in token_ids[1:]:
            yield [PromptScore(log_prob, Support((token_id,), (log_prob,)))]

    def run(self, inputs: Sequence[ModelInput]) -> list[ModelOutput]:
        if inputs and self.step_s:
            self.sleep(self.step_s)
        return [self._output(item) for item in inputs]

    def _output(self, item: ModelInput) -> ModelOutput:
        if isinstance(item, SelectionInput):  # the local selector prefers the last candidate
            return tuple(float(i) for i in range(len(item.candidate_ids)))
        assert isinstance(item, NextTokenInput)
        assert isinstance(item.kv, ScriptedKV)
        index = len(item.token_ids) - item.kv.prompt_length
        word = self.words[index] if index < len(self.words) else END
        options = [word, *(self.alternatives if index in self.unsure_at else ())]
        ids = tuple(self.tokenizer.id_of(option) for option in options)
        log_probs = (-math.log(len(ids)),) * len(ids)
        drawn = ids[0] if item.sampling is not None else None
        support = Support(ids, log_probs)
        return Proposal(top_id=ids[0], drawn_id=drawn, read_support=lambda: support)


@dataclass
class ScriptedSelector:
    """A `SelectorClient` whose LLM prefers one id wherever it is a candidate, else the SLM's first.

    prefers: where no candidates are given (mode llm) its first choice; None ends the answer there.
    available: False fails every query. late: True answers none of them. digest: of the LLM.
    queries: all that were asked.
    """

    prefers: int | None = None
    available: bool = True
    late: bool = False
    digest: str = DIGEST
    queries: list[ScoreQuery] = field(default_factory=list)

    @property
    def info(self) -> LLMInfo:
        return LLMInfo(self.digest, DIGEST, frozenset({0}), 1 << 20)

    @property
    def reachable(self) -> bool:
        """Whether there is an LLM to ask, as `RemoteSelector` says it."""
        return self.available

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        self.queries += queries
        return [self._answer(query) for query in queries]

    def _answer(self, query: ScoreQuery) -> Future[ScoreReply]:
        future: Future[ScoreReply] = Future()
        if not self.available:
            future.set_exception(SelectorUnavailableError("the scripted LLM is away"))
        elif not self.late:
            scores = tuple(self._scores(group) for group in query.candidate_ids)
            future.set_result(ScoreReply(scores, self.digest))
        return future

    def _scores(self, candidate_ids: tuple[int, ...]) -> PositionScores:
        top_id = candidate_ids[0] if candidate_ids else 0
        if self.prefers is not None and (self.prefers in candidate_ids or not candidate_ids):
            top_id = self.prefers
        log_probs = tuple(-0.01 if c == top_id else -10.0 for c in candidate_ids)
        return PositionScores(log_probs, top_id)
