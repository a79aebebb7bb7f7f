"""What the engine asks of the two models: an `SLMProposer` and a `SelectorClient` (the LLM).

The engine knows nothing else of them. `Proposer` and `LLMSelector` implement the two with torch,
`scripted` with a script; another runtime needs these few methods.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from s2t_shared.types import Policy, Sampling, ScoreQuery, ScoreReply, Support, Trigger

if TYPE_CHECKING:
    from s2t_shared.model.local_selector import LocalSelector

# -- the SLM --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SLMInfo:
    """What an engine must know about the SLM.

    eos_ids: ids that end an answer. max_length: of prompt and answer together, in tokens.
    vocab_rows: rows of the output layer. excluded_ids: reserved ids, never generated.
    kv_tokens: tokens that the KV pool can hold.
    """

    digest: str
    eos_ids: frozenset[int]
    max_length: int
    vocab_rows: int
    excluded_ids: tuple[int, ...]
    kv_tokens: int


class SequenceKV(Protocol):
    """A sequence's place in the SLM's KV cache."""

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens of the sequence."""


@dataclass(frozen=True)
class SamplingInput:
    """A request to sample. Seed and step make the drawn id independent of the batch."""

    sampling: Sampling
    step: int


def never_pauses(proposal: Proposal) -> bool:
    """Of a sequence that takes every proposal."""
    return False


@dataclass(frozen=True)
class NextTokenInput:
    """Read what is new in `token_ids` and propose what follows.

    wants_support: the top ids with their log-probabilities, not only the first choice. signal: the
    trigger whose signal is wanted with them, where it needs no LLM. pauses: whether a proposal will
    be put to a selector: a runtime that goes on by itself stops there.
    """

    kv: SequenceKV
    token_ids: Sequence[int]
    sampling: SamplingInput | None = None
    wants_support: bool = True
    signal: Trigger | None = None
    pauses: Callable[[Proposal], bool] = never_pauses


@dataclass(frozen=True)
class SelectionInput:
    """Let the local selector score candidates after `token_ids`, which the cache has read."""

    kv: SequenceKV
    token_ids: Sequence[int]
    candidate_ids: Sequence[int]
    base_log_probs: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The SLM's first choice; its support and a drawn id where they were wanted.

    signal: of the trigger that was asked for; None: the proposer leaves it to the reader of the
    support. read_support: makes the support, of which few steps need more than the signal.
    """

    top_id: int
    drawn_id: int | None = None
    signal: float | None = None
    read_support: Callable[[], Support] | None = None

    @property
    def support(self) -> Support | None:
        return self.read_support() if self.read_support is not None else None


@dataclass(frozen=True)
class PromptScore:
    """How likely the SLM finds a token of a prompt, in nats; and its own top ids there."""

    log_prob: float
    support: Support


PromptScores = Generator[list[PromptScore], None, None]  # a list for each forward
ModelInput = NextTokenInput | SelectionInput
LocalScores = tuple[float, ...]
ModelOutput = Proposal | LocalScores | None  # None: not all tokens are read yet, ask again


class SLMProposer(Protocol):
    """The SLM of an engine."""

    @property
    def info(self) -> SLMInfo: ...

    @property
    def kv_slots_in_use(self) -> int: ...

    @property
    def kv_usage(self) -> float | None:
        """Share of the KV memory that live sequences hold, 0..1; None: the runtime does not say.
        May be read from any thread."""

    def check(
        self, token_ids: Sequence[int], policy: Policy, local_selector: LocalSelector | None
    ) -> None:
        """Raises InvalidRequestError: an id is outside the vocabulary, or this runtime cannot serve
        the policy with this local selector."""

    def fits(self, policy: Policy, tokens: int) -> bool:
        """Whether a sequence of so many tokens can ever be served."""

    def open(
        self,
        local_selector: LocalSelector | None,
        policy: Policy,
        token_ids: Sequence[int],
        max_tokens: int,
    ) -> SequenceKV | None:
        """A place for a new sequence, or None while there is no room."""

    def close(self, kv: SequenceKV) -> None:
        """Give a place back."""

    def run(self, inputs: Sequence[ModelInput]) -> list[ModelOutput]:
        """One forward for all inputs; one output for each."""

    def read_prompt(self, token_ids: Sequence[int], count: int) -> PromptScores:
        """Read a prompt, one forward for each list: the scores of its tokens but the first, in
        order, with the top `count` ids each. A list is empty while there is no room in the KV pool.

        Raises:
            InvalidRequestError: this runtime does not say.
        """


# -- the LLM --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LLMInfo:
    """What an engine must know about the LLM. An empty digest means that none was reached yet."""

    digest: str
    tokenizer_digest: str
    eos_ids: frozenset[int]
    max_length: int


class SelectorClient(Protocol):
    """Where LLM selections come from: this process, a cache, or the network.

    A failed future holds `SelectorUnavailableError` or `InvalidRequestError`. A client that knows
    that nobody would answer fails at once: an engine that waited at every token would stall.
    """

    @property
    def info(self) -> LLMInfo: ...

    def submit(self, queries: Sequence[ScoreQuery]) -> list[Future[ScoreReply]]:
        """Send queries as one batch. Returns at once, with a future for each."""
