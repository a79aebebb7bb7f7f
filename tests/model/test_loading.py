"""Loading a model folder: broken ones are refused, and the digest follows the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from s2t_shared.errors import ModelLoadError
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from tests.helpers.models import SPECS

WEIGHTS = "model.safetensors"


def save_weights(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_weights(tensors, folder)


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(7)
    save_weights(tensors, folder)


def truncate_weights(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-99])


def name_an_unknown_type(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "nonesuch"}
    file.write_text(json.dumps(config))


CORRUPT = b"\x08\0\0\0\0\0\0\0garbage!"
BROKEN_MODELS: dict[str, Callable[[Path], object]] = {
    "missing folder": shutil.rmtree,
    "no config": lambda f: (f / "config.json").unlink(),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "unknown model type": name_an_unknown_type,
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "corrupt weights": lambda f: (f / WEIGHTS).write_bytes(CORRUPT),
    "truncated weights": truncate_weights,
    "a tensor is missing": drop_a_tensor,
    "a tensor has another shape": reshape_a_tensor,
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_model_folder_is_refused(
    models: dict[str, Path], tmp_path: Path, case: str
) -> None:
    """A broken download must stop the start with a typed error; random weights in place of a lost
    tensor are worse."""
    folder = tmp_path / "model"
    shutil.copytree(models["slm"], folder)
    ModelRuntime.load(str(folder))
    BROKEN_MODELS[case](folder)
    with pytest.raises(ModelLoadError):
        ModelRuntime.load(str(folder))


def test_an_unknown_dtype_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ModelLoadError, match="float16"):
        ModelRuntime.load(str(models["slm"]), dtype="float16")


def test_the_digest_follows_the_weights(models: dict[str, Path], tmp_path: Path) -> None:
    """Versions and labels name the SLM by its digest: one changed number must change it, a copy
    must not."""
    first = ModelRuntime.load(str(models["slm"])).digest
    copy = tmp_path / "copy"
    shutil.copytree(models["slm"], copy)
    assert ModelRuntime.load(str(copy)).digest == first
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"][3] += 1e-3
    save_weights(tensors, copy)
    assert ModelRuntime.load(str(copy)).digest != first
    digests = {ModelRuntime.load(str(path)).digest for path in models.values()}
    assert len(digests) == len(SPECS)


@pytest.mark.parametrize("weights", [True, False])
def test_a_tokenizer_is_compared_without_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool
) -> None:
    """F25: to compare two tokenizers, 65 GB of a 32B LLM were downloaded to the head's disk."""
    asked: list[str] = []

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("acme/large", "llm", weights) == tmp_path
    files = ["model-00001-of-00017.safetensors", "tokenizer.json", "vocab.txt", "chat.jinja"]
    matched = [any(fnmatch(file, pattern) for pattern in asked) for file in files]
    assert matched == [weights, True, True, True]
