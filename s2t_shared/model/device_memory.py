"""Whether a model's weights and KV cache fit a device, asked before the weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from s2t_shared.errors import ModelLoadError

GIB = 1 << 30
# Activations of a prefill chunk, logits of a batch, and what CUDA and its libraries take.
WORKING_BYTES = 2 * GIB
BYTES_OF_LENGTH = 8  # a safetensors file begins with the length of its header


def check_device_memory(
    folder: Path, dtype: torch.dtype, device: torch.device, kv_bytes: int
) -> None:
    """Check that a GPU has room for a model. Other devices are not checked.

    folder: of the model. dtype: of the loaded weights. kv_bytes: of the KV pool.

    Raises:
        ModelLoadError: too little memory is free, with the numbers and what to change.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    check_fits(folder.name, weight_bytes(folder, dtype), kv_bytes, free)


def check_fits(model: str, weights: int, kv_bytes: int, free: int) -> None:
    """Check that weights, KV cache and working memory are at most `free` bytes.

    Raises:
        ModelLoadError: they are more.
    """
    needed = weights + kv_bytes + WORKING_BYTES
    if needed <= free:
        return
    left = free - weights - WORKING_BYTES
    if left > 0:
        mend = f"lower kv_gib to {left / GIB:.1f} or less, or"
    else:
        mend = "its weights alone are too large:"
    raise ModelLoadError(
        f"model {model!r} needs {needed / GIB:.1f} GiB on the device ({weights / GIB:.1f} of "
        f"weights, {kv_bytes / GIB:.1f} of KV cache by kv_gib, {WORKING_BYTES / GIB:.0f} of "
        f"working memory), but {free / GIB:.1f} GiB are free; {mend} choose a larger GPU, a "
        "smaller model or dtype bfloat16"
    )


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a folder's weights, loaded in a dtype."""
    return sum(parameters * dtype.itemsize for parameters in _tensor_sizes(folder))


def _tensor_sizes(folder: Path) -> Iterator[int]:
    """Numbers in each tensor, from the headers of the folder's safetensors files."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(BYTES_OF_LENGTH), "little")
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield torch.Size(tensor["shape"]).numel()
