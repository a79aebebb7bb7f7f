"""How likely the SLM finds the tokens of a prompt, read in chunks beside the decoding of others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2t_shared.decode.interfaces import PromptScore, PromptScores
from s2t_shared.decode.reductions import top_k
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.types import Support

HEAD_TOKENS = 256  # positions whose full-vocabulary logits exist at once


def read_prompt(
    runtime: ModelRuntime,
    excluded: Tensor,
    token_ids: Sequence[int],
    count: int,
    chunk_tokens: int,
) -> PromptScores:
    """Scores of `token_ids[1:]`, a forward of at most `chunk_tokens` tokens for each list.

    excluded: ids without probability, int64 [e]. count: top ids with each score, at least 1. A list
    is empty while there is no room in the KV pool. Closing the iterator gives the room back.
    """
    read = token_ids[:-1]  # nothing follows the last token
    slot = None
    while read and slot is None:
        # No prefix is taken over: every token's own output is wanted.
        slot = runtime.pool.allocate((), len(read))
        if slot is None:
            yield []
    if slot is None:
        return
    try:
        for start in range(0, len(read), chunk_tokens):
            chunk = read[start : start + chunk_tokens]
            followers = token_ids[start + 1 : start + 1 + len(chunk)]
            segment = Segment(slot=slot, token_ids=chunk, start=start)
            yield _scores_of_chunk(runtime, excluded, segment, followers, count)
    finally:
        runtime.pool.release(slot)


@torch.inference_mode()
def _scores_of_chunk(
    runtime: ModelRuntime,
    excluded: Tensor,
    segment: Segment,
    followers: Sequence[int],
    count: int,
) -> list[PromptScore]:
    hidden, [place] = runtime.forward([segment])
    found: list[PromptScore] = []
    for first in range(0, len(followers), HEAD_TOKENS):
        wanted = followers[first : first + HEAD_TOKENS]
        at = place.start + first
        logits = runtime.logits(hidden[at : at + len(wanted)])
        logits[:, excluded] = -torch.inf
        found += _scores(logits, wanted, count)
    return found


def _scores(logits: Tensor, wanted: Sequence[int], count: int) -> list[PromptScore]:
    """[n, V] logits and the id that follows each row -> its score, with one transfer."""
    norm = logits.logsumexp(-1, keepdim=True)
    own = torch.tensor(wanted, device=logits.device)[:, None]
    values, ids = top_k(logits, count)
    parts = [logits.gather(1, own) - norm, values - norm, ids]
    rows = torch.cat([part.double() for part in parts], 1).tolist()
    scores = []
    for log_prob, *top in rows:
        support = Support(tuple(map(int, top[count:])), tuple(top[:count]))
        scores.append(PromptScore(log_prob, support))
    return scores
