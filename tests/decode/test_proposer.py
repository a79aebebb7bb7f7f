"""The SLM's reductions: the most likely ids of a row of logits."""

from __future__ import annotations

import pytest
import torch

from s2t_shared.decode.reductions import top_k


@pytest.mark.parametrize("vocabulary", [80, 20000, 49152 + 5])
@pytest.mark.parametrize("excluded", ["none", "some", "nearly all", "clustered"])
def test_top_k_is_torch_topk(vocabulary: int, excluded: str) -> None:
    """The support is what everything is selected from: a lost id is a token that can never be
    chosen."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=generator) * 4
    if excluded == "some":
        shuffled = torch.randperm(vocabulary, generator=generator)
        logits[:, shuffled[: vocabulary // 9]] = -torch.inf
    elif excluded == "nearly all":
        shuffled = torch.randperm(vocabulary, generator=generator)
        logits[:, shuffled[: vocabulary - 64]] = -torch.inf
    elif excluded == "clustered":
        # All of the best lie in one block, at its end and in the last, ragged one.
        logits[:, -40:] += 100
        logits[:, 3 : 3 + 30] += 90
    values, ids = top_k(logits, 64)
    expected = logits.topk(64)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)
    assert torch.isfinite(values).all()


def test_top_k_of_a_tiny_vocabulary() -> None:
    """A model with fewer ids than the support is wide: all of them, best first."""
    logits = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    values, ids = top_k(logits, 48)
    assert torch.equal(values, logits.sort(descending=True).values)
    assert ids.sort().values.tolist() == [[*range(48)]] * 3
