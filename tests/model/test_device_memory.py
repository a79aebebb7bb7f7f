"""A model that cannot fit its GPU is refused at start, not under load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen2Config

from s2t_shared.errors import ModelLoadError
from s2t_shared.model import device_memory
from s2t_shared.model.device_memory import GIB, check_device_memory, check_fits, weight_bytes
from s2t_shared.model.runtime import ModelRuntime

REFERENCE = Path(__file__).parents[2] / "cluster" / "reference.yaml"
# What torch reports as free on an empty card.
FREE_GIB = {"L4": 22.0, "H100": 79.1, "H200": 139.7}
# Of Qwen2.5's two models.
PARAMETERS = {"1.5B": 1_543_714_304, "32B": 32_763_876_352}


def test_weights_are_counted_in_the_loaded_dtype(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["qwen2"])
    parameters = sum(p.numel() for p in model.parameters())
    assert weight_bytes(models["qwen2"], torch.float32) == 4 * parameters
    assert weight_bytes(models["qwen2"], torch.bfloat16) == 2 * parameters


def test_the_refusal_says_numbers_and_the_setting() -> None:
    check_fits("small", 3 * GIB, 8 * GIB, 22 * GIB)
    with pytest.raises(ModelLoadError, match=r"needs 103.0 GiB .* lower kv_gib to 16.1 or less"):
        check_fits("large", 61 * GIB, 40 * GIB, int(79.1 * GIB))
    with pytest.raises(ModelLoadError, match="weights alone are too large"):
        check_fits("large", 61 * GIB, 1 * GIB, 22 * GIB)


def test_a_model_is_refused_before_it_is_loaded(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading first and failing then would take minutes, and the whole host's memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    loaded: list[object] = []
    monkeypatch.setattr("s2t_shared.model.loading._load_weights", lambda *args: loaded.append(args))
    with pytest.raises(ModelLoadError, match="5.0 GiB are free"):
        ModelRuntime.load(str(models["slm"]), device="cuda", kv_bytes=4 * GIB)
    assert not loaded
    check_device_memory(models["slm"], torch.float32, torch.device("cpu"), 1 << 50)


@pytest.mark.parametrize("section, size", [("slm", "1.5B"), ("llm", "32B")])
def test_the_reference_models_fit_their_cards(section: str, size: str) -> None:
    settings = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    model = settings[section]
    assert size in model["model"] and model["dtype"] == "bfloat16"
    role = {"slm": "proposer", "llm": "selector"}[section]
    card = settings[role]["accelerator_type"]
    kv_bytes = int(model["kv_gib"] * GIB)
    check_fits(size, 2 * PARAMETERS[size], kv_bytes, int(FREE_GIB[card] * GIB))


def test_the_working_memory_holds_a_batchs_logits() -> None:
    """Two float32 copies of the logits of 256 sequences, at Qwen's vocabulary."""
    vocabulary = Qwen2Config().vocab_size
    assert 2 * 256 * vocabulary * 4 < device_memory.WORKING_BYTES / 2
