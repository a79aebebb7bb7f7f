"""How vLLM runs a model: the options, as vLLM's engine arguments. Needs no vLLM to be read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError, ModelLoadError


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """How vLLM runs a model. All of it is part of the digest, as it may change its numbers.

    tensor_parallel, pipeline_parallel: GPUs of one layer; of one copy after the other.
    quantization: as vLLM names it, None: as the weights are stored. gpu_memory_utilization: share
    of each GPU's memory for weights and KV cache. max_length: longest context in tokens, None: the
    model's. eager: without compiled kernels and graphs.
    """

    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    quantization: str | None = None
    gpu_memory_utilization: float = 0.9
    max_length: int | None = None
    eager: bool = False

    def digest(self, model_digest: str) -> str:
        """16 hex digits of the weights and these options."""
        text = json.dumps([model_digest, "vllm", asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def arguments(self, folder: Path) -> dict[str, Any]:
        """vLLM's `EngineArgs` for the model in `folder`."""
        return {
            "model": str(folder),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_length + 1 if self.max_length else None,
            "enforce_eager": self.eager,
            "enable_prefix_caching": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "generation_config": "vllm",  # a model's own sampling defaults would change the numbers
            "seed": 0,
        }


def check_installed(setting: str) -> None:
    """Raises ConfigError: vLLM is not installed, but `setting` wants it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "runtime vllm needs vLLM, which is not installed: pip install 's2t[vllm]', or set "
            f"{setting} to torch"
        )


def cannot_run(model: str, options: VLLMOptions, error: Exception) -> ModelLoadError:
    """The error for what vLLM raised when it was to load a model: that may be anything."""
    return ModelLoadError(f"vLLM cannot run {model!r} with {options}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """Type and first line of a foreign error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
