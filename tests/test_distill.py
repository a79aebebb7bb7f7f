"""Distillation (law 2: tree training == per-candidate training), the registry, and the training job without Ray."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2t_shared.config import load_config
from s2t_shared.distill import (
    DistillConfig,
    distil,
    lm_kl,
    new_selector,
    selection_loss,
    training_loss,
    tree_scores,
)
from s2t_shared.errors import ConfigError, StoreError, VersionError, VersionNotFoundError
from s2t_shared.labels import Label, freeze_snapshot, write_shard
from s2t_shared.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.registry import Manifest, Registry
from s2t_shared.runtime import ModelRuntime
from s2t_shared.text import Tokenizer, reserved_ids
from s2t_shared.trees import Group, Tree, build_trees, is_held_out
from services.training import train_and_publish

KINDS = [(kind, reads) for kind in SelectorKind for reads in Reading]


def make_label(context: tuple[int, ...], rollout: str, seed: int, k: int = 4, slm: str = "") -> Label:
    rng = random.Random(seed)
    ids = tuple(rng.sample(range(20, 45), k))
    raw = torch.tensor([rng.uniform(-3, 0) for _ in range(2 * k)])
    slm_scores, llm_scores = raw[:k].log_softmax(0).tolist(), raw[k:].log_softmax(0).tolist()
    return Label(f"{rollout}-{len(context)}", context, ids, tuple(slm_scores), tuple(llm_scores), ids[1], 1, 1.0, 0.5,
                 0.7, slm, "llm", "tok", "t", rollout, "train", len(context), rollout, 0.0)


def make_labels(count: int, slm: str = "") -> list[Label]:
    """Rollouts with three labelled positions each."""
    labels = []
    for r in range(count):
        rng = random.Random(r)
        tokens = tuple(rng.randrange(20, 45) for _ in range(14))
        labels += [make_label(tokens[:n], f"p{r}", 100 * r + n, k=3 + n % 3, slm=slm) for n in (5, 9, 14)]
    return labels


@pytest.fixture()
def runtime(models: dict[str, Path]) -> ModelRuntime:
    loaded = ModelRuntime.load(str(models["slm"]))
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    return loaded


def trained_a_little(runtime: ModelRuntime, config: DistillConfig) -> tuple[LocalSelector, list[torch.Tensor]]:
    """A selector whose every parameter matters (B is zero in a fresh one)."""
    torch.manual_seed(3)
    tokenizer_rows = tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    selector = new_selector(runtime, tokenizer_rows, config)
    assert selector.adapter is not None
    parameters = selector.adapter.parameters() + ([selector.bin_deltas] if selector.bin_deltas is not None else [])
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return selector, parameters


@pytest.mark.parametrize(("kind", "reads"), KINDS)
def test_tree_training_equals_per_candidate_training(runtime: ModelRuntime, kind: SelectorKind, reads: Reading) -> None:
    """Law 2: one tree per rollout against one sequence per candidate: same loss, same gradients."""
    config = DistillConfig(kind, reads, reg_weight=0.0)
    selector, parameters = trained_a_little(runtime, config)
    labels = make_labels(3)
    trees = build_trees(labels)
    assert [len(t.groups) for t in trees] == [3, 3, 3]
    tree_loss = training_loss(runtime, selector, trees, config)
    tree_gradients = torch.autograd.grad(tree_loss, parameters, allow_unused=True)

    flat = [label for tree in trees for label in (g.label for g in tree.groups)]
    rows = []
    for label in flat:
        if kind is SelectorKind.RESERVED:  # candidates do not see one another: each can stand alone
            parts = [tree_scores(runtime, selector, [single(label, i)]).scores[0, 0]
                     for i in range(len(label.candidate_ids))]
            rows.append(torch.stack(parts))
        else:  # the candidates share a softmax: one sequence per context
            alone = Tree(label.context_ids, (Group(len(label.context_ids), label),))
            rows.append(tree_scores(runtime, selector, [alone]).scores[0])
    width = max(len(r) for r in rows)
    scores = torch.stack([torch.nn.functional.pad(r, (0, width - len(r)), value=-torch.inf) for r in rows])
    valid = torch.tensor([[i < len(label.candidate_ids) for i in range(width)] for label in flat])
    plain_loss = selection_loss(selector.selection_logits(scores), flat, valid, config)
    plain_gradients = torch.autograd.grad(plain_loss, parameters, allow_unused=True)
    assert float(tree_loss.detach()) == pytest.approx(float(plain_loss.detach()), rel=1e-5)
    moved = 0
    for a, b in zip(tree_gradients, plain_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)
            moved += int(a.abs().max() > 0)
    assert moved > len(parameters) // 2


def single(label: Label, i: int) -> Tree:
    one = replace(label, candidate_ids=(label.candidate_ids[i],), slm_log_probs=(label.slm_log_probs[i],),
                  llm_log_probs=(label.llm_log_probs[i],))
    return Tree(label.context_ids, (Group(len(label.context_ids), one),))


def test_trees_join_prefixes_only() -> None:
    """Labels of one rollout share a tree when their contexts are prefixes; another branch gets its own."""
    a, b = make_label((1, 2, 3), "r", 1), make_label((1, 2, 3, 4), "r", 2)
    other = make_label((1, 9, 3, 4, 5), "r", 3)
    trees = build_trees([a, b, other])
    assert sorted(len(t.groups) for t in trees) == [1, 2]
    for tree in trees:
        for group in tree.groups:
            assert tree.token_ids[: group.length] == group.label.context_ids


def test_fresh_selector_changes_nothing(runtime: ModelRuntime) -> None:
    """LoRA starts as the base model: the prefix score is the SLM's own order and the LM-KL is zero."""
    config = DistillConfig(SelectorKind.PREFIX, Reading.ADAPTED)
    selector = new_selector(runtime, (), config)
    trees = build_trees(make_labels(2))
    assert float(lm_kl(runtime, selector, trees, None, False).detach()) == pytest.approx(0.0, abs=1e-6)


def test_regulariser_sees_a_distorted_model(runtime: ModelRuntime) -> None:
    """L_reg is positive for an adapter that moves the language model, and leaves labelled positions out on request."""
    selector, _ = trained_a_little(runtime, DistillConfig(SelectorKind.JOINT, Reading.ADAPTED))
    trees = build_trees(make_labels(2))
    everywhere = float(lm_kl(runtime, selector, trees, None, False).detach())
    elsewhere = float(lm_kl(runtime, selector, trees, None, True).detach())
    assert everywhere > 1e-3 and everywhere != pytest.approx(elsewhere, rel=1e-6)


@pytest.mark.parametrize(("kind", "reads"), KINDS)
def test_training_learns(runtime: ModelRuntime, kind: SelectorKind, reads: Reading) -> None:
    """A rule that can be learnt is learnt: the LLM always prefers the candidate with the smallest id."""
    labels = []
    for label in make_labels(60, runtime.digest):
        order = sorted(range(len(label.candidate_ids)), key=lambda i: label.candidate_ids[i])  # noqa: B023
        scores = torch.tensor([-2.0 * order.index(i) for i in range(len(order))]).log_softmax(0).tolist()
        labels.append(replace(label, llm_log_probs=tuple(scores)))
    config = DistillConfig(kind, reads, steps=120, learning_rate=1e-2, batch_labels=32, patience=99)
    losses: list[float] = []
    done = distil(runtime, tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows)), labels, config,
                  lambda step, loss: losses.append(loss))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert {"loss", "agree_at_1", "slm_agree_at_1", "spearman", "hit_at_8", "lm_kl", "n"} <= set(done.metrics)
    assert done.metrics["loss"] == pytest.approx(min(loss for _, loss, _ in done.curve))  # the best one is kept


def test_training_refuses_foreign_or_few_labels(runtime: ModelRuntime) -> None:
    with pytest.raises(ConfigError, match="another SLM"):
        distil(runtime, (), make_labels(20, "someone else"), DistillConfig(steps=1))
    with pytest.raises(StoreError, match="too few"):
        distil(runtime, (), make_labels(1, runtime.digest), DistillConfig(steps=1))
    mixed = make_labels(20, runtime.digest)
    with pytest.raises(ConfigError, match="2 different LLMs"):
        distil(runtime, (), [replace(mixed[0], llm_digest="other"), *mixed[1:]], DistillConfig(steps=1))


def test_held_out_split_is_by_problem() -> None:
    """All labels of a problem are on one side, whatever their number; about a tenth is held out."""
    labels = make_labels(300)
    sides = {label.problem_id: {is_held_out(other) for other in labels if other.problem_id == label.problem_id}
             for label in labels}
    assert all(len(side) == 1 for side in sides.values())
    assert 0.05 < sum(True in side for side in sides.values()) / 300 < 0.16


# -- registry -----------------------------------------------------------------------------------------------------


def publish(registry: Registry, runtime: ModelRuntime, digest: str = "tok", seed: int = 0) -> Manifest:
    config = DistillConfig(SelectorKind.JOINT, Reading.BASE, seed=seed)
    reserved = tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    return registry.publish(new_selector(runtime, reserved, config), Manifest(
        version="", kind=config.kind, reads=config.reads, temperature=config.temperature, base_model="base",
        slm_digest=runtime.digest, llm_digest="llm", tokenizer_digest=digest, reserved_ids=reserved, bins=16,
        thresholds={"entropy": {"0.01": 1.0}}, metrics={"agree_at_1": 0.5}, snapshot="s", training={}, created_at=0.0,
        files={}))


def test_publish_load_promote_roll_back(runtime: ModelRuntime, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "versions")
    assert registry.names() == [] and registry.live() is None
    first, second = publish(registry, runtime), publish(registry, runtime, seed=1)
    assert registry.names() == [first.version, second.version] and first.version.startswith("v0001-joint-base-")
    registry.promote(first.version)
    registry.promote(second.version)
    assert registry.live() == second.version
    loaded = registry.load(first.version, runtime, "tok")
    assert loaded.kind is SelectorKind.JOINT and loaded.bin_deltas is not None and loaded.version == first.version
    assert registry.rollback() == first.version and registry.live() == first.version
    assert registry.rollback() is None and registry.live() is None
    with pytest.raises(VersionError, match="nothing to roll back"):
        registry.rollback()
    assert not [p for p in registry.root.iterdir() if p.name.startswith(".publishing")]


def edit_manifest(folder: Path, **values: object) -> None:
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(content | values), encoding="utf-8")


BAD_VERSIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no version|no manifest"),
    "manifest not JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is broken"),
    "unknown field": (lambda f: edit_manifest(f, surprise=1), "manifest.json is broken"),
    "future schema": (lambda f: edit_manifest(f, schema_version=99), "schema 99"),
    "changed weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "hash"),
    "missing file": (lambda f: (f / "bins.safetensors").unlink(), "missing"),
    "path escape": (lambda f: edit_manifest(f, files={"../../x": "0"}), "missing"),
    "other SLM": (lambda f: edit_manifest(f, slm_digest="other"), "another SLM"),
    "other tokenizer": (lambda f: edit_manifest(f, tokenizer_digest="other"), "another tokenizer"),
    "other bins": (lambda f: edit_manifest(f, bins=8), "of shape"),
}


@pytest.mark.parametrize("case", BAD_VERSIONS)
def test_bad_versions_are_refused(runtime: ModelRuntime, tmp_path: Path, case: str) -> None:
    """Ten kinds of bad version, each refused with its reason before anything of it is used."""
    registry = Registry(tmp_path / "versions")
    folder = registry.root / publish(registry, runtime).version
    spoil, message = BAD_VERSIONS[case]
    spoil(folder)
    with pytest.raises(VersionError, match=message):
        registry.load(folder.name, runtime, "tok")


def test_versions_of_strange_names_are_not_found(runtime: ModelRuntime, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "versions")
    publish(registry, runtime)
    for name in ("", ".", "..", "../versions", "v0001", "/etc/passwd"):
        with pytest.raises(VersionNotFoundError):
            registry.load(name, runtime, "tok")


def test_damaged_live_pointer_is_an_error_and_can_be_mended(runtime: ModelRuntime, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "versions")
    version = publish(registry, runtime).version
    (registry.root / "LIVE").write_text("garbage", encoding="utf-8")
    with pytest.raises(VersionError, match="LIVE file is damaged"):
        registry.live()
    registry.promote(version)
    assert registry.live() == version


def test_the_job_trains_publishes_and_compares(models: dict[str, Path], tmp_path: Path) -> None:
    """What runs in a Ray worker, without Ray: labels of a lake become a version that loads."""
    folder = tmp_path / "slm"
    shutil.copytree(models["slm"], folder)
    config = load_config(overrides={"slm.model": str(folder), "data_dir": str(tmp_path / "data"),
                                    "training.steps": 5, "training.kind": "joint"}, environment={})
    runtime = ModelRuntime.load(str(folder))
    write_shard(config.lake, make_labels(40, runtime.digest))
    outcome = train_and_publish(config, freeze_snapshot(config.lake), publishes=True)
    registry = Registry(config.versions)
    tokenizer = Tokenizer.load(folder)
    selector = registry.load(outcome["version"], runtime, tokenizer.digest)
    assert selector.reserved_ids == reserved_ids(tokenizer, runtime.vocab_rows)
    manifest = registry.manifest(outcome["version"])
    assert manifest.metrics == outcome["metrics"] and manifest.training["steps"] == 5 and manifest.files
    registry.promote(outcome["version"])
    again = train_and_publish(config, freeze_snapshot(config.lake), publishes=True)
    assert again["live_agree_at_1"] == pytest.approx(outcome["metrics"]["agree_at_1"])
