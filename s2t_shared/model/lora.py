"""Gated LoRA: low-rank deltas on a model's linear layers that act only on chosen tokens.

Knows linear layers and PEFT's file format; nothing of contexts, caches or selection. With no
adapter active a `GatedLinear` returns exactly what its base layer returns, bit for bit (law 4).
Several adapters may act on different tokens of one forward: W x + gate_t * B A x.

These are not PEFT's layers, because the gate is per token and changes at every decode step. The
files are PEFT's: `PeftModel.from_pretrained` loads them (tested).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2t_shared.errors import VersionError
from s2t_shared.model.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    unreadable_adapter,
)

UNSUPPORTED_OPTIONS = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "modules_to_save",
)

_keys = itertools.count(1)


@dataclass(kw_only=True, eq=False)
class Adapter:
    """LoRA weights by module path: A [rank, in_features], B [out_features, rank].

    A layer's delta is (alpha / rank) * B A x. merged: W + delta by module path, see `merge`. key:
    identifies these weights in the KV pool, as long as the process lives.
    """

    rank: int
    alpha: float
    weights: dict[str, tuple[Tensor, Tensor]]
    merged: dict[str, Tensor] = field(default_factory=dict)
    key: int = field(default_factory=lambda: next(_keys))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parameters(self) -> list[Tensor]:
        parameters = []
        for a, b in self.weights.values():
            parameters += [a, b]
        return parameters

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """A copy with its own key, without merged weights."""
        weights = {}
        for path, (a, b) in self.weights.items():
            weights[path] = (a.to(device, dtype), b.to(device, dtype))
        return Adapter(rank=self.rank, alpha=self.alpha, weights=weights)


class Gate(NamedTuple):
    """An adapter and the packed tokens it acts on: a slice, int64 indices, or None for all."""

    adapter: Adapter
    tokens: Tensor | slice | None


class AdapterSwitch:
    """Holds the gates of a model's current forward. One per model; one thread at a time."""

    def __init__(self) -> None:
        self.active: Sequence[Gate] = ()

    @contextmanager
    def using(self, gates: Sequence[Gate]) -> Iterator[None]:
        """Activate gates for the forwards inside the `with` block."""
        previous = self.active
        self.active = gates
        try:
            yield
        finally:
            self.active = previous


class GatedLinear(nn.Module):
    """y = W x (+ b), plus each active adapter's delta on its tokens.

    x: [..., in]; [1, N, in] where a gate names tokens.
    """

    def __init__(self, base: nn.Linear, path: str, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        gates = self.switch.active
        if not gates:
            return self.base(x)
        if len(gates) == 1 and gates[0].tokens is None:
            merged = gates[0].adapter.merged.get(self.path)
            if merged is not None:
                return F.linear(x, merged, self.base.bias)
        y: Tensor = self.base(x)
        for gate in gates:
            y = self._with_delta(y, x, gate)
        return y

    def _with_delta(self, y: Tensor, x: Tensor, gate: Gate) -> Tensor:
        """y plus the adapter's delta of x on the gate's tokens; may change y in place."""
        tokens = gate.tokens
        scale = gate.adapter.scale
        a, b = gate.adapter.weights[self.path]
        if tokens is None:
            return y + _low_rank(x, a, b).to(y.dtype) * scale
        if isinstance(tokens, Tensor):
            gated = x[0].index_select(0, tokens)
            delta = _low_rank(gated, a, b).to(y.dtype) * scale
            y[0].index_add_(0, tokens, delta)
            return y
        gated = x[0, tokens]
        if a.dtype == y.dtype:  # the usual case, in one operation
            y[0, tokens].addmm_(gated @ a.T, b.T, alpha=scale)
        else:
            y[0, tokens] += _low_rank(gated, a, b).to(y.dtype) * scale
        return y

    @property
    def weight(self) -> Tensor:
        return self.base.weight


def _low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B A x, in the adapter's dtype."""
    return x.to(a.dtype) @ a.T @ b.T


# -- layers of a model ----------------------------------------------------------------------------


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer except the output head, by module path."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, GatedLinear):
            layers[path] = module.base
        elif isinstance(module, nn.Linear) and module is not head and not path.endswith(".base"):
            layers[path] = module
    return layers


def install(model: nn.Module) -> AdapterSwitch:
    """Wrap every adaptable layer of `model` in place. Returns the switch that gates them all."""
    switch = AdapterSwitch()
    for path, layer in adaptable_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, GatedLinear(layer, path, switch))
    return switch


@torch.no_grad()
def merge(adapter: Adapter, model: nn.Module) -> None:
    """Store W + delta beside W, for forwards in which this adapter acts on every token.

    There, two small products per layer would cost more time than they have to compute. Needs the
    memory of one more copy of the adapted layers.
    """
    if adapter.merged:
        return
    for path, layer in adaptable_layers(model).items():
        a, b = adapter.weights[path]
        delta = adapter.scale * (b.float() @ a.float())
        merged = torch.empty_like(layer.weight)  # in the same memory order
        merged.copy_(layer.weight.float() + delta)
        adapter.merged[path] = merged


def new_adapter(model: nn.Module, rank: int, alpha: float, seed: int) -> Adapter:
    """A fresh trainable fp32 adapter: A uniform (Kaiming), B zero. It starts as the base model."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, layer in adaptable_layers(model).items():
        device = layer.weight.device
        bound = 1.0 / math.sqrt(layer.in_features)
        uniform = torch.rand(rank, layer.in_features, generator=generator)
        a = ((uniform * 2 - 1) * bound).to(device)
        b = torch.zeros(layer.out_features, rank, device=device)
        weights[path] = (a.requires_grad_(), b.requires_grad_())
    return Adapter(rank=rank, alpha=alpha, weights=weights)


# -- PEFT's files ---------------------------------------------------------------------------------


def _names(path: str) -> tuple[str, str]:
    """PEFT's names of a layer's A and B."""
    return f"{PEFT_PREFIX}{path}.lora_A.weight", f"{PEFT_PREFIX}{path}.lora_B.weight"


def save_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write `adapter` as PEFT's two files."""
    tensors = {}
    for path, pair in adapter.weights.items():
        for name, weight in zip(_names(path), pair, strict=True):
            tensors[name] = weight.detach().to("cpu", torch.float32).contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.weights}),
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read PEFT's two files and check them against `model`.

    Raises:
        VersionError: a file is missing or unreadable, a shape does not fit, or a value is not
            finite.
    """
    config, tensors = _read_files(folder)
    try:
        rank = int(config["r"])
        alpha = float(config["lora_alpha"])
    except (KeyError, ValueError, TypeError) as error:
        raise unreadable_adapter(folder, error) from error
    refused = [name for name in UNSUPPORTED_OPTIONS if config.get(name)]
    if refused or not math.isfinite(alpha) or rank < 1:
        raise VersionError(
            f"adapter of version {folder.name!r}: r={rank}, lora_alpha={alpha}, {refused}: only "
            "plain LoRA with a finite scale is supported"
        )
    weights = {}
    for path, layer in adaptable_layers(model).items():
        a_name, b_name = _names(path)
        a = tensors.pop(a_name, None)
        b = tensors.pop(b_name, None)
        if a is None or b is None:
            raise VersionError(
                f"adapter of version {folder.name!r} has no weights for layer {path}"
            )
        _check_weights(a, b, rank, layer, f"adapter of version {folder.name!r}, layer {path}")
        weights[path] = (a, b)
    if tensors:
        raise VersionError(
            f"adapter of version {folder.name!r} has weights this model does not: "
            f"{sorted(tensors)[:3]}"
        )
    return Adapter(rank=rank, alpha=alpha, weights=weights)


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable_adapter(folder, error) from error
    return config, tensors


def _check_weights(a: Tensor, b: Tensor, rank: int, layer: nn.Linear, what: str) -> None:
    """Raises VersionError: A or B does not fit the rank and the layer, or is not finite."""
    a_shape = (rank, layer.in_features)
    b_shape = (layer.out_features, rank)
    if a.shape != a_shape or b.shape != b_shape:
        raise VersionError(
            f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit rank {rank} on "
            f"{tuple(layer.weight.shape)}"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise VersionError(f"{what}: has NaN or infinite values")
