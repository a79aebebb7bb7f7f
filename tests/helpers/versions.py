"""Local selectors and manifests to publish in tests, bad versions, and outcomes for the gate."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from s2t_shared.files import sha256_file
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.model.lora import Adapter, new_adapter
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.gate import Paired
from s2t_shared.versions.manifest import Manifest
from s2t_shared.versions.registry import Registry

WEIGHTS, CONFIG, BINS = "adapter_model.safetensors", "adapter_config.json", "bins.safetensors"


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


def spoil_tensor(
    folder: Path, spoil: Callable[[torch.Tensor], torch.Tensor], side: str = "lora_B"
) -> None:
    """Replace the first LoRA matrix of one side, with right hashes."""
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if side in n)
    tensors[name] = spoil(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    rehash(folder)


def _flip_last_byte(folder: Path) -> None:
    (folder / BINS).write_bytes((folder / BINS).read_bytes()[:-1] + b"\x01")


def _remove_bins(folder: Path) -> None:
    (folder / BINS).unlink()
    rehash(folder)


def _to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    rehash(folder)


def _escape(folder: Path) -> None:
    outside = folder.parent.parent / "outside.json"
    outside.write_text("{}", encoding="utf-8")
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    edit_manifest(folder, files=files | {"../../outside.json": sha256_file(outside)})


def _to_symlink(folder: Path) -> None:
    (folder / BINS).rename(folder.parent / "b")
    (folder / BINS).symlink_to(folder.parent / "b")


BAD_VERSIONS: dict[str, tuple[Callable[[Path], object], str]] = {  # case -> (spoil, message)
    "NaN": (lambda f: spoil_tensor(f, lambda t: t * float("nan")), "NaN or infinite"),
    "shape": (lambda f: spoil_tensor(f, lambda t: t[:-1]), "do not fit rank"),
    "base model": (lambda f: edit_manifest(f, slm_digest="other"), "another SLM"),
    "tokenizer": (lambda f: edit_manifest(f, tokenizer_digest="other"), "another tokenizer"),
    "truncated": (_truncate, "cannot be read"),
    "hash": (_flip_last_byte, "does not match its hash"),
    "rank": (lambda f: spoil_tensor(f, lambda t: torch.cat([t, t]), "lora_A"), "rank"),
    "no reserved rows": (_remove_bins, "bins.safetensors is missing"),
    "pickle": (_to_pickle, "not a safetensors or data file"),
    "path escape": (_escape, "place elsewhere"),
    "symlink": (_to_symlink, "elsewhere"),
    "future schema": (lambda f: edit_manifest(f, schema_version=99, surprise=1), "schema 99"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no version"),
    "manifest not JSON": (
        lambda f: (f / "manifest.json").write_text("{"),
        "manifest.json is broken",
    ),
    "unknown field": (lambda f: edit_manifest(f, surprise=1), "manifest.json is broken"),
    "bins": (lambda f: edit_manifest(f, bins=8), "of shape"),
    "temperature": (lambda f: edit_manifest(f, temperature=0.0), "manifest.json is broken"),
}
SHOW_BESIDE_THE_MODEL_ONLY = ("base model", "tokenizer", "shape")


def paired(problems: int, per_problem: int, new: float, old: float, seed: int = 0) -> Paired:
    """Random outcomes. new, old: probability that an item is right."""
    draw = random.Random(seed)
    names = [f"p{i}" for i in range(problems) for _ in range(per_problem)]
    return Paired([draw.random() < new for _ in names], [draw.random() < old for _ in names], names)
