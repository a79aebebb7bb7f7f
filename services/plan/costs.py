"""What one forward of a model takes, as a formula with few numbers, measured or assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2t_shared.model.shape import ModelShape
from services.plan.devices import BANDWIDTH_SHARE, FLOPS_SHARE, Device

# Host time of torch and vLLM, in seconds. The GPU's were read off `s2t bench gpu` on one H100
# (services/bench/README.md): 28 ms for 28 layers unrecorded, 5.4 ms recorded at batch 1, 14 ms at
# batch 64. vLLM's are an assumption.
TORCH_GPU_LAYER_S = 1.0e-3  # launches of one layer of a step that is not recorded
TORCH_GPU_RECORDED_S = 4.0e-3  # a whole step that is replayed as a CUDA graph
TORCH_GPU_SEQUENCE_S = 0.14e-3
TORCH_GPU_WATCHED_STEP_S = 2.5e-3  # from `s2t_local` beside greedy, at batch 1 and 64
TORCH_GPU_WATCHED_S = 0.12e-3
TORCH_CPU_LAYER_S = 0.3e-3
TORCH_CPU_SEQUENCE_S = 0.1e-3
TORCH_CPU_WATCHED_S = 0.1e-3
VLLM_STEP_S = 3.0e-3
VLLM_SEQUENCE_S = 0.03e-3
VLLM_WATCHED_S = 0.05e-3  # log-probabilities of the first 64 ids


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a role does at once, on average.

    sequences: in the forward. tokens: of all of them that it reads. context: mean tokens that each
    sequence attends to. mixed: probability that the forward is more than one token of each sequence
    with the base model. watched: of the sequences, those whose trigger is watched. requests: that
    begin meanwhile. forwards: into which it is cut.
    """

    sequences: float
    tokens: float
    context: float = 0.0
    mixed: float = 0.0
    watched: float = 0.0
    requests: float = 0.0
    forwards: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """Seconds of a Step:

        forwards * per_step + mixed * per_mixed_step + sequences * per_sequence
            + any watched * per_watched_step + watched * per_watched
            + max(forwards * weights, tokens * per_token)
            + sequences * context * per_context_token + requests * per_request

    per_step, per_sequence: the host's work, launches included [s]. per_mixed_step: what a forward
    costs more that scores candidates or, on a GPU, reads a prompt [s]. per_watched_step,
    per_watched: the first candidates and the signal of sequences that may trigger [s]. weights:
    reading all weights once [s]. per_token: arithmetic of one token [s]. per_context_token: reading
    one token's keys and values [s]. per_request: the host's work for a request, once [s].

    `weights` against `tokens * per_token` is the roofline: a forward of few tokens is bound by
    memory, one of many by arithmetic. A measured cost has `weights` and attention within the other
    numbers.
    """

    per_step: float
    per_sequence: float
    per_token: float
    weights: float = 0.0
    per_context_token: float = 0.0
    per_mixed_step: float = 0.0
    per_watched_step: float = 0.0
    per_watched: float = 0.0
    per_request: float = 0.0

    def seconds(self, step: Step) -> float:
        """Of one Step."""
        host = step.forwards * self.per_step + step.mixed * self.per_mixed_step
        host += step.sequences * self.per_sequence + step.requests * self.per_request
        host += min(1.0, step.watched) * self.per_watched_step + step.watched * self.per_watched
        device = max(step.forwards * self.weights, step.tokens * self.per_token)
        return host + device + step.sequences * step.context * self.per_context_token


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
    per_watched_step = TORCH_GPU_WATCHED_STEP_S if device.is_gpu else 0.0
    per_watched = TORCH_GPU_WATCHED_S if device.is_gpu else TORCH_CPU_WATCHED_S
    if runtime == "vllm":
        per_step, per_sequence = VLLM_STEP_S, VLLM_SEQUENCE_S
        per_watched_step, per_watched = 0.0, VLLM_WATCHED_S
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
        per_watched_step=per_watched_step,
        per_watched=per_watched,
    )


@dataclass(frozen=True)
class Point:
    """A Step and the seconds that were measured for it."""

    step: Step
    seconds: float


COLUMNS = {  # number of the formula -> what of a Step it is multiplied with
    "per_step": lambda step: 1.0,
    "per_sequence": lambda step: step.sequences,
    "per_token": lambda step: step.tokens,
    "per_request": lambda step: step.requests,
    "per_mixed_step": lambda step: step.mixed,
    "per_watched_step": lambda step: min(1.0, step.watched),
    "per_watched": lambda step: step.watched,
}


def fitted_cost(points: Sequence[Point]) -> ForwardCost:
    """The non-negative numbers that fit measured steps best, by relative error.

    Fewer points than numbers give the numbers that explain most.
    """
    seconds = np.array([p.seconds for p in points])
    matrix = np.array([[column(p.step) for column in COLUMNS.values()] for p in points])
    found = _non_negative(matrix / seconds[:, None], np.ones(len(points)))
    return ForwardCost(**dict(zip(COLUMNS, map(float, found), strict=True)))


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative numbers: the best of all choices of columns that have none.
    Seven columns are 127 choices."""
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
