"""The size of a model, from its `config.json` alone: no weights, no GPU, and for known hub ids no
network."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from s2t_shared.errors import ConfigError, ModelLoadError
from s2t_shared.model import attention
from s2t_shared.model.folders import Role, resolve_model
from s2t_shared.model.kv_pool import BatchLayout, KVPool, KVShape
from s2t_shared.model.loading import CPU, DTYPES
from s2t_shared.model.runtime import ModelRuntime

KNOWN_MODEL = re.compile(r"(Qwen/Qwen2\.5-(Coder-)?)?(?P<size>[\d.]+B)(-Instruct)?")
# Qwen2.5's shapes, from the published configurations.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}


def published_config(size: str, dtype: torch.dtype) -> Qwen2Config:
    """The configuration of Qwen2.5 of a size.

    Raises:
        ConfigError: no shape of this name.
    """
    if size not in SHAPES:
        raise ConfigError(f"{size!r} is no size that is known here; choose from {list(SHAPES)}")
    return Qwen2Config(**SHAPES[size], max_position_embeddings=32768, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model's size says about its cost.

    layer_parameters: of all layers. head_parameters: of the output layer. input_parameters: of the
    embedding, 0 where it is the output layer's. kv_bytes_per_token: of keys and values, as the
    runtime stores them. max_length: tokens of a context, at most.
    """

    layers: int
    layer_parameters: int
    head_parameters: int
    input_parameters: int
    kv_bytes_per_token: int
    max_length: int

    @property
    def parameters(self) -> int:
        return self.layer_parameters + self.head_parameters + self.input_parameters

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions of one token through the layers, without attention."""
        return 2.0 * self.layer_parameters

    @property
    def flops_of_head(self) -> float:
        """Of one position's logits."""
        return 2.0 * self.head_parameters

    def weight_bytes(self, bytes_of_layers: float, bytes_of_others: float) -> float:
        """Of all weights. bytes_of_layers: of one number in a layer, where quantisation acts."""
        others = self.head_parameters + self.input_parameters
        return self.layer_parameters * bytes_of_layers + others * bytes_of_others

    def kv_slots(self, kv_bytes: int, tokens: int, device: str, max_num_seqs: int = 1) -> int:
        """How many contexts of up to `tokens` tokens torch's KV pool of so many bytes holds."""
        layout = BatchLayout.for_device(torch.device(device), max_num_seqs)
        one_layer = [KVShape(1, self.kv_bytes_per_token, 0)]
        return KVPool(one_layer, torch.uint8, CPU, kv_bytes, layout).capacity(tokens)


def model_shape(model: str, role: Role = "slm", dtype: str = "bfloat16") -> ModelShape:
    """The shape of a folder, a hub id, "bundled", or a known size as in "1.5B".

    Reads config.json only; of the ids and sizes in `SHAPES` not even that.

    Raises:
        ModelLoadError: no configuration is there, or its architecture is not supported.
        ConfigError: a size that is not known.
    """
    config = _config(model, role, DTYPES[dtype])
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], attn_implementation=attention.NAME
            )
            runtime = ModelRuntime(empty, model, frozenset())
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(
            f"the shape of model {model!r} cannot be told: {str(error).splitlines()[0]}"
        ) from error
    head = int(runtime.head.weight.numel())
    total = sum(parameter.numel() for parameter in empty.parameters())
    embedding = empty.get_input_embeddings().weight
    own_input = 0 if embedding is runtime.head.weight else int(embedding.numel())
    return ModelShape(
        layers=runtime.config.num_hidden_layers,
        layer_parameters=total - head - own_input,
        head_parameters=head,
        input_parameters=own_input,
        kv_bytes_per_token=runtime.pool.bytes_per_token,
        max_length=runtime.max_length,
    )


def _config(model: str, role: Role, dtype: torch.dtype) -> PreTrainedConfig:
    known = KNOWN_MODEL.fullmatch(model)
    if known and known["size"] in SHAPES:
        return published_config(known["size"], dtype)
    folder = resolve_model(model, role, weights=False)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"model folder {model!r} cannot be read: {str(error).splitlines()[0]}"
        ) from error
