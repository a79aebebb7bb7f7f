"""What one forward of a model takes, as a formula with few numbers, measured or assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from s2t_shared.model.shape import ModelShape
from services.plan.devices import BANDWIDTH_SHARE, FLOPS_SHARE, Device

# Host time of torch and vLLM, in seconds. The GPU's were read off `s2t bench gpu` on one H100
# (services/bench/README.md): 28 ms for 28 layers unrecorded, 5.4 ms recorded at batch 1, 14 ms at
# batch 64. vLLM's are an assumption.
TORCH_GPU_LAYER_S = 1.0e-3  # launches of one layer of a step that is not recorded
TORCH_GPU_RECORDED_S = 4.0e-3  # a whole step that is replayed as a CUDA graph
TORCH_GPU_SEQUENCE_S = 0.14e-3
TORCH_CPU_LAYER_S = 0.3e-3
TORCH_CPU_SEQUENCE_S = 0.1e-3
VLLM_STEP_S = 3.0e-3
VLLM_SEQUENCE_S = 0.03e-3


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """Seconds of one forward over the packed tokens of several sequences:

        per_step + mixed * per_mixed_step + per_sequence * S
            + max(weights, per_token * T) + per_context_token * S * C

    S: sequences. T: tokens of all of them that are read in this forward. C: mean tokens of context
    that each attends to. mixed: probability that the forward is more than one token of each
    sequence with the base model.

    per_step, per_sequence: the host's work, launches included [s]. per_mixed_step: what a forward
    costs more that reads a prompt or scores candidates [s]. weights: reading all weights once [s].
    per_token: arithmetic of one token [s]. per_context_token: reading one token's keys and values
    [s]. per_request: the host's work for a request, once, in no forward [s].

    `weights` against `per_token * T` is the roofline: a forward of few tokens is bound by memory,
    one of many by arithmetic. A measured cost has `weights` and attention within the other numbers.
    """

    per_step: float
    per_sequence: float
    per_token: float
    weights: float = 0.0
    per_context_token: float = 0.0
    per_mixed_step: float = 0.0
    per_request: float = 0.0

    def seconds(
        self,
        sequences: float,
        tokens: float,
        context: float = 0.0,
        mixed: float = 0.0,
        forwards: float = 1.0,
    ) -> float:
        """Of so many forwards over these sequences and tokens in all."""
        host = forwards * self.per_step + mixed * self.per_mixed_step
        host += self.per_sequence * sequences
        device = max(forwards * self.weights, self.per_token * tokens)
        return host + device + self.per_context_token * sequences * context


def assumed_cost(
    shape: ModelShape,
    device: Device,
    *,
    runtime: str = "torch",
    bytes_per_weight: float = 2.0,
    devices: float = 1.0,
    recorded: bool = False,
) -> ForwardCost:
    """The cost of a model by its shape and its device's specification.

    weights   = bytes of layers and head / (bandwidth * BANDWIDTH_SHARE * devices)
    per_token = 2 * parameters of the layers / (flops * FLOPS_SHARE * devices)
    per_context_token = KV bytes of a token / (bandwidth * BANDWIDTH_SHARE * devices)
    per_sequence contains one position's logits: 2 * parameters of the head / (the same rate).

    bytes_per_weight: of the layers; below 2 on vLLM, where they are quantised. devices: that share
    the model, or CPU threads. recorded: single-token steps are CUDA graphs.
    """
    bandwidth = device.bandwidth * BANDWIDTH_SHARE * devices
    flops = device.flops * FLOPS_SHARE * devices
    stored = bytes_per_weight if runtime == "torch" else 2.0
    read = shape.layer_parameters * bytes_per_weight + shape.head_parameters * stored
    launches = shape.layers * (TORCH_GPU_LAYER_S if device.is_gpu else TORCH_CPU_LAYER_S)
    per_step, per_mixed_step = launches, 0.0
    per_sequence = TORCH_GPU_SEQUENCE_S if device.is_gpu else TORCH_CPU_SEQUENCE_S
    if runtime == "vllm":
        per_step, per_sequence = VLLM_STEP_S, VLLM_SEQUENCE_S
    elif recorded and device.is_gpu:
        per_step = min(launches, TORCH_GPU_RECORDED_S)
        per_mixed_step = launches - per_step
    return ForwardCost(
        per_step=per_step,
        per_sequence=per_sequence + shape.flops_of_head / flops,
        per_token=shape.flops_per_token / flops,
        weights=read / bandwidth,
        per_context_token=shape.kv_bytes_per_token / bandwidth,
        per_mixed_step=per_mixed_step,
    )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured mean step of one role.

    seconds: of one step of `sequences` sequences that reads `tokens` tokens in all. requests: that
    begin per step. mixed: share of the steps that read a prompt or scored candidates.
    """

    seconds: float
    sequences: float
    tokens: float
    requests: float
    mixed: float = 0.0


COLUMNS = {  # number of the formula -> what it is multiplied with
    "per_step": lambda p: 1.0,
    "per_sequence": lambda p: p.sequences,
    "per_token": lambda p: p.tokens,
    "per_request": lambda p: p.requests,
    "per_mixed_step": lambda p: p.mixed,
}


def fitted_cost(points: Sequence[Point]) -> ForwardCost:
    """The non-negative numbers that fit measured steps best, by relative error.

    Fewer points than numbers give the numbers that explain most.
    """
    seconds = np.array([p.seconds for p in points])
    matrix = np.array([[column(p) for column in COLUMNS.values()] for p in points])
    found = _non_negative(matrix / seconds[:, None], np.ones(len(points)))
    return ForwardCost(**dict(zip(COLUMNS, map(float, found), strict=True)))


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative numbers: the best of all choices of columns that have none.
    Five columns are 31 choices."""
    width = matrix.shape[1]
    best, least = np.zeros(width), float(wanted @ wanted)
    for choice in range(1, 1 << width):
        columns = [i for i in range(width) if choice >> i & 1]
        found = np.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
        error = float(((matrix[:, columns] @ found - wanted) ** 2).sum())
        if (found >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(width), error
            best[columns] = found
    return best


FIELDS = tuple(field.name for field in fields(ForwardCost))
