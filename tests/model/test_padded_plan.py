"""Padded forwards for training, each row against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2t_shared.model.padded_plan import PaddedPlan
from s2t_shared.model.runtime import ModelRuntime
from tests.helpers.forwards import plain_logits

ARCHITECTURES = ["slm", "qwen2", "gemma2", "mistral"]
CONTEXTS = [[5, 9, 40, 7, 11, 30, 22, 8, 6], [20, 21, 45, 3]]


def padded(rows: list[list[int]]) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


def causal_mask(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def positions_from(starts: list[int], length: int) -> torch.Tensor:
    return torch.tensor(starts)[:, None] + torch.arange(length)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_row_of_a_padded_forward_is_a_plain_one(models: dict[str, Path], name: str) -> None:
    """A window or soft cap that training forgets teaches the adapter another model's hidden
    states."""
    runtime = ModelRuntime.load(str(models[name]))
    tokens = padded(CONTEXTS)
    length = tokens.shape[1]
    plan = PaddedPlan(positions_from([0, 0], length), causal_mask(length))
    with torch.no_grad():
        logits = runtime.logits(runtime.forward_padded(tokens, plan))
    for row, context in zip(logits, CONTEXTS, strict=True):
        assert_near(row[: len(context)], plain_logits(models[name], context))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_after_a_finished_context(models: dict[str, Path], name: str) -> None:
    """Each row sees only its own part of the padded context, at the right distances."""
    runtime = ModelRuntime.load(str(models[name]))
    tokens = padded(CONTEXTS)
    length = tokens.shape[1]
    lengths = [len(context) for context in CONTEXTS]
    context = PaddedPlan(positions_from([0, 0], length), causal_mask(length))
    added = [[33, 12], [14, 44]]
    visible = torch.tensor(lengths)[:, None].expand(-1, 2)
    plan = PaddedPlan(positions_from(lengths, 2), causal_mask(2), context, visible)
    with torch.no_grad():
        runtime.forward_padded(tokens, context)
        logits = runtime.logits(runtime.forward_padded(torch.tensor(added), plan))
    for row, prefix, new in zip(logits, CONTEXTS, added, strict=True):
        assert_near(row, plain_logits(models[name], [*prefix, *new])[-2:])


def test_stored_keys_and_values_stand_for_a_forward(models: dict[str, Path]) -> None:
    """A cached context that is set must be what its forward would have left."""
    runtime = ModelRuntime.load(str(models["slm"]))
    tokens = padded(CONTEXTS[:1])
    length = tokens.shape[1]

    def context_plan() -> PaddedPlan:
        return PaddedPlan(positions_from([0], length), causal_mask(length))

    read = context_plan()
    restored = context_plan()
    hidden = []
    with torch.no_grad():
        runtime.forward_padded(tokens, read)
        restored.set_kv(read.kv)
        for context in (read, restored):
            visible = torch.tensor([[length]])
            plan = PaddedPlan(positions_from([length], 1), causal_mask(1), context, visible)
            hidden.append(runtime.forward_padded(torch.tensor([[33]]), plan))
    assert len(read.kv) == runtime.config.num_hidden_layers
    assert torch.equal(hidden[0], hidden[1])
