"""Exports that other programs load."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t_shared.errors import ConfigError, ModelLoadError, VersionError
from s2t_shared.model.local_selector import SelectorKind
from s2t_shared.model.runtime import ModelRuntime, Segment
from s2t_shared.versions.export import export_adapter, export_merged
from s2t_shared.versions.registry import Registry
from tests.helpers.versions import BINS, make_local_selector, manifest_of, publish


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("slm", SelectorKind.PREFIX),
        ("slm", SelectorKind.JOINT),
        ("qwen2_tied", SelectorKind.JOINT),
        ("padding", SelectorKind.RESERVED),
        ("virtual", SelectorKind.RESERVED),
        ("gemma2", SelectorKind.PREFIX),
    ],
)
def test_merged_export_is_the_adapted_model(
    models: dict[str, Path], registry: Registry, tmp_path: Path, model: str, kind: SelectorKind
) -> None:
    """Plain Hugging Face logits of the exported folder == ours with the adapter on; its reserved
    rows == the reserved logits; text rows of a tied head stay as they were."""
    runtime = ModelRuntime.load(str(models[model]))
    reserved = tuple(range(48, 64))
    selector = make_local_selector(runtime, kind, reserved=reserved)
    version = registry.publish(
        selector, manifest_of(runtime, selector, base_model=str(models[model]))
    ).version
    folder = tmp_path / "merged"
    done = export_merged(registry.folder(version), str(models[model]), folder)
    tokens = [5, 9, 30, 7, 41, 12]
    row = runtime.pool.allocate(tokens, 16)
    assert row is not None
    hidden, _ = runtime.forward(
        [Segment(slot=row, token_ids=tokens, start=0, adapter=selector.adapter)]
    )
    expected = runtime.logits(hidden)
    expected_bins = runtime.reserved_logits(hidden, reserved, selector.bin_deltas)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(torch.tensor([tokens])).logits[0].float()
    text = [i for i in range(runtime.vocab_rows) if i not in reserved]
    assert torch.allclose(logits[:, text], expected[:, text], atol=1e-5)
    if kind is not SelectorKind.PREFIX:
        assert torch.allclose(logits[:, list(reserved)], expected_bins, atol=1e-4)
        assert set(reserved) <= set(plain.generation_config.suppress_tokens)
    untied = kind is not SelectorKind.PREFIX and model == "qwen2_tied"
    assert untied == any("tied" in n for n in done.notes)
    assert (model == "virtual") == any("rows of their own" in n for n in done.notes)
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= {p.name for p in folder.iterdir()}
    again = ModelRuntime.load(str(folder))  # and the service takes it as its SLM
    assert again.vocab_rows == max(runtime.vocab_rows, 64 if kind is not SelectorKind.PREFIX else 0)


def test_exports_never_overwrite(
    registry: Registry, runtime: ModelRuntime, models: dict[str, Path], tmp_path: Path
) -> None:
    version = registry.folder(publish(registry, runtime))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine", encoding="utf-8")
    for export in (
        lambda f: export_adapter(version, f),
        lambda f: export_merged(version, str(models["slm"]), f),
    ):
        with pytest.raises(ConfigError, match="not an empty folder"):
            export(tmp_path / "full")
        with pytest.raises(ConfigError, match="cannot write"):
            export(tmp_path / "full/x")
    with pytest.raises(VersionError, match="another SLM"):
        export_merged(version, str(models["qwen2"]), tmp_path / "new")
    spare = tmp_path / "spare"
    shutil.copytree(models["slm"], spare)
    (spare / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(
        ModelLoadError, match="cannot be loaded"
    ):  # fails half way: nothing is left behind
        export_merged(version, str(spare), tmp_path / "new")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "spare", "versions"]


def test_exported_adapter_loads_in_peft(
    registry: Registry, runtime: ModelRuntime, models: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    export_adapter(registry.folder(publish(registry, runtime)), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models["slm"]), tmp_path / "adapter"
    )
    assert any("lora_B" in name for name, _ in loaded.named_parameters())
    assert (tmp_path / "adapter" / BINS).is_file()
    assert (tmp_path / "adapter/README.md").is_file()


def test_a_url_is_no_folder(models: dict[str, Path], registry: Registry) -> None:
    """It made a local folder `s3:`."""
    version = registry.folder(publish(registry, ModelRuntime.load(str(models["slm"]))))
    with pytest.raises(ConfigError, match="copy that to the object store"):
        export_adapter(version, Path("s3://bucket/version"))
