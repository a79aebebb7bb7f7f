"""The training job: killed at any moment it loses nothing, workers change nothing, the gate judges on unseen labels."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from s2t_shared.checkpoints import load_checkpoint, save_checkpoint
from s2t_shared.config import Config, TrainingConfig, load_config
from s2t_shared.distill import Distilled, distil, trained_tensors
from s2t_shared.errors import ConfigError, VersionError
from s2t_shared.lake import Lake
from s2t_shared.local_selector import Reading, Scoring, SelectorKind
from s2t_shared.objective import DistillConfig
from s2t_shared.registry import Registry
from s2t_shared.runtime import ModelRuntime
from s2t_shared.text import Tokenizer, reserved_ids
from services.follow import labels_in, trained_labels
from services.promotion import judge_version
from services.training import (
    Job,
    TrainProgress,
    _close_job,
    _open_job,
    distill_config,
    job_of,
    train_and_publish,
    unfinished_job,
)
from services.training_command import training_progress
from tests.rollouts import learnable, make_rollouts


@pytest.fixture()
def config(models: dict[str, Path], tmp_path: Path) -> Config:
    """A tiny SLM, and a lake of labels with a rule to learn."""
    folder = tmp_path / "slm"
    shutil.copytree(models["slm"], folder)
    made = load_config(overrides={"slm.model": str(folder), "data_dir": str(tmp_path / "data"), "training.steps": 60,
                                  "training.learning_rate": 1e-2, "training.checkpoint_every": 3,
                                  "training.batch_labels": 16}, environment={})
    rollouts = learnable(make_rollouts(240, ModelRuntime.load(str(folder)).digest))
    for start in (0, 80, 160):
        Lake(made.lake).write(rollouts[start: start + 80], name=f"part{start}")
    return made


def job(config: Config) -> Job:
    return job_of(config, Lake(config.lake).freeze().id, ModelRuntime.load(config.slm_model).digest)


def with_training(config: Config, **values: object) -> Config:
    return Config.model_validate(config.model_dump() | {"training": config.training.model_dump() | values})


# -- checkpoints and resume ---------------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from s2t_shared.config import Config
from services.training import Job, train_and_publish
config = Config.model_validate(json.loads(sys.argv[1]))
print(train_and_publish(config, Job(**json.loads(sys.argv[2])), True).version)
"""


def start(config: Config, task: Job) -> subprocess.Popen[str]:
    arguments = [json.dumps(config.model_dump(mode="json")), json.dumps(vars(task))]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"})


def test_killed_at_any_moment_it_ends_with_the_same_weights(config: Config, tmp_path: Path) -> None:
    """kill -9 again and again, at random moments of training and publishing: the version that comes out in the end
    equals an undisturbed run's bit for bit, there is one of it, and nothing half done is left beside it."""
    config = with_training(config, kind="joint", steps=90)
    task = job(config)
    calm = config.model_copy(update={"data_dir": tmp_path / "calm"})
    shutil.copytree(config.lake, calm.lake)
    undisturbed = train_and_publish(calm, task, publishes=True)
    assert undisturbed is not None
    chance, kills, steps = random.Random(1), 0, set()
    while True:
        process = start(config, task)
        seen, limit = _newest(config, task), chance.choice([3, 9, 15, 27])
        while process.poll() is None and _newest(config, task) <= seen + limit and kills < 4:
            time.sleep(0.002)
        if process.poll() is None and kills < 4:
            time.sleep(chance.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            kills += 1
            steps.add(_newest(config, task))
        if process.wait() == 0:
            break
    assert kills == 4 and len(steps) >= 3, (kills, steps)
    registry = Registry(config.versions)
    assert len(registry.names()) == 1
    ours, theirs = registry.root / registry.names()[0], Registry(calm.versions).root / undisturbed.version
    for name in ("adapter_model.safetensors", "bins.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert registry.manifest(ours.name).metrics == undisturbed.metrics
    assert (ours / "curve.json").read_bytes() == (theirs / "curve.json").read_bytes()
    again = train_and_publish(config, task, publishes=True)  # killed after publishing: found, not made again
    assert again is not None and again.version == ours.name and registry.names() == [ours.name]


def _newest(config: Config, task: Job) -> int:
    return max((int(p.name[5:]) for p in task.folder(config).glob("step-*")), default=0)


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    """A damaged newest one is passed over, a half-written one never counts, old ones go."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((4,), float(step))}, {"epoch": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 3 and found.state == {"epoch": 3} and found.tensors["w"].sum() == 12
    (tmp_path / "step-00000003" / "tensors.safetensors").write_bytes(b"torn")
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2
    (tmp_path / ".writing").mkdir()
    save_checkpoint(tmp_path, 3, {"w": torch.zeros(1)}, {})
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 3 and not (tmp_path / ".writing").exists()
    (tmp_path / "step-00000003" / "state.json").unlink()
    (tmp_path / "step-00000002" / "state.json").write_text("[]", encoding="utf-8")
    assert load_checkpoint(tmp_path) is None


def test_a_folder_of_another_run_is_refused(config: Config, tmp_path: Path) -> None:
    """Two settings never share a checkpoint."""
    runtime = ModelRuntime.load(config.slm_model)
    rollouts = make_rollouts(60, runtime.digest)
    distil(runtime, (), rollouts, DistillConfig(steps=2), checkpoints=tmp_path / "c")
    with pytest.raises(ConfigError, match="another run"):
        distil(runtime, (), rollouts, DistillConfig(steps=2, seed=1), checkpoints=tmp_path / "c")


# -- workers ------------------------------------------------------------------------------------------------------


CASES = [(DistillConfig(kind, reads, steps=8, batch_labels=4, max_tokens=40, learning_rate=1e-3, validate_every=4),
          sharded)
         for kind, reads in ((SelectorKind.PREFIX, Reading.BASE), (SelectorKind.JOINT, Reading.ADAPTED))
         for sharded in (False, True)]


def in_worker(rank: int, world: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        for number, (settings, sharded) in enumerate(CASES):
            done = train_here(model, settings, sharded)
            torch.save([t.detach() for t in trained_tensors(done.selector)], f"{folder}/weights{number}.{rank}")
            Path(f"{folder}/metrics{number}.{rank}").write_text(json.dumps(done.metrics), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def train_here(model: str, settings: DistillConfig, sharded: bool = False) -> Distilled:
    runtime = ModelRuntime.load(model)
    rows = tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    return distil(runtime, rows, learnable(make_rollouts(60, runtime.digest)), settings, sharded=sharded)


def test_two_workers_train_what_one_does(models: dict[str, Path], tmp_path: Path) -> None:
    """The same batches, the same mean gradient: the same weights and figures, on both workers, whether each holds the
    whole SLM or half of every layer. Batches of one tree leave a worker without a share."""
    mp.spawn(in_worker, (2, str(tmp_path), str(models["slm"])), nprocs=2)
    for number, (settings, _) in enumerate(CASES):
        alone = train_here(str(models["slm"]), settings)
        ranks = [torch.load(tmp_path / f"weights{number}.{rank}", weights_only=True) for rank in (0, 1)]
        for ours, a, b in zip(trained_tensors(alone.selector), *ranks, strict=True):
            assert torch.equal(a, b) and torch.allclose(a, ours, rtol=1e-3, atol=2e-5)
        for rank in (0, 1):
            figures = json.loads((tmp_path / f"metrics{number}.{rank}").read_text(encoding="utf-8"))
            assert figures == pytest.approx(alone.metrics, rel=1e-3, abs=1e-4)


# -- publication and the gate -------------------------------------------------------------------------------------


def test_the_job_publishes_what_it_trained(config: Config) -> None:
    """Labels of a lake become a version that loads, with its options, curve, plot and TensorBoard events."""
    config = with_training(config, kind="joint", steps=6, patience=99, scoring="binary", standardise=True,
                           fusion=True)
    task = job(config)
    manifest = train_and_publish(config, task, publishes=True)
    assert manifest is not None and manifest.job == task.id and manifest.snapshot == task.snapshot
    assert manifest.training["steps"] == 6 == manifest.training["steps_done"]
    registry, runtime, tokenizer = (Registry(config.versions), ModelRuntime.load(config.slm_model),
                                    Tokenizer.load(Path(config.slm_model)))
    selector = registry.load(manifest.version, runtime, tokenizer.digest)
    assert selector.reserved_ids == reserved_ids(tokenizer, runtime.vocab_rows)
    assert (selector.scoring, selector.standardise) == (Scoring.BINARY, True) and manifest.fusion == selector.fusion
    folder = registry.folder(manifest.version)
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    assert [p["step"] for p in curve] == list(range(7)) and curve[0]["train_loss"] is None
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(task.folder(config) / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/training")] == list(range(1, 7))
    assert events.Scalars("agree_at_1/validation")[-1].value == pytest.approx(curve[-1]["agree_at_1"])


def test_a_job_is_what_decides_its_outcome(config: Config) -> None:
    """Other settings, labels or starting weights are another job; the number of workers is not."""
    first = job(config)
    assert job(config) == first == job(with_training(config, workers=2, gate_min_problems=3))
    assert job(with_training(config, steps=61)).id != first.id
    assert job_of(config, "another", "slm").id != job_of(config, "snapshot", "slm").id
    with pytest.raises(VersionError, match="v0009"):
        job(with_training(config, init_from="v0009-nothing"))
    assert job(with_training(config, init_from="live")).id == first.id  # nothing is live: from the beginning


def test_the_gate_lets_the_better_version_pass(config: Config, tmp_path: Path) -> None:
    """A version that learnt the rule beats the SLM alone; the same one again does not beat itself; one that learnt
    nothing is refused against it; each says why in numbers of unseen labels. Then training starts from the live one."""
    config = with_training(config, gate_min_problems=5)
    problems = tmp_path / "tasks.jsonl"
    rows = [{"id": f"t{i}", "prompt": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i}"} for i in range(6)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    good = train_and_publish(config, job(config), publishes=True)
    assert good is not None
    verdict = judge(with_training(config, gate_problems=str(problems)), good.version)
    assert verdict.passed, verdict.reasons
    assert "Agree@1" in verdict.reasons[0] and "the SLM alone" in verdict.reasons[0]
    assert verdict.figures["task_problems"] == 6
    assert verdict.figures["agree_at_1"] == pytest.approx(good.metrics["agree_at_1"])
    registry = Registry(config.versions)
    registry.promote(good.version)
    poor = with_training(config, learning_rate=1e-9, steps=1)
    nothing = train_and_publish(poor, job(poor), publishes=True)
    assert nothing is not None
    refused = judge(poor, nothing.version)
    assert not refused.passed and good.version in refused.reasons[0]
    assert not judge(config, good.version).passed
    more = with_training(config, init_from="live", learning_rate=1e-9, steps=1)
    from_live = train_and_publish(more, job(more), publishes=True)
    assert from_live is not None and from_live.training["init_from"] == good.version
    assert from_live.metrics["agree_at_1"] == pytest.approx(good.metrics["agree_at_1"])


def judge(config: Config, version: str) -> Any:
    return judge_version(config, version, distill_config(config.training), "cpu")


def test_the_gate_bounds_what_the_adapter_does_to_the_model(config: Config) -> None:
    """`reads: adapted` changes the language model on the contexts: beyond the bound it does not pass."""
    config = with_training(config, reads="adapted", steps=40, gate_min_problems=5, reg_weight=0.0, gate_max_lm_kl=1e-6)
    manifest = train_and_publish(config, job(config), publishes=True)
    assert manifest is not None
    verdict = judge(config, manifest.version)
    assert not verdict.passed and any("LM-KL" in reason for reason in verdict.reasons)


def test_an_unfinished_job_is_found_again(config: Config) -> None:
    """What a killed command left is what the next one does, though labels came since; with other settings it is not,
    nor once it is done, nor when its snapshot is gone."""
    config = with_training(config, steps=6)
    task = _open_job(config, print)
    assert unfinished_job(config) is None  # nothing is lost yet
    assert train_and_publish(config, task, publishes=True) is not None  # and killed before the gate
    Lake(config.lake).write(learnable(make_rollouts(250, ModelRuntime.load(config.slm_model).digest))[240:])
    assert unfinished_job(config) == task == _open_job(config, print)
    assert unfinished_job(with_training(config, steps=7)) is None
    assert labels_in(config.lake) == 750 and trained_labels(config) == 720
    _close_job(config, task)
    assert unfinished_job(config) is None and _open_job(config, print) != task
    assert not list(task.folder(config).glob("step-*")) and (task.folder(config) / "tensorboard").is_dir()
    (task.folder(config) / "job.json").write_text(json.dumps(vars(task)), encoding="utf-8")
    assert unfinished_job(config) == task
    shutil.rmtree(config.lake / "snapshots" / task.snapshot)
    assert unfinished_job(config) is None


def test_settings_agree_with_the_trainer() -> None:
    """Every setting of the loss and the loop can be configured, with the same default; contradictions are refused."""
    assert distill_config(TrainingConfig()) == DistillConfig()
    with pytest.raises(ConfigError, match="kind prefix"):
        distill_config(TrainingConfig(standardise=True))




def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Loss, Agree@1 and the time left, at the latest with the last step; nothing where the output is for machines."""
    with training_progress(quiet=False) as advance:
        advance(TrainProgress(5, 10, 1.25, 1.5, 0.625))
        advance(TrainProgress(10, 10, 1.0, 1.5, 0.75))
    assert capsys.readouterr().err == ("s2t: step 10 of 10: loss 1.000, validation loss 1.500, Agree@1 0.750, about "
                                       "0 s left\n")
    with training_progress(quiet=True) as advance:
        advance(TrainProgress(10, 10, 1.0, 1.5, 0.75))
    assert capsys.readouterr().err == ""
