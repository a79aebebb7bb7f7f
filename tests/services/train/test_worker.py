"""A training worker: killed at any moment it loses nothing; it publishes what it trained."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from s2t_shared.config import Config
from s2t_shared.errors import StoreError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.folders import resolve_model
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.model.tokenizer import Tokenizer
from s2t_shared.model.vocabulary import reserved_ids
from s2t_shared.types import Scoring
from s2t_shared.versions.registry import Registry
from services.train.jobs import Job
from services.train.progress import error_of
from services.train.worker import run_worker, train_and_publish
from tests.faults.figures import sizes
from tests.helpers.rollouts import make_rollouts
from tests.helpers.training_job import job_now, with_training

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from s2t_shared.config import Config
from services.train.jobs import Job
from services.train.worker import train_and_publish
config = Config.model_validate(json.loads(sys.argv[1]))
print(train_and_publish(config, Job(**json.loads(sys.argv[2])), True).version)
"""


def start(config: Config, job: Job) -> subprocess.Popen[str]:
    arguments = [json.dumps(config.model_dump(mode="json")), json.dumps(vars(job))]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize("wanted", sizes([2], [6]))
def test_killed_at_any_moment_it_ends_with_the_same_weights(
    config: Config, tmp_path: Path, wanted: int
) -> None:
    """kill -9 again and again, at random moments of training and publishing: the version that comes
    out in the end equals an undisturbed run's bit for bit, there is one of it, and nothing half
    done is left beside it."""
    config = with_training(config, kind="joint", steps=30 * wanted)
    task = job_now(config)
    calm = config.model_copy(update={"data_dir": tmp_path / "calm"})
    shutil.copytree(config.lake, calm.lake)
    undisturbed = train_and_publish(calm, task, publishes=True)
    assert undisturbed is not None
    chance, kills, steps = random.Random(1), 0, set()
    while True:
        process = start(config, task)
        seen, limit = _newest(config, task), chance.choice([3, 9, 15, 27])
        while process.poll() is None and _newest(config, task) <= seen + limit and kills < wanted:
            time.sleep(0.002)
        if process.poll() is None and kills < wanted:
            time.sleep(chance.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            kills += 1
            steps.add(_newest(config, task))
        if process.wait() == 0:
            break
    assert kills == wanted and len(steps) >= 2, (kills, steps)
    registry = Registry(config.versions)
    assert len(registry.names()) == 1
    ours = registry.root / registry.names()[0]
    theirs = Registry(calm.versions).root / undisturbed.version
    for name in ("adapter_model.safetensors", "bins.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert registry.manifest(ours.name).metrics == undisturbed.metrics
    assert (ours / "curve.json").read_bytes() == (theirs / "curve.json").read_bytes()
    # Killed after publishing: found, not made again.
    again = train_and_publish(config, task, publishes=True)
    assert again is not None and again.version == ours.name and registry.names() == [ours.name]


def _newest(config: Config, job: Job) -> int:
    return max((int(p.name[5:]) for p in job.folder(config).glob("step-*")), default=0)


class WorkerContext:
    """One of `size` training workers, as Ray Train tells it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_world_rank(self) -> int:
        return self.size - 1

    def get_world_size(self) -> int:
        return self.size


def test_an_error_among_workers_stops_them_all_and_is_not_lost(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it is the return value; among several it is raised, and its text and kind are in the
    job's folder."""
    task = job_now(config)
    shutil.rmtree(config.lake / "snapshots")
    arguments = {"config": config.model_dump(mode="json"), "job": vars(task)}
    task.folder(config).mkdir(parents=True)
    for size in (1, 2):
        monkeypatch.setattr("ray.train.get_context", lambda size=size: WorkerContext(size))
        if size == 1:
            alone = run_worker(arguments)
        else:
            with pytest.raises(StoreError, match="is gone"):
                run_worker(arguments)
    noted = json.loads((task.folder(config) / "failure.json").read_text(encoding="utf-8"))
    assert noted == alone
    assert type(error_of(noted)) is StoreError and "is gone" in str(error_of(noted))


def test_the_job_publishes_what_it_trained(config: Config) -> None:
    """Labels of a lake become a version that loads, with its options, curve, plot and TensorBoard
    events."""
    config = with_training(
        config, kind="joint", steps=6, patience=99, scoring="binary", standardise=True, fusion=True
    )
    task = job_now(config)
    manifest = train_and_publish(config, task, publishes=True)
    assert manifest is not None and manifest.job == task.id and manifest.snapshot == task.snapshot
    assert manifest.training["steps"] == 6 == manifest.training["steps_done"]
    registry = Registry(config.versions)
    runtime = ModelRuntime.load(config.slm.model)
    tokenizer = Tokenizer.load(resolve_model(config.slm.model))
    local = registry.load(manifest.version, runtime, tokenizer.digest)
    assert local.reserved_ids == reserved_ids(tokenizer, runtime.vocab_rows)
    assert (local.scoring, local.standardise) == (Scoring.BINARY, True)
    assert manifest.fusion == local.fusion
    folder = registry.folder(manifest.version)
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    assert [p["step"] for p in curve] == list(range(7)) and curve[0]["train_loss"] is None
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(task.folder(config) / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/training")] == list(range(1, 7))
    assert events.Scalars("agree_at_1/validation")[-1].value == pytest.approx(
        curve[-1]["agree_at_1"]
    )


def test_a_lake_of_several_llms_trains_on_one_and_says_so(config: Config) -> None:
    digest = ModelRuntime.load(config.slm.model).digest
    others = []
    for rollout in make_rollouts(5, digest):
        name = f"other-{rollout.rollout_id}"
        others.append(replace(rollout, rollout_id=name, llm_digest="other"))
    Lake(config.lake).write(others)
    config = with_training(config, steps=2)
    manifest = train_and_publish(config, job_now(config), publishes=True)
    assert manifest is not None and manifest.llm_digest == "llm"
    assert manifest.training["skipped_labels"] == 15
