"""Forwards of tiny models: one segment at a time, and what plain transformers computes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from s2t_shared.model.kv_pool import BatchLayout, KVPool, Slot
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime, Segment


def random_adapter(runtime: ModelRuntime, seed: int = 0, rank: int = 3) -> Adapter:
    """An adapter that changes the model's output: B is not zero."""
    fresh = new_adapter(runtime.model, rank, 2.0 * rank, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {}
    for path, (a, b) in fresh.weights.items():
        weights[path] = (a.detach(), torch.randn(b.shape, generator=generator) * 0.15)
    return Adapter(rank=rank, alpha=fresh.alpha, weights=weights)


def plain_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [t, vocab_rows] of transformers' own model and eager attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def with_layout(runtime: ModelRuntime, layout: BatchLayout) -> ModelRuntime:
    """The runtime with an empty pool of another layout."""
    pool = runtime.pool
    runtime.pool = KVPool(pool._shapes, pool._dtype, pool._device, pool.max_bytes, layout)
    return runtime


def new_slot(runtime: ModelRuntime, columns: int = 128, adapter_key: object = None) -> Slot:
    slot = runtime.pool.allocate((), columns, adapter_key)
    assert slot is not None
    return slot


def read(
    runtime: ModelRuntime,
    slot: Slot,
    ids: list[int],
    start: int = 0,
    adapter: Adapter | None = None,
) -> torch.Tensor:
    """Hidden states [t, hidden] of one segment."""
    segment = Segment(slot=slot, token_ids=ids, start=start, adapter=adapter)
    hidden, (tokens,) = runtime.forward([segment])
    return hidden[tokens]
