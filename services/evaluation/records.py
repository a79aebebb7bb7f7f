"""What an evaluation keeps of each answer, as JSON lines: enough to resume, count and show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2t_shared.model.text_stream import TextStream
from s2t_shared.model.tokenizer import TextTokenizer
from s2t_shared.types import Answer, FinishReason, Step, Usage
from services.evaluation.modes import ModeSpec


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the SLM's candidates at a divergence point.

    slm: its probability by the SLM. llm: by the LLM, both among the candidates; None where not
    known. score: the local selector's, where that chose.
    """

    text: str
    slm: float | None = None
    llm: float | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A divergence point of an answer.

    chosen, slm_first: places among the candidates; -1 where the token is none of them.
    """

    index: int
    signal: float | None
    chosen_by: str
    candidates: tuple[Candidate, ...]
    chosen: int
    slm_first: int
    degraded: str = ""

    @property
    def flipped(self) -> bool:
        return self.chosen != self.slm_first


@dataclass(frozen=True, kw_only=True)
class Record:
    """One answer to one problem in one row.

    error: why there is no answer. truncated: cut off at max_new_tokens, and therefore not right.
    llm_read: tokens of the answer that the LLM had to read.
    """

    row: str
    problem_id: str
    sample: int = 0
    text: str = ""
    correct: bool = False
    truncated: bool = False
    error: str = ""
    usage: Usage = Usage()
    llm_read: int = 0
    token_ids: tuple[int, ...] = ()
    decisions: tuple[Decision, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        return self.row, self.problem_id, self.sample

    def to_row(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        decisions = []
        for decision in self.decisions:
            candidates = [vars(candidate) for candidate in decision.candidates]
            decisions.append(vars(decision) | {"candidates": candidates})
        return vars(self) | {"usage": vars(self.usage), "decisions": decisions}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Record:
        decisions = []
        for decision in row["decisions"]:
            candidates = tuple(Candidate(**candidate) for candidate in decision["candidates"])
            decisions.append(Decision(**{**decision, "candidates": candidates}))
        values = {
            **row,
            "usage": Usage(**row["usage"]),
            "token_ids": tuple(row.get("token_ids", ())),
            "decisions": tuple(decisions),
        }
        values.pop("pieces", None)  # of an earlier program
        return cls(**values)


def record_of(
    spec: ModeSpec,
    problem_id: str,
    sample: int,
    answer: Answer,
    is_right: bool,
    tokenizer: TextTokenizer | None,
) -> Record:
    """The record of an answer. A truncated one is never right, whatever its text says."""
    truncated = answer.finish_reason is FinishReason.LENGTH
    triggered = [step for step in answer.steps if step.triggered]
    return Record(
        row=spec.label,
        problem_id=problem_id,
        sample=sample,
        text=answer.text,
        correct=is_right and not truncated,
        truncated=truncated,
        usage=answer.usage,
        llm_read=_llm_read(spec, answer, triggered),
        token_ids=tuple(answer.token_ids),
        decisions=tuple(_decision(step, tokenizer) for step in triggered),
    )


def _llm_read(spec: ModeSpec, answer: Answer, triggered: Sequence[Step]) -> int:
    """Tokens of the answer that the LLM read: all up to its last selection."""
    tokens = answer.usage.completion_tokens
    if answer.usage.llm_forwards == 0:
        return 0
    if spec.asks_llm_all_along:
        return tokens
    return triggered[-1].index if triggered else 0


def token_pieces(tokenizer: TextTokenizer, token_ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token added; the last one also has what was held back."""
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += stream.finish()
    return tuple(pieces)


def _decision(step: Step, tokenizer: TextTokenizer | None) -> Decision:
    ids = step.candidate_ids
    count = len(ids)
    support = step.support
    slm = _shares(support.log_probs[:count]) if support is not None else [None] * count
    by_llm = step.chosen_by.value == "llm"
    llm = _shares(step.scores) if by_llm else [None] * count
    candidates = []
    for place, token_id in enumerate(ids):
        text = str(token_id) if tokenizer is None else tokenizer.decode([token_id])
        score = step.scores[place] if step.scores and not by_llm else None
        candidates.append(Candidate(text=text, slm=slm[place], llm=llm[place], score=score))
    return Decision(
        index=step.index,
        signal=step.signal,
        chosen_by=step.chosen_by.value,
        candidates=tuple(candidates),
        chosen=ids.index(step.token_id) if step.token_id in ids else -1,
        slm_first=ids.index(step.slm_top_id) if step.slm_top_id in ids else -1,
        degraded=step.degraded,
    )


def _shares(log_probs: Sequence[float]) -> list[float | None]:
    """Probabilities among the candidates, to four digits."""
    if not log_probs:
        return []
    top = max(log_probs)
    weights = [math.exp(value - top) for value in log_probs]
    total = sum(weights)
    return [round(weight / total, 4) for weight in weights]
