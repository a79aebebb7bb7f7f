"""Losses that the published S2T code offers and that gained nothing here.

Kept so that its experiments can be repeated.
"""

from __future__ import annotations

from torch import Tensor


def pairwise_hinge(logits: Tensor, teacher: Tensor, valid: Tensor, margin: float) -> Tensor:
    """Mean over the pairs where the LLM strictly prefers i to j of max(0, margin - (s_i - s_j)).

    logits, teacher: [m, K]; teacher: the LLM's log-probabilities. valid: bool [m, K], False on
    padding. Returns [m].
    """
    preferred = teacher[:, :, None] > teacher[:, None, :]
    pairs = preferred & valid[:, :, None] & valid[:, None, :]
    gaps = (margin - logits[:, :, None] + logits[:, None, :]).clamp(min=0) * pairs
    return gaps.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
