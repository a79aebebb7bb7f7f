"""Training by several processes over torch.distributed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.new_local_selector import trained_tensors
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.training.trainer import Distilled, distil
from s2t_shared.types import Reading, SelectorKind
from tests.helpers.rollouts import learnable, make_rollouts


def short_run(kind: SelectorKind, reads: Reading) -> TrainingSettings:
    return TrainingSettings(
        kind=kind,
        reads=reads,
        steps=8,
        batch_labels=4,
        max_tokens=40,
        learning_rate=1e-3,
        validate_every=4,
    )


PREFIX = short_run(SelectorKind.PREFIX, Reading.BASE)
JOINT = short_run(SelectorKind.JOINT, Reading.ADAPTED)
CASES = [(PREFIX, False), (PREFIX, True), (JOINT, False), (JOINT, True)]  # settings, sharded


def in_worker(rank: int, world: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    try:
        for number, (settings, sharded) in enumerate(CASES):
            done = train_here(model, settings, sharded)
            torch.save(
                [t.detach() for t in trained_tensors(done.local_selector)],
                f"{folder}/weights{number}.{rank}",
            )
            Path(f"{folder}/metrics{number}.{rank}").write_text(
                json.dumps(done.metrics), encoding="utf-8"
            )
    finally:
        dist.destroy_process_group()


def train_here(model: str, settings: TrainingSettings, sharded: bool = False) -> Distilled:
    runtime = ModelRuntime.load(model)
    rows = tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    return distil(
        runtime, rows, learnable(make_rollouts(60, runtime.digest)), settings, sharded=sharded
    )


@pytest.mark.slow
def test_two_workers_train_what_one_does(models: dict[str, Path], tmp_path: Path) -> None:
    """The same batches, the same mean gradient: the same weights and figures, on both workers,
    whether each holds the whole SLM or half of every layer. Batches of one rollout leave a worker
    without a share."""
    mp.spawn(in_worker, (2, str(tmp_path), str(models["slm"])), nprocs=2)
    for number, (settings, _) in enumerate(CASES):
        alone = train_here(str(models["slm"]), settings)
        ranks = [
            torch.load(tmp_path / f"weights{number}.{rank}", weights_only=True) for rank in (0, 1)
        ]
        for ours, a, b in zip(trained_tensors(alone.local_selector), *ranks, strict=True):
            assert torch.equal(a, b) and torch.allclose(a, ours, rtol=1e-3, atol=2e-5)
        for rank in (0, 1):
            figures = json.loads((tmp_path / f"metrics{number}.{rank}").read_text(encoding="utf-8"))
            assert figures == pytest.approx(alone.metrics, rel=1e-3, abs=1e-4)


def resume_in_worker(rank: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    settings = TrainingSettings(steps=3, checkpoint_every=1, max_tokens=40)
    runtime = ModelRuntime.load(model)
    rollouts = make_rollouts(60, runtime.digest)
    try:
        distil(runtime, (), rollouts, settings, checkpoints=Path(folder) / str(rank))
    except RuntimeError as error:
        Path(f"{folder}/error.{rank}").write_text(str(error), encoding="utf-8")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_workers_that_stand_apart_are_told(models: dict[str, Path], tmp_path: Path) -> None:
    """A node that does not share the folder would train from another step: an error on all, before
    any step."""
    model = str(models["slm"])
    runtime = ModelRuntime.load(model)
    settings = TrainingSettings(steps=3, checkpoint_every=1, max_tokens=40)
    rollouts = make_rollouts(60, runtime.digest)
    distil(runtime, (), rollouts, settings, checkpoints=tmp_path / "0")
    mp.spawn(resume_in_worker, (str(tmp_path), model), nprocs=2)
    for rank in (0, 1):
        text = (tmp_path / f"error.{rank}").read_text(encoding="utf-8")
        assert "one is of step 3, one of step 0" in text and "share the folder" in text
