"""How many operations a decode step starts: on a GPU each is a launch, and launches are what a
small model's step costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from s2t_shared.model.kv_pool import BatchLayout
from s2t_shared.model.runtime import ModelRuntime, Segment

CUDA = torch.device("cuda")


class CountedOperations(TorchDispatchMode):
    """Counts the aten operations that compute something; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not is_view
        return func(*args, **(kwargs or {}))


def operations(layers: int, batch: int, keep: Callable[[int], bool]) -> int:
    """Of one decode step of those of `batch` sequences that `keep` names, of all lengths."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="s2t",
    )
    layout = BatchLayout.for_device(CUDA, batch)
    runtime = ModelRuntime(Qwen2ForCausalLM(config), "", frozenset(), 1 << 28, layout)
    runtime.switch  # noqa: B018 - wraps the layers, as a service does
    segments = []
    for i in range(batch):
        slot = runtime.pool.allocate([1], 120)
        assert slot is not None
        slot.token_ids += [1] * (20 + i % 90)
        if keep(i):
            segments.append(Segment(slot=slot, token_ids=[3], start=len(slot.token_ids)))
    with CountedOperations() as counted:
        runtime.forward(segments)
    return counted.count


@pytest.mark.parametrize(
    "batch, free, most", [(1, 0, 40), (64, 0, 40), (64, 5, 45), (256, 0, 40), (256, 7, 45)]
)
def test_a_steps_launches_do_not_grow_with_the_batch(batch: int, free: int, most: int) -> None:
    """One attention call and two writes per layer, whatever the lengths. free: every so many
    slots one whose sequence is not in the step."""

    def in_step(i: int) -> bool:
        return not free or i % free != 1

    two = operations(2, batch, in_step)
    four = operations(4, batch, in_step)
    assert (four - two) / 2 <= most
    assert two - (four - two) <= 60  # what a step needs once
