"""Exports a version for other programs: PEFT's files, or a plain Hugging Face model.

The plain model has the LoRA merged into its weights, so the adapter acts on every token, as with
`proposals: adapted`. Knows folders and weights; not which version is live.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from s2t_shared.errors import ConfigError, ModelLoadError, VersionError
from s2t_shared.files import new_folder
from s2t_shared.model.folders import model_digest, resolve_model
from s2t_shared.model.lora import adaptable_layers, load_adapter
from s2t_shared.versions.manifest import (
    BINS,
    CARD,
    MANIFEST,
    Manifest,
    read_manifest,
    verify_files,
    verify_weights,
)
from s2t_shared.versions.model_card import card_header

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    notes: differences from the base model beyond the merged weights.
    """

    folder: Path
    notes: tuple[str, ...] = ()


def export_adapter(version: Path, folder: Path) -> Exported:
    """Copy a version's checked files to `folder`. PEFT and `s2t generate --selector` load it.

    Raises:
        ConfigError: `folder` is not empty or cannot be written.
        VersionError: the version is damaged.
    """
    manifest = read_manifest(version)
    verify_files(version, manifest)
    with _new_folder(folder) as staging:
        for name in (*manifest.files, MANIFEST):
            shutil.copyfile(version / name, staging / name)
    return Exported(folder)


def export_merged(version: Path, base_model: str, folder: Path) -> Exported:
    """Write the SLM with the version's LoRA merged into it, in the base model's dtype.

    `AutoModelForCausalLM.from_pretrained` loads the folder. The deltas of reserved rows are added
    to the head's rows: a tied head is untied, and rows that the model lacks are made. The
    generation config suppresses the reserved ids.

    Raises:
        ConfigError: `folder` is not empty or cannot be written.
        ModelLoadError: there is no such base model.
        VersionError: the version is damaged, or was trained for another model.
    """
    manifest = read_manifest(version)
    verify_files(version, manifest)
    verify_weights(version, manifest)
    source = resolve_model(base_model)
    digest = model_digest(source)
    if digest != manifest.slm_digest:
        raise VersionError(
            f"version {manifest.version!r} was trained for another SLM (digest "
            f"{manifest.slm_digest}, {base_model!r} is {digest}); "
            f"name its base model ({manifest.base_model!r})"
        )
    with _new_folder(folder) as staging:
        model = _load(source)
        _merge(model, version)
        notes = _add_reserved_rows(model, version, manifest) if BINS in manifest.files else []
        _suppress_reserved(model, manifest)
        model.save_pretrained(staging)
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, staging / file.name)
        (staging / CARD).write_text(_card(manifest, notes), encoding="utf-8")
    return Exported(folder, tuple(notes))


def _load(source: Path) -> Any:
    """The model, with the generation settings of its folder."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
        if (source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
        return model
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"model folder {str(source)!r} cannot be loaded: {reason}") from error


@torch.no_grad()
def _merge(model: nn.Module, version: Path) -> None:
    adapter = load_adapter(version, model)
    for path, layer in adaptable_layers(model).items():
        a, b = adapter.weights[path]
        layer.weight.copy_(layer.weight.float() + adapter.scale * (b.float() @ a.float()))


@torch.no_grad()
def _add_reserved_rows(model: Any, version: Path, manifest: Manifest) -> list[str]:
    """Add the deltas to the head's rows. Returns notes on what else had to change."""
    notes = []
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        # The deltas belong to the head alone; the embedding rows are read by every prompt.
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
        head.weight = nn.Parameter(head.weight.detach().clone())
        notes.append(
            "the output head is no longer tied to the embeddings (tie_word_embeddings: false), "
            "which makes the model larger by one head"
        )
    rows = head.weight.shape[0]
    first, last = min(manifest.reserved_ids), max(manifest.reserved_ids)
    if last >= rows:
        model.resize_token_embeddings(last + 1, mean_resizing=False)
        head = model.get_output_embeddings()
        head.weight[rows:] = 0.0
        model.get_input_embeddings().weight[rows:] = 0.0
        notes.append(
            f"the vocabulary has {last + 1} rows instead of {rows}: this model has no spare rows, "
            "so the reserved ids got rows of their own"
        )
    deltas = load_file(version / BINS)["deltas"]
    ids = torch.tensor(manifest.reserved_ids)
    if deltas.shape != (len(ids), head.weight.shape[1]):
        raise VersionError(
            f"version {manifest.version!r}: {BINS} has shape {tuple(deltas.shape)}, "
            f"({len(ids)}, {head.weight.shape[1]}) is needed; publish it again"
        )
    head.weight[ids] = (head.weight[ids].float() + deltas).to(head.weight.dtype)
    notes.append(f"the head's rows {first} to {last} hold the reserved bins")
    return notes


def _suppress_reserved(model: Any, manifest: Manifest) -> None:
    """Mask the reserved ids in generation, as the service does."""
    rows = model.get_output_embeddings().weight.shape[0]
    reserved = {i for i in manifest.reserved_ids if i < rows}
    if reserved:
        suppressed = model.generation_config.suppress_tokens or ()
        model.generation_config.suppress_tokens = sorted(reserved | set(suppressed))


def _card(manifest: Manifest, notes: list[str]) -> str:
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["select-to-think"],
    }
    lines = [
        "a plain Hugging Face model: every token is proposed with the adapter on",
        *notes,
        f"the version's metrics: `{json.dumps(manifest.metrics)}`",
    ]
    items = "\n".join(f"- {line}" for line in lines)
    header = card_header(manifest, "merge", metadata)
    return f"{header}\n# {manifest.version}, merged\n\n{items}\n"


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """`files.new_folder` with errors of this package."""
    if re.match(r"[a-z0-9]+:/", str(folder)):  # Path has made one slash of two
        raise ConfigError(
            f"{str(folder)!r} is no folder; export to a folder, then copy that to the object store"
        )
    try:
        with new_folder(folder.absolute()) as staging:
            yield staging
    except FileExistsError as error:
        raise ConfigError(
            f"cannot write to {str(folder)!r}: it exists and is not an empty folder; "
            "name a new one, nothing is ever overwritten"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
