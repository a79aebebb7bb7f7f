"""Finding and loading a Hugging Face model. Only safetensors are read; no remote code runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from s2t_shared.bundled import BUNDLED, LLM_DIR, SLM_DIR
from s2t_shared.errors import ModelLoadError
from s2t_shared.model import attention
from s2t_shared.model.device_memory import check_device_memory

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Role = Literal["slm", "llm"]
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # and what is small beside them
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]
DIGEST_WHOLE_FILE_BYTES = 64 << 20
DIGEST_END_BYTES = 8 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model on its device, its digest and its end-of-sequence ids."""

    model: Any
    digest: str
    eos_ids: frozenset[int]


def resolve_model(model: str, role: Role = "slm", weights: bool = True) -> Path:
    """The local folder of a model.

    model: a folder, a hub id, or "bundled" (the bundled pair's model of this role). weights: of a
    hub id, download them too; without them the folder does for a tokenizer.

    Raises:
        ModelLoadError: neither a folder with a config.json nor an id the hub answers for.
    """
    if model == BUNDLED:
        return SLM_DIR if role == "slm" else LLM_DIR
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelLoadError(
                f"model folder {model!r} has no config.json; give a Hugging Face model folder"
            )
        return folder
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model:
        raise ModelLoadError(f"model folder {model!r} does not exist; check the path")
    return _download(model, HUB_FILES if weights else TOKENIZER_FILES)


def _download(model: str, files: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=files))
    except Exception as error:  # the border to the hub client, whose error types vary by transport
        raise ModelLoadError(
            f"model {model!r} is neither a folder here nor could it be downloaded from the hub "
            f"({type(error).__name__}); check the name, or download it and give the folder"
        ) from error


def model_digest(folder: Path) -> str:
    """16 hex digits that identify a model's config and weights.

    Small files count whole; large ones by size, first and last bytes.
    """
    digest = hashlib.sha256()
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= DIGEST_WHOLE_FILE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(DIGEST_END_BYTES))
                stream.seek(-DIGEST_END_BYTES, 2)
                digest.update(stream.read())
    return digest.hexdigest()[:16]


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
