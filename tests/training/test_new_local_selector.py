"""What training starts from."""

from __future__ import annotations

import pytest
import torch

from s2t_shared.errors import ConfigError
from s2t_shared.model.local_selector import Candidates, combine
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.new_local_selector import new_local_selector, trained_tensors
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.training.trainer import distil
from s2t_shared.training.tree_forward import lm_kl
from s2t_shared.types import Reading, SelectorKind
from tests.helpers.rollouts import make_rollouts
from tests.helpers.training import reserved_rows, trained_a_little


def test_fresh_selector_changes_nothing(runtime: ModelRuntime) -> None:
    """LoRA starts as the base model: the prefix score is the SLM's own order and the LM-KL is
    zero."""
    local = new_local_selector(
        runtime, (), TrainingSettings(kind=SelectorKind.PREFIX, reads=Reading.ADAPTED)
    )
    rollouts = make_rollouts(2)
    assert float(lm_kl(runtime, local, rollouts, None, False)) == pytest.approx(0.0, abs=1e-5)


def test_equal_scores_stay_equal_when_standardised(runtime: ModelRuntime) -> None:
    """The norm of zero spread is neither NaN nor an amplifier, and its gradient is finite."""
    local = new_local_selector(
        runtime,
        reserved_rows(runtime),
        TrainingSettings(kind=SelectorKind.RESERVED, standardise=True),
    )
    siblings = torch.ones(2, 3, 32, requires_grad=True)
    candidates = Candidates.pad([(1, 2, 3), (4, 5)], [(0.0,) * 3, (0.0,) * 2])
    scores = combine(runtime, local, None, siblings, candidates)
    assert scores[0].abs().max() < 1e-2 and scores[1, :2].abs().max() < 1e-2
    scores[candidates.valid].sum().backward()
    assert siblings.grad is not None and torch.isfinite(siblings.grad).all()


def test_training_starts_from_a_given_selector(runtime: ModelRuntime) -> None:
    """Its weights are copied, not shared; one of another shape is refused."""
    rollouts = make_rollouts(60, runtime.digest)
    config = TrainingSettings(kind=SelectorKind.JOINT, steps=3, learning_rate=1e-9)
    before, _ = trained_a_little(runtime, config)
    kept = [t.detach().clone() for t in trained_tensors(before)]
    after = distil(runtime, reserved_rows(runtime), rollouts, config, init=before).local_selector
    for a, b, c in zip(trained_tensors(after), trained_tensors(before), kept, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and torch.equal(b, c) and a is not b
    with pytest.raises(ConfigError, match="init_from"):
        distil(
            runtime,
            reserved_rows(runtime),
            rollouts,
            config.model_copy(update={"rank": 4}),
            init=before,
        )
    with pytest.raises(ConfigError, match="init_from"):
        distil(
            runtime,
            reserved_rows(runtime),
            rollouts,
            config.model_copy(update={"kind": SelectorKind.RESERVED}),
            init=before,
        )
