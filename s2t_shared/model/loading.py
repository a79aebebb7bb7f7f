"""Loading a Hugging Face model. Only safetensors are read; no remote code runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from s2t_shared.errors import ModelLoadError
from s2t_shared.model import attention
from s2t_shared.model.device_memory import check_device_memory
from s2t_shared.model.folders import Role, model_digest, resolve_model

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model on its device, its digest and its end-of-sequence ids."""

    model: Any
    digest: str
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class ModelIdentity:
    """What identifies a model whose weights another runtime loads.

    digest: of config and weights. eos_ids: ids that end an answer. vocab_rows: of the output layer.
    """

    folder: Path
    digest: str
    eos_ids: frozenset[int]
    vocab_rows: int


def identify_model(model: str, role: Role = "slm") -> ModelIdentity:
    """Identify a Hugging Face folder, a hub id or "bundled", without its weights in memory.

    Raises:
        ModelLoadError: missing or unreadable.
    """
    folder = resolve_model(model, role)
    try:
        config = AutoConfig.from_pretrained(folder)
        eos_ids = _eos_ids(folder, config)
        vocab_rows = int(config.get_text_config().vocab_size)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"model folder {model!r} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return ModelIdentity(folder, model_digest(folder), eos_ids, vocab_rows)


def load_model(
    model: str,
    dtype: str = "float32",
    role: Role = "slm",
    device: torch.device = CPU,
    kv_bytes: int = 0,
) -> LoadedModel:
    """Load a Hugging Face folder, a hub id or "bundled" onto a device, without a copy elsewhere.

    kv_bytes: what else must fit the device.

    Raises:
        ModelLoadError: missing, unreadable or unsupported model, unknown dtype, or a GPU with too
            little free memory.
    """
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype {dtype!r} is not supported; choose from {sorted(DTYPES)}")
    folder = resolve_model(model, role)
    try:
        config = AutoConfig.from_pretrained(folder)
        check_device_memory(folder, DTYPES[dtype], device, kv_bytes)
        loaded = _load_weights(folder, config, DTYPES[dtype], device)
        eos_ids = _eos_ids(folder, config)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelLoadError(
            f"model folder {model!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return LoadedModel(loaded, model_digest(folder), eos_ids)


def _load_weights(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation=attention.NAME,
        device_map=None if device == CPU else {"": device},
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ValueError(f"weights are missing: {missing[0]}")
    return loaded


def _eos_ids(folder: Path, config: Any) -> frozenset[int]:
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    eos = generation.eos_token_id
    if isinstance(eos, int):
        return frozenset([eos])
    return frozenset(eos or [])
