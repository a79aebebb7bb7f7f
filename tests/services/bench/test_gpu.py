"""`s2t bench gpu` runs on any device: here with a tiny shape on the CPU."""

from __future__ import annotations

import pytest

from s2t_shared.errors import ConfigError
from s2t_shared.model import shape
from services.bench.gpu import GpuSettings, bench_gpu
from services.bench.workload import Settings

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SETTINGS = Settings(slm="tiny", prefix=20, new=40, budget=0.1, repeats=2, threads=1)


def test_every_mode_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shape.SHAPES, "tiny", TINY)
    wanted = GpuSettings(slm="tiny", llm="tiny", batches=[1, 3], kv_gib=0.05, max_hf_batch=1)
    report = bench_gpu(SETTINGS, wanted)
    found = [(f.name, f.conditions.partition(",")[0]) for f in report.figures]
    modes = ["greedy", "sample, top_p 0.95 of flat logits", "s2t_local (prefix, base), 10%"]
    modes += ["s2t, 10%", "LLM alone (mode llm)"]
    for batch in (1, 3):
        for mode in modes:
            assert (mode, f"batch {batch}") in found
            assert mode == "greedy" or (f"{mode} / greedy", f"batch {batch}") in found
    assert ("greedy, Hugging Face generate", "batch 1") in found
    assert ("greedy, Hugging Face generate", "batch 3") not in found
    assert all(f.low > 0 for f in report.figures)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="'3B' is no size"):
        bench_gpu(SETTINGS, GpuSettings(slm="3B", llm=None, batches=[1], kv_gib=0.05))
