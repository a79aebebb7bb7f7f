"""A batch in micro-batches is the same optimizer step."""

from __future__ import annotations

import pytest
import torch

from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.dataset import context_length
from s2t_shared.training.loss import BatchTotals, training_loss
from s2t_shared.training.settings import MarginFilter, TrainingSettings
from s2t_shared.training.tree_layout import micro_batches
from s2t_shared.types import Reading, SelectorKind
from tests.helpers.rollouts import make_rollouts
from tests.helpers.training import KINDS, trained_a_little


@pytest.mark.parametrize(("kind", "reads"), KINDS)
def test_a_batch_in_micro_batches_is_the_same_step(
    runtime: ModelRuntime, kind: SelectorKind, reads: Reading
) -> None:
    """Accumulation over forwards of bounded size adds up to the whole batch's loss and gradient,
    L_reg included."""
    config = TrainingSettings(
        kind=kind, reads=reads, max_tokens=40, teacher_margin=MarginFilter.WEIGHT
    )
    local, parameters = trained_a_little(runtime, config)
    rollouts = sorted(make_rollouts(6), key=context_length)
    parts = list(micro_batches(rollouts, config.max_tokens, config.scored_tokens_per_label))
    assert len(parts) > 2 and [t for part in parts for t in part] == rollouts
    whole = training_loss(runtime, local, rollouts, config)
    expected = torch.autograd.grad(whole, parameters)
    share = [
        training_loss(runtime, local, part, config, BatchTotals.of(rollouts, config))
        for part in parts
    ]
    total = torch.stack(share).sum()
    assert float(total.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for a, b in zip(torch.autograd.grad(total, parameters), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
