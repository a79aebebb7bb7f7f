"""Gated LoRA: low-rank deltas on a model's linear layers that act only on the tokens the caller
says.

Knows linear layers and PEFT's file format; nothing of contexts, caches or selection. With no
adapter active a `GatedLinear` returns exactly what its base layer returns, bit for bit (law
4); several adapters may act on different tokens of one forward: W x + gate_t * B A x.

Our own few lines rather than PEFT's layers, because the gate is per token and changes at every
decode step. The files are PEFT's: `PeftModel.from_pretrained` loads them (tested).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2t_shared.errors import VersionError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
UNSUPPORTED = (
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
    """LoRA weights by module path: A [rank, in_features], B [out_features, rank]; delta = (alpha /
    rank) * B A x.

    `key` names these very weights for as long as the process lives (what they have read is theirs
    alone). `merged`: W + delta by module path, where they were merged (see `merge`)."""

    rank: int
    alpha: float
    weights: dict[str, tuple[Tensor, Tensor]]
    merged: dict[str, Tensor] = field(default_factory=dict)
    key: int = field(default_factory=lambda: next(_keys))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parameters(self) -> list[Tensor]:
        return [tensor for pair in self.weights.values() for tensor in pair]

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        return Adapter(
            rank=self.rank,
            alpha=self.alpha,
            weights={
                name: (a.to(device, dtype), b.to(device, dtype))
                for name, (a, b) in self.weights.items()
            },
        )


Gate = tuple[
    Adapter, Tensor | slice | None
]  # an adapter and the packed tokens it acts on; None: all of them


class AdapterSwitch:
    """The one place that says which adapters a model's forward uses. One per model, one thread at a
    time."""

    def __init__(self) -> None:
        self.active: Sequence[Gate] = ()

    @contextmanager
    def using(self, gates: Sequence[Gate]) -> Iterator[None]:
        previous, self.active = self.active, gates
        try:
            yield
        finally:
            self.active = previous


class GatedLinear(nn.Module):
    """y = W x (+ b), plus each active adapter's delta on its tokens. x: [1, N, in] where a gate
    names tokens."""

    def __init__(self, base: nn.Linear, path: str, switch: AdapterSwitch) -> None:
        super().__init__()
        self.base, self.path, self.switch = base, path, switch

    def forward(self, x: Tensor) -> Tensor:
        gates = self.switch.active
        if not gates:
            return self.base(x)
        if (
            len(gates) == 1
            and gates[0][1] is None
            and (merged := gates[0][0].merged.get(self.path)) is not None
        ):
            return F.linear(x, merged, self.base.bias)
        y: Tensor = self.base(x)
        for adapter, tokens in gates:
            a, b = adapter.weights[self.path]
            if tokens is None:
                y = y + (x.to(a.dtype) @ a.T @ b.T).to(y.dtype) * adapter.scale
            elif (
                isinstance(tokens, slice) and a.dtype == y.dtype
            ):  # the usual case: one sequence rides
                y[0, tokens].addmm_(x[0, tokens] @ a.T, b.T, alpha=adapter.scale)
            elif isinstance(tokens, slice):
                y[0, tokens] += (x[0, tokens].to(a.dtype) @ a.T @ b.T).to(y.dtype) * adapter.scale
            else:
                delta = (x[0].index_select(0, tokens).to(a.dtype) @ a.T @ b.T).to(
                    y.dtype
                ) * adapter.scale
                y[0].index_add_(0, tokens, delta)
        return y

    @property
    def weight(self) -> Tensor:
        return self.base.weight


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
    """Wrap every adaptable layer of `model` in place; returns the switch that gates them all."""
    switch = AdapterSwitch()
    for path, layer in adaptable_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, GatedLinear(layer, path, switch))
    return switch


@torch.no_grad()
def merge(adapter: Adapter, model: nn.Module) -> None:
    """Keep W + delta beside W, for forwards in which this adapter acts on every token: there two
    small products per layer cost more than they compute. Takes the memory of one more copy of the
    adapted layers."""
    if not adapter.merged:
        for path, layer in adaptable_layers(model).items():
            a, b = adapter.weights[path]
            merged = torch.empty_like(layer.weight)  # in the same memory order
            merged.copy_(layer.weight.float() + adapter.scale * (b.float() @ a.float()))
            adapter.merged[path] = merged


def new_adapter(model: nn.Module, rank: int, alpha: float, seed: int) -> Adapter:
    """A fresh trainable fp32 adapter: A uniform (Kaiming), B zero, so that it starts as the base
    model."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, layer in adaptable_layers(model).items():
        bound = 1.0 / math.sqrt(layer.in_features)
        a = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
        b = torch.zeros(layer.out_features, rank)
        weights[path] = (
            a.to(layer.weight.device).requires_grad_(),
            b.to(layer.weight.device).requires_grad_(),
        )
    return Adapter(rank=rank, alpha=alpha, weights=weights)


def save_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write `adapter` as PEFT's two files."""
    tensors = {}
    for path, (a, b) in adapter.weights.items():
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = (
            a.detach().to("cpu", torch.float32).contiguous()
        )
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = (
            b.detach().to("cpu", torch.float32).contiguous()
        )
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

    Raises: VersionError: a file is missing or unreadable, a shape does not fit, or a value is not
        finite.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise VersionError(
            f"adapter of version {folder.name!r} cannot be read ({error}); publish it again"
        ) from error
    foreign = [name for name in UNSUPPORTED if config.get(name)]
    if foreign or not math.isfinite(alpha) or rank < 1:
        raise VersionError(
            f"adapter of version {folder.name!r}: r={rank}, lora_alpha={alpha}, {foreign}: only "
            "plain LoRA with a finite scale is supported"
        )
    weights = {}
    for path, layer in adaptable_layers(model).items():
        a = tensors.pop(f"{PEFT_PREFIX}{path}.lora_A.weight", None)
        b = tensors.pop(f"{PEFT_PREFIX}{path}.lora_B.weight", None)
        if a is None or b is None:
            raise VersionError(
                f"adapter of version {folder.name!r} has no weights for layer {path}"
            )
        if a.shape != (rank, layer.in_features) or b.shape != (layer.out_features, rank):
            raise VersionError(
                f"adapter of version {folder.name!r}, layer {path}: shapes {tuple(a.shape)} and "
                f"{tuple(b.shape)} do not fit rank {rank} on {tuple(layer.weight.shape)}"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise VersionError(
                f"adapter of version {folder.name!r}, layer {path}: has NaN or infinite values"
            )
        weights[path] = (a, b)
    if tensors:
        raise VersionError(
            f"adapter of version {folder.name!r} has weights this model does not: "
            f"{sorted(tensors)[:3]}"
        )
    return Adapter(rank=rank, alpha=alpha, weights=weights)
