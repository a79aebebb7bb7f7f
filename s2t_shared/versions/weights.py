"""A version's weights: read for an SLM, and written. Knows torch, one folder and its manifest."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from s2t_shared.errors import VersionError
from s2t_shared.model.local_selector import AdapterHost, LocalSelector
from s2t_shared.model.lora import load_adapter, save_adapter
from s2t_shared.model.peft_files import read_rank
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.manifest import (
    BINS,
    Manifest,
    read_manifest,
    verify_files,
    verify_weights,
)

SLM = ModelRuntime | AdapterHost  # what a version is loaded for


def load_version(folder: Path, slm: SLM, tokenizer_digest: str) -> LocalSelector:
    """Read and check the version in `folder` for this SLM.

    Weights are float32, on its device; those of an adapter host stay in the folder.

    Raises:
        VersionNotFoundError: the folder has no manifest.
        VersionError: it is damaged, made for another SLM or tokenizer, or nothing that an adapter
            host can run.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    _check_digest(folder, "SLM", manifest.slm_digest, slm.digest)
    _check_digest(folder, "tokenizer", manifest.tokenizer_digest, tokenizer_digest)
    selector = LocalSelector(
        version=manifest.version,
        kind=manifest.kind,
        reads=manifest.reads,
        reserved_ids=manifest.reserved_ids,
        temperature=manifest.temperature,
        fusion=manifest.fusion,
        calibration=manifest.calibration,
        scoring=manifest.scoring,
        standardise=manifest.standardise,
        always_on=manifest.always_on,
        folder=folder,
    )
    if isinstance(slm, AdapterHost):
        verify_weights(folder, manifest)
        _check_hosted(selector, slm)
        return selector
    selector.adapter = load_adapter(folder, slm.model).to(slm.device, torch.float32)
    if BINS in manifest.files:
        selector.bin_deltas = _load_bins(folder, manifest, slm)
    return selector


def _check_hosted(selector: LocalSelector, slm: AdapterHost) -> None:
    if not selector.is_ordinary_lora:
        raise VersionError(
            f"version {selector.version!r} is of kind {selector.kind.value} and reads "
            f"{selector.reads.value}; the runtime vllm runs kind prefix that reads adapted: "
            "set slm.runtime to torch, or choose such a version"
        )
    assert selector.folder is not None
    rank = read_rank(selector.folder)
    if rank > slm.max_rank:
        raise VersionError(
            f"version {selector.version!r} has an adapter of rank {rank}; the runtime vllm was "
            f"started for {slm.max_rank}: raise proposer.max_lora_rank"
        )


def _load_bins(folder: Path, manifest: Manifest, runtime: ModelRuntime) -> torch.Tensor:
    """Deltas of the reserved head rows, [bins, hidden]."""
    where = f"version {folder.name!r}"
    try:
        deltas = load_file(folder / BINS)["deltas"].to(runtime.device)
    except (OSError, KeyError, SafetensorError) as error:
        raise VersionError(f"{where}: {BINS} cannot be read; publish it again") from error
    expected = (manifest.bins, runtime.head.weight.shape[1])
    if tuple(deltas.shape) != expected or not torch.isfinite(deltas).all():
        raise VersionError(
            f"{where}: {BINS} must be finite and of shape {expected}, "
            f"it has shape {tuple(deltas.shape)}"
        )
    return deltas


def _check_digest(folder: Path, model: str, trained_for: str, present: str) -> None:
    if trained_for != present:
        raise VersionError(
            f"version {folder.name!r} was trained for another {model} (digest {trained_for}, "
            f"this one is {present}); choose a version of this {model}"
        )


def write_weights(selector: LocalSelector, base_model: str, folder: Path) -> None:
    assert selector.adapter is not None
    save_adapter(selector.adapter, folder, base_model)
    if selector.bin_deltas is not None:
        deltas = selector.bin_deltas.detach().float().cpu().contiguous()
        save_file({"deltas": deltas}, folder / BINS)
