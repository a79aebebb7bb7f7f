"""Tiny random models for tests: Hugging Face folders with a word-level tokenizer.

All are written in about a second. Distributions are peaked (large `initializer_range`): argmaxes
are well separated, so a wrong mask or cache shows in the tokens. The product's own loaders load
the folders; nothing here imports the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

RESERVED = 16
SPECIAL = ("<unk>", "<pad>", "<eos>", "<user>", "<assistant>")
WORDS = (*(f"w{i}" for i in range(33)), *"0123456789")  # 43 words + 5 special = 48 ids of text
TEXT_IDS = len(SPECIAL) + len(WORDS)
EOS = SPECIAL.index("<eos>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% "
    "endif %}"
    "<{{ m.role }}> {{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}<assistant>{% "
    "endif %}"
)
MAX_LENGTH = 256


def word_tokenizer(named_reserved: bool = True) -> PreTrainedTokenizerFast:
    """48 ids of text, then, if named, 16 `<|reserved_special_token_i|>`."""
    names = [f"<|reserved_special_token_{i}|>" for i in range(RESERVED)] if named_reserved else []
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *names])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>", *names],
        chat_template=CHAT_TEMPLATE,
    )
    assert len(tokenizer) == len(vocabulary)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One model: its architecture, and the rows of its embedding.

    named_reserved: the tokenizer has names for the reserved ids.
    """

    config: Callable[..., PreTrainedConfig]
    rows: int
    seed: int
    named_reserved: bool = True
    hidden: int = 32
    options: tuple[tuple[str, object], ...] = ()


HEAD_DIM_8 = (("head_dim", 8),)
SLIDING_WINDOW = (("sliding_window", 5),)
# `*llm` differ in width and seed from their SLM and share its tokenizer. Transformers gives every
# `qwen2` folder its own Qwen2Tokenizer, whatever the folder says: use that one with token ids only.
SPECS = {
    "slm": Spec(config=Qwen3Config, rows=64, seed=20, options=HEAD_DIM_8),
    "llm": Spec(config=Qwen3Config, rows=64, seed=2, hidden=48, options=HEAD_DIM_8),
    # More vocabulary rows than the SLM.
    "wide_llm": Spec(config=Qwen3Config, rows=80, seed=3, hidden=48, options=HEAD_DIM_8),
    "qwen2": Spec(config=Qwen2Config, rows=64, seed=20),
    "qwen2_tied": Spec(
        config=Qwen2Config, rows=64, seed=5, options=(("tie_word_embeddings", True),)
    ),
    # Spare rows 48..71, reserved 56..71.
    "padding": Spec(config=LlamaConfig, rows=72, seed=6, named_reserved=False),
    "padding_llm": Spec(config=LlamaConfig, rows=72, seed=7, named_reserved=False, hidden=48),
    # No spare row at all: reserved 48..63 are virtual.
    "virtual": Spec(config=LlamaConfig, rows=48, seed=8, named_reserved=False),
    "virtual_llm": Spec(config=LlamaConfig, rows=48, seed=9, named_reserved=False, hidden=48),
    # Sliding and full layers, soft caps: the eager path.
    "gemma2": Spec(
        config=Gemma2Config,
        rows=64,
        seed=20,
        options=(
            *HEAD_DIM_8,
            *SLIDING_WINDOW,
            ("query_pre_attn_scalar", 8),
            ("attn_logit_softcapping", 20.0),
            ("final_logit_softcapping", 8.0),
        ),
    ),
    # Every layer slides.
    "mistral": Spec(config=MistralConfig, rows=64, seed=11, options=(*HEAD_DIM_8, *SLIDING_WINDOW)),
}


def build_model(folder: Path, spec: Spec) -> Path:
    """Write the model and its tokenizer to `folder`."""
    options: dict[str, object] = {"tie_word_embeddings": False, **dict(spec.options)}
    config = spec.config(
        vocab_size=spec.rows,
        hidden_size=spec.hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.4,
        eos_token_id=EOS,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=None,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    word_tokenizer(spec.named_reserved).save_pretrained(folder)
    return folder


def build_models(root: Path) -> dict[str, Path]:
    """Every model of `SPECS`, by name."""
    return {name: build_model(root / name, spec) for name, spec in SPECS.items()}
