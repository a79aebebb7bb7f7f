"""How likely the LLM finds an answer: a measure of quality where no right answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from s2t_shared.decode.interfaces import SelectorClient, SLMInfo
from s2t_shared.errors import S2TError
from s2t_shared.types import ScoreQuery, ScoreReply

WINDOW = 64  # answers that the LLM scores at once
REPLY_S = 60.0  # wait so long for one of them

Ids = tuple[int, ...]


def mean_log_probs(
    llm: SelectorClient, slm: SLMInfo, pairs: Sequence[tuple[Ids, Ids]]
) -> list[float | None]:
    """Of each (prompt, answer) the LLM's mean log-probability per answer token, nats, by one
    prefill.

    The end of an answer is one of its tokens, where the answer ended by itself. The SLM's reserved
    ids have no probability. None for an empty answer and for one that the LLM could not score.
    """
    means: list[float | None] = []
    for start in range(0, len(pairs), WINDOW):
        window = pairs[start : start + WINDOW]
        queries = [_query(slm, prompt, answer) for prompt, answer in window if answer]
        futures = iter(llm.submit(queries))
        for _, answer in window:
            means.append(_mean(next(futures)) if answer else None)
    return means


def _query(slm: SLMInfo, prompt: Ids, answer: Ids) -> ScoreQuery:
    first = len(prompt) - 1
    return ScoreQuery(
        token_ids=(*prompt, *answer[:-1]),
        positions=tuple(range(first, first + len(answer))),
        candidate_ids=tuple((token_id,) for token_id in answer),
        excluded_ids=slm.excluded_ids,
        vocab_size=slm.vocab_rows,
    )


def _mean(future: Future[ScoreReply]) -> float | None:
    try:
        reply = future.result(REPLY_S)
    except (S2TError, TimeoutError):
        return None
    values = [position.log_probs[0] for position in reply.positions]
    return sum(values) / len(values)
