"""Local selectors and manifests to publish in tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from s2t_shared.files import sha256_file
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry


def make_local_selector(
    runtime: ModelRuntime,
    kind: SelectorKind = SelectorKind.JOINT,
    seed: int = 0,
    reserved: tuple[int, ...] | None = None,
) -> LocalSelector:
    """Random weights on both sides, so that an adapter that is not applied shows."""
    generator = torch.Generator().manual_seed(seed)
    plain = new_adapter(runtime.model, 4, 8.0, seed)
    weights = {
        path: (a.detach(), torch.randn(b.shape, generator=generator) * 0.1)
        for path, (a, b) in plain.weights.items()
    }
    reserved = reserved or tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    deltas = (
        None
        if kind is SelectorKind.PREFIX
        else torch.randn(16, runtime.head.weight.shape[1], generator=generator)
    )
    return LocalSelector(
        version="",
        kind=kind,
        reads=Reading.BASE,
        reserved_ids=reserved,
        adapter=Adapter(rank=4, alpha=8.0, weights=weights),
        bin_deltas=deltas,
    )


def manifest_of(runtime: ModelRuntime, selector: LocalSelector, **values: object) -> Manifest:
    plain = Manifest(
        version="",
        kind=selector.kind,
        reads=selector.reads,
        temperature=0.1,
        base_model="acme/tiny-slm",
        slm_digest=runtime.digest,
        llm_digest="llm0",
        tokenizer_digest="tok",
        reserved_ids=selector.reserved_ids,
        bins=16,
        thresholds={"entropy": {"0.01": 1.0}},
        snapshot="snap1",
        created_at=0.0,
        files={},
        metrics={
            "n": 1201.0,
            "agree_at_1": 0.812,
            "slm_agree_at_1": 0.7,
            "spearman": 0.5,
            "lm_kl": 0.01,
        },
        training={
            "rank": 4,
            "learning_rate": 5e-4,
            "training_labels": 9000,
            "held_out_labels": 1201,
        },
    )
    return plain.model_copy(update=values)


def publish(
    registry: Registry,
    runtime: ModelRuntime,
    kind: SelectorKind = SelectorKind.JOINT,
    seed: int = 0,
    **values: object,
) -> str:
    selector = make_local_selector(runtime, kind, seed)
    return registry.publish(selector, manifest_of(runtime, selector, **values)).version


def edit_manifest(folder: Path, **values: object) -> None:
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(content | values), encoding="utf-8")


def rehash(folder: Path, drop: str = "") -> None:
    """What someone does who makes a bad version on purpose, or with a broken trainer: the hashes
    are right."""
    files = {
        p.name: sha256_file(p) for p in folder.iterdir() if p.name not in ("manifest.json", drop)
    }
    edit_manifest(folder, files=files)
