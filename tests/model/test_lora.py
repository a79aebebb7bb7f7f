"""Adapters: the gate, merged weights, and files that mean to PEFT what they mean here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from s2t_shared.errors import VersionError
from s2t_shared.model.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    load_adapter,
    merge,
    new_adapter,
    save_adapter,
)
from s2t_shared.model.runtime import ModelRuntime
from tests.helpers.forwards import new_slot, plain_logits, random_adapter, read

# -- layers ---------------------------------------------------------------------------------------


def test_merged_weights_are_the_adapter(models: dict[str, Path]) -> None:
    runtime = ModelRuntime.load(str(models["qwen2"]))
    adapter = random_adapter(runtime)
    gated = read(runtime, new_slot(runtime, adapter_key=1), [5, 9, 40, 7], 0, adapter)
    merge(adapter, runtime.model)
    merged = read(runtime, new_slot(runtime, adapter_key=1), [5, 9, 40, 7], 0, adapter)
    assert not torch.equal(gated, merged)
    torch.testing.assert_close(gated, merged, atol=2e-5, rtol=1e-5)


def test_installed_layers_change_nothing_while_no_adapter_is_active(
    models: dict[str, Path],
) -> None:
    """Law 4: bit for bit, before the layers are wrapped, after, after an adapter was used, and
    after one raised."""
    runtime = ModelRuntime.load(str(models["qwen2"]))
    slot = new_slot(runtime)

    def logits(adapter: Adapter | None = None) -> torch.Tensor:
        return runtime.logits(read(runtime, slot, [5, 9, 40, 7], 0, adapter))

    before = logits()
    adapter = random_adapter(runtime)
    assert not runtime.switch.active
    assert torch.equal(logits(), before)
    assert not torch.equal(logits(adapter), before)
    assert torch.equal(logits(), before)
    with pytest.raises(KeyError):
        read(runtime, slot, [5], 0, Adapter(rank=1, alpha=1.0, weights={}))
    assert not runtime.switch.active
    assert torch.equal(logits(), before)


def test_a_fresh_adapter_is_the_base_model(models: dict[str, Path]) -> None:
    """B starts at zero, so training starts from the base model and not from noise."""
    runtime = ModelRuntime.load(str(models["slm"]))
    base = read(runtime, new_slot(runtime), [5, 9])
    fresh = new_adapter(runtime.model, 2, 4.0, seed=0)
    with torch.no_grad():
        assert torch.equal(read(runtime, new_slot(runtime), [5, 9], 0, fresh), base)
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert any(parameter.any() for parameter in fresh.parameters())
    again = new_adapter(runtime.model, 2, 4.0, seed=0)
    for a, b in zip(fresh.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slm", "qwen2", "gemma2"])
def test_an_adapter_file_means_to_peft_what_it_means_to_us(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The files are PEFT's: if its logits differed, a version trained elsewhere would mean
    something else here."""
    from peft import PeftModel

    runtime = ModelRuntime.load(str(models[name]))
    saved = random_adapter(runtime)
    save_adapter(saved, tmp_path, str(models[name]))
    loaded = load_adapter(tmp_path, ModelRuntime.load(str(models[name])).model)
    assert loaded.rank == saved.rank
    assert loaded.alpha == saved.alpha
    ids = [5, 9, 40, 7, 30, 22, 11]
    gated_logits = runtime.logits(read(runtime, new_slot(runtime), ids, 0, loaded))
    base = AutoModelForCausalLM.from_pretrained(
        models[name], dtype=torch.float32, attn_implementation="eager"
    )
    peft_model = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        peft_logits = peft_model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(gated_logits, peft_logits, atol=2e-5, rtol=1e-5)
    assert (gated_logits - plain_logits(models[name], ids)).abs().max() > 0.1


def edit_config(**changes: object) -> Callable[[Path], None]:
    """Change keys of an adapter's configuration; None removes one."""

    def edit(folder: Path) -> None:
        file = folder / ADAPTER_CONFIG
        config = json.loads(file.read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        file.write_text(json.dumps(kept))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """Apply `change` to an adapter's tensors and the name of the first."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return edit


def truncate_weights(folder: Path) -> None:
    file = folder / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:-9])


CORRUPT = b"\x08\0\0\0\0\0\0\0garbage!"
UNKNOWN_LAYER = {"base_model.model.x.lora_A.weight": torch.ones(1, 1)}
BROKEN_ADAPTERS: dict[str, Callable[[Path], object]] = {
    "missing folder": shutil.rmtree,
    "missing config": lambda f: (f / ADAPTER_CONFIG).unlink(),
    "missing weights": lambda f: (f / ADAPTER_WEIGHTS).unlink(),
    "config is no JSON": lambda f: (f / ADAPTER_CONFIG).write_text("{"),
    "config is a list": lambda f: (f / ADAPTER_CONFIG).write_text("[]"),
    "config without rank": edit_config(r=None),
    "corrupt safetensors": lambda f: (f / ADAPTER_WEIGHTS).write_bytes(CORRUPT),
    "truncated safetensors": truncate_weights,
    "NaN weight": edit_weights(lambda t, k: t[k].view(-1)[0:1].fill_(float("nan"))),
    "infinite weight": edit_weights(lambda t, k: t[k].view(-1)[0:1].fill_(float("inf"))),
    "wrong shape": edit_weights(lambda t, k: t.update({k: t[k][:, :-1].contiguous()})),
    "other rank": edit_config(r=5),
    "rank zero": edit_config(r=0),
    "missing layer": edit_weights(lambda t, k: t.pop(k)),
    "unknown layer": edit_weights(lambda t, k: t.update(UNKNOWN_LAYER)),
    "NaN alpha": edit_config(lora_alpha=float("nan")),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    """A version that loads although broken would score noise (or NaN) live; the old one must keep
    serving."""
    runtime = ModelRuntime.load(str(models["slm"]))
    folder = tmp_path / "v1"
    folder.mkdir()
    save_adapter(random_adapter(runtime), folder, "base")
    load_adapter(folder, runtime.model)
    BROKEN_ADAPTERS[case](folder)
    with pytest.raises(VersionError, match="v1"):
        load_adapter(folder, runtime.model)


def test_scalings_peft_would_apply_are_not_silently_ignored(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT scales by alpha / sqrt(r) with use_rslora: ignoring it serves another model than was
    trained."""
    runtime = ModelRuntime.load(str(models["slm"]))
    adapter = random_adapter(runtime)
    save_adapter(adapter, tmp_path, "base")
    edit_config(use_rslora=True)(tmp_path)
    try:
        loaded = load_adapter(tmp_path, runtime.model)
    except VersionError:
        return
    assert loaded.scale == pytest.approx(adapter.alpha / adapter.rank**0.5)
