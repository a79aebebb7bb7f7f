"""A local selector to be trained: fresh weights, or those of a version it starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from s2t_shared.errors import ConfigError
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.settings import Objective, TrainingSettings
from s2t_shared.types import SelectorKind


def new_local_selector(
    runtime: ModelRuntime,
    reserved_ids: tuple[int, ...],
    settings: TrainingSettings,
    init: LocalSelector | None = None,
) -> LocalSelector:
    """An untrained local selector, or a trainable copy of `init`.

    Its LoRA changes nothing yet. Its reserved rows get random deltas: spare rows of real models
    are nearly equal, so that every candidate would score 0.5 and the gradient keep them equal.

    Raises:
        ConfigError: `init` is of another kind, reading or shape.
    """
    adapter = new_adapter(runtime.model, settings.rank, settings.alpha, settings.seed)
    deltas = None
    if settings.kind is not SelectorKind.PREFIX:
        deltas = _random_deltas(runtime, len(reserved_ids), settings)
    if init is not None:
        _check_shape(init, adapter, settings)
        assert init.adapter is not None
        weights = {path: (_copy(a), _copy(b)) for path, (a, b) in init.adapter.weights.items()}
        adapter = Adapter(rank=settings.rank, alpha=settings.alpha, weights=weights)
        deltas = _copy(init.bin_deltas) if init.bin_deltas is not None else None
    return LocalSelector(
        version="",
        kind=settings.kind,
        reads=settings.reads,
        reserved_ids=reserved_ids,
        adapter=adapter,
        bin_deltas=deltas,
        temperature=settings.temperature,
        scoring=settings.scoring,
        standardise=settings.standardise,
        always_on=settings.objective is Objective.PLAIN,
    )


def trained_tensors(local: LocalSelector) -> list[Tensor]:
    """What training changes: the adapter's matrices, and the reserved rows' deltas if any."""
    assert local.adapter is not None
    tensors = [*local.adapter.parameters()]
    if local.bin_deltas is not None:
        tensors.append(local.bin_deltas)
    return tensors


def _random_deltas(runtime: ModelRuntime, count: int, settings: TrainingSettings) -> Tensor:
    """[count, hidden]"""
    head = runtime.head.weight
    scale = float(head.float().std()) * settings.reserved_init_scale
    generator = torch.Generator().manual_seed(settings.seed + 1)
    deltas = torch.randn((count, head.shape[1]), generator=generator) * scale
    return deltas.to(runtime.device).requires_grad_()


def _check_shape(init: LocalSelector, fresh: Adapter, settings: TrainingSettings) -> None:
    adapter = init.adapter
    if adapter is not None:
        shape = (init.kind, init.reads, adapter.rank, adapter.alpha)
        wanted = (settings.kind, settings.reads, settings.rank, settings.alpha)
        if shape == wanted and adapter.weights.keys() == fresh.weights.keys():
            return
    raise ConfigError(
        f"training.init_from={init.version!r}: it was trained with other settings (kind, reads, "
        "rank, alpha); train with its settings, or from the beginning"
    )


def _copy(tensor: Tensor) -> Tensor:
    """A trainable copy in float32."""
    return tensor.detach().clone().float().requires_grad_()
