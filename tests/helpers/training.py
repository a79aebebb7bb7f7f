"""Local selectors to train, for the tests of training."""

from __future__ import annotations

import torch

from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.new_local_selector import new_local_selector, trained_tensors
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.types import Reading, SelectorKind

KINDS = [(kind, reads) for kind in SelectorKind for reads in Reading]


def reserved_rows(runtime: ModelRuntime) -> tuple[int, ...]:
    return tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))


def trained_a_little(
    runtime: ModelRuntime, config: TrainingSettings
) -> tuple[LocalSelector, list[torch.Tensor]]:
    """A selector whose every parameter matters (B is zero in a fresh one)."""
    torch.manual_seed(3)
    local = new_local_selector(runtime, reserved_rows(runtime), config)
    parameters = trained_tensors(local)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return local, parameters
