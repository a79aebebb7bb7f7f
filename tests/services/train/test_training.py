"""The training job: killed at any moment it loses nothing, workers change nothing, the gate judges
on unseen labels."""

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
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from s2t_shared.config import Config, TrainingConfig, load_config
from s2t_shared.errors import ConfigError, EvaluationSplitError, S2TError, StoreError, VersionError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.local_selector import Reading, Scoring, SelectorKind
from s2t_shared.model.runtime import ModelRuntime, resolve_model
from s2t_shared.model.tokenizer import Tokenizer, reserved_ids
from s2t_shared.training.checkpoints import load_checkpoint, save_checkpoint
from s2t_shared.training.objective import DistillSettings
from s2t_shared.training.trainer import Distilled, distil, trained_tensors
from s2t_shared.versions.gate import Verdict
from s2t_shared.versions.registry import Registry
from services.train.follow import trained_until
from services.train.gate_job import enact, judge_version, task_problems
from services.train.job import (
    Job,
    _close_job,
    _error_of,
    _open_job,
    _worker,
    distill_config,
    job_of,
    train,
    train_and_publish,
    unfinished_job,
)
from tests.helpers.rollouts import learnable, make_rollouts


@pytest.fixture()
def config(models: dict[str, Path], tmp_path: Path) -> Config:
    """A tiny SLM, and a lake of labels with a rule to learn."""
    folder = tmp_path / "slm"
    shutil.copytree(models["slm"], folder)
    made = load_config(
        overrides={
            "slm.model": str(folder),
            "data_dir": str(tmp_path / "data"),
            "training.steps": 60,
            "training.learning_rate": 1e-2,
            "training.checkpoint_every": 3,
            "training.batch_labels": 16,
        },
        environment={},
    )
    rollouts = learnable(make_rollouts(240, ModelRuntime.load(str(folder)).digest))
    for start in (0, 80, 160):
        Lake(made.lake).write(rollouts[start : start + 80], name=f"part{start}")
    return made


def job(config: Config) -> Job:
    return job_of(config, Lake(config.lake).freeze().id, ModelRuntime.load(config.slm.model).digest)


def with_training(config: Config, **values: object) -> Config:
    return Config.model_validate(
        config.model_dump() | {"training": config.training.model_dump() | values}
    )


# -- checkpoints and resume -----------------------------------------------------------------------

CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
from s2t_shared.config import Config
from services.train.job import Job, train_and_publish
config = Config.model_validate(json.loads(sys.argv[1]))
print(train_and_publish(config, Job(**json.loads(sys.argv[2])), True).version)
"""


def start(config: Config, task: Job) -> subprocess.Popen[str]:
    arguments = [json.dumps(config.model_dump(mode="json")), json.dumps(vars(task))]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )


def test_killed_at_any_moment_it_ends_with_the_same_weights(config: Config, tmp_path: Path) -> None:
    """kill -9 again and again, at random moments of training and publishing: the version that comes
    out in the end equals an undisturbed run's bit for bit, there is one of it, and nothing half
    done is left beside it."""
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
    ours, theirs = (
        registry.root / registry.names()[0],
        Registry(calm.versions).root / undisturbed.version,
    )
    for name in ("adapter_model.safetensors", "bins.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert registry.manifest(ours.name).metrics == undisturbed.metrics
    assert (ours / "curve.json").read_bytes() == (theirs / "curve.json").read_bytes()
    again = train_and_publish(
        config, task, publishes=True
    )  # killed after publishing: found, not made again
    assert again is not None and again.version == ours.name and registry.names() == [ours.name]


def _newest(config: Config, task: Job) -> int:
    return max((int(p.name[5:]) for p in task.folder(config).glob("step-*")), default=0)


def test_checkpoints_are_whole_or_not_there(tmp_path: Path) -> None:
    """A damaged newest one is passed over, a half-written one never counts, old ones go."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((4,), float(step))}, {"epoch": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = load_checkpoint(tmp_path)
    assert (
        found is not None
        and found.step == 3
        and found.state == {"epoch": 3}
        and found.tensors["w"].sum() == 12
    )
    (tmp_path / "step-00000003" / "tensors.safetensors").write_bytes(b"torn")
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2
    (tmp_path / ".step-00000003.of-a-writer-that-died.tmp").mkdir()
    save_checkpoint(tmp_path, 3, {"w": torch.zeros(1)}, {})
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 3 and not list(tmp_path.glob(".*"))
    (tmp_path / "step-00000003" / "state.json").unlink()
    (tmp_path / "step-00000002" / "state.json").write_text("[]", encoding="utf-8")
    assert load_checkpoint(tmp_path) is None


def test_a_folder_of_another_run_is_refused(config: Config, tmp_path: Path) -> None:
    """Two settings never share a checkpoint."""
    runtime = ModelRuntime.load(config.slm.model)
    rollouts = make_rollouts(60, runtime.digest)
    distil(runtime, (), rollouts, DistillSettings(steps=2), checkpoints=tmp_path / "c")
    with pytest.raises(ConfigError, match="another run"):
        distil(runtime, (), rollouts, DistillSettings(steps=2, seed=1), checkpoints=tmp_path / "c")


# -- workers --------------------------------------------------------------------------------------


CASES = [
    (
        DistillSettings(
            kind=kind,
            reads=reads,
            steps=8,
            batch_labels=4,
            max_tokens=40,
            learning_rate=1e-3,
            validate_every=4,
        ),
        sharded,
    )
    for kind, reads in ((SelectorKind.PREFIX, Reading.BASE), (SelectorKind.JOINT, Reading.ADAPTED))
    for sharded in (False, True)
]


def in_worker(rank: int, world: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    try:
        for number, (settings, sharded) in enumerate(CASES):
            done = train_here(model, settings, sharded)
            torch.save(
                [t.detach() for t in trained_tensors(done.selector)],
                f"{folder}/weights{number}.{rank}",
            )
            Path(f"{folder}/metrics{number}.{rank}").write_text(
                json.dumps(done.metrics), encoding="utf-8"
            )
    finally:
        dist.destroy_process_group()


def train_here(model: str, settings: DistillSettings, sharded: bool = False) -> Distilled:
    runtime = ModelRuntime.load(model)
    rows = tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))
    return distil(
        runtime, rows, learnable(make_rollouts(60, runtime.digest)), settings, sharded=sharded
    )


def test_two_workers_train_what_one_does(models: dict[str, Path], tmp_path: Path) -> None:
    """The same batches, the same mean gradient: the same weights and figures, on both workers,
    whether each holds the whole SLM or half of every layer. Batches of one tree leave a worker
    without a share."""
    mp.spawn(in_worker, (2, str(tmp_path), str(models["slm"])), nprocs=2)
    for number, (settings, _) in enumerate(CASES):
        alone = train_here(str(models["slm"]), settings)
        ranks = [
            torch.load(tmp_path / f"weights{number}.{rank}", weights_only=True) for rank in (0, 1)
        ]
        for ours, a, b in zip(trained_tensors(alone.selector), *ranks, strict=True):
            assert torch.equal(a, b) and torch.allclose(a, ours, rtol=1e-3, atol=2e-5)
        for rank in (0, 1):
            figures = json.loads((tmp_path / f"metrics{number}.{rank}").read_text(encoding="utf-8"))
            assert figures == pytest.approx(alone.metrics, rel=1e-3, abs=1e-4)


def resume_in_worker(rank: int, folder: str, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    settings, runtime = (
        DistillSettings(steps=3, checkpoint_every=1, max_tokens=40),
        ModelRuntime.load(model),
    )
    try:
        distil(
            runtime,
            (),
            make_rollouts(60, runtime.digest),
            settings,
            checkpoints=Path(folder) / str(rank),
        )
    except RuntimeError as error:
        Path(f"{folder}/error.{rank}").write_text(str(error), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def test_workers_that_stand_apart_are_told(models: dict[str, Path], tmp_path: Path) -> None:
    """A node that does not share the folder would train from another step: an error on all, before
    any step."""
    runtime, model = ModelRuntime.load(str(models["slm"])), str(models["slm"])
    distil(
        runtime,
        (),
        make_rollouts(60, runtime.digest),
        DistillSettings(steps=3, checkpoint_every=1, max_tokens=40),
        checkpoints=tmp_path / "0",
    )
    mp.spawn(resume_in_worker, (str(tmp_path), model), nprocs=2)
    for rank in (0, 1):
        text = (tmp_path / f"error.{rank}").read_text(encoding="utf-8")
        assert "one is of step 3, one of step 0" in text and "share the folder" in text


class Place:
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
    task = job(config)
    shutil.rmtree(config.lake / "snapshots")
    arguments = {"config": config.model_dump(mode="json"), "job": vars(task)}
    task.folder(config).mkdir(parents=True)
    for size in (1, 2):
        monkeypatch.setattr("ray.train.get_context", lambda size=size: Place(size))
        if size == 1:
            alone = _worker(arguments)
        else:
            with pytest.raises(StoreError, match="is gone"):
                _worker(arguments)
    noted = json.loads((task.folder(config) / "failure.json").read_text(encoding="utf-8"))
    assert (
        noted == alone
        and type(_error_of(noted)) is StoreError
        and "is gone" in str(_error_of(noted))
    )


# -- publication and the gate ---------------------------------------------------------------------


def test_the_job_publishes_what_it_trained(config: Config) -> None:
    """Labels of a lake become a version that loads, with its options, curve, plot and TensorBoard
    events."""
    config = with_training(
        config, kind="joint", steps=6, patience=99, scoring="binary", standardise=True, fusion=True
    )
    task = job(config)
    manifest = train_and_publish(config, task, publishes=True)
    assert manifest is not None and manifest.job == task.id and manifest.snapshot == task.snapshot
    assert manifest.training["steps"] == 6 == manifest.training["steps_done"]
    registry, runtime, tokenizer = (
        Registry(config.versions),
        ModelRuntime.load(config.slm.model),
        Tokenizer.load(resolve_model(config.slm.model)),
    )
    selector = registry.load(manifest.version, runtime, tokenizer.digest)
    assert selector.reserved_ids == reserved_ids(tokenizer, runtime.vocab_rows)
    assert (selector.scoring, selector.standardise) == (
        Scoring.BINARY,
        True,
    ) and manifest.fusion == selector.fusion
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


def test_a_job_is_what_decides_its_outcome(config: Config) -> None:
    """Other settings, labels or starting weights are another job; so are what rounds otherwise:
    workers, sharding, number format. What the gate wants is not."""
    first = job(config)
    assert job(config) == first == job(with_training(config, gate_min_problems=3))
    others = [
        with_training(config, **{name: value})
        for name, value in (("steps", 61), ("workers", 2), ("sharding", "fsdp"))
    ]
    others.append(
        config.model_copy(update={"slm": config.slm.model_copy(update={"dtype": "bfloat16"})})
    )
    assert len({first.id, *(job(other).id for other in others)}) == 5
    assert job_of(config, "another", "slm").id != job_of(config, "snapshot", "slm").id
    with pytest.raises(VersionError, match="v0009"):
        job(with_training(config, init_from="v0009-nothing"))
    assert (
        job(with_training(config, init_from="live")).id == first.id
    )  # nothing is live: from the beginning


def test_the_gate_lets_the_better_version_pass(config: Config, tmp_path: Path) -> None:
    """A version that learnt the rule beats the SLM alone; the same one again does not beat itself;
    one that learnt nothing is refused against it; each says why in numbers of unseen labels. Then
    training starts from the live one."""
    config = with_training(config, gate_min_problems=5)
    problems = tmp_path / "tasks.jsonl"
    rows = [
        {"id": f"t{i}", "prompt": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i}"} for i in range(6)
    ]
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
    """`reads: adapted` changes the language model on the contexts: beyond the bound it does not
    pass."""
    config = with_training(
        config, reads="adapted", steps=40, gate_min_problems=5, reg_weight=0.0, gate_max_lm_kl=1e-6
    )
    manifest = train_and_publish(config, job(config), publishes=True)
    assert manifest is not None
    verdict = judge(config, manifest.version)
    assert not verdict.passed and any("LM-KL" in reason for reason in verdict.reasons)


def test_an_unfinished_job_is_found_again(config: Config) -> None:
    """What a killed command left is what the next one does, though labels came since; with other
    settings it is not, nor once it is done, nor when its snapshot is gone."""
    config = with_training(config, steps=6)
    task = _open_job(config, print)
    assert unfinished_job(config) is None  # nothing is lost yet
    assert train_and_publish(config, task, publishes=True) is not None  # and killed before the gate
    Lake(config.lake).write(
        learnable(make_rollouts(250, ModelRuntime.load(config.slm.model).digest))[240:]
    )
    assert unfinished_job(config) == task == _open_job(config, print)
    assert unfinished_job(with_training(config, steps=7)) is None
    _close_job(config, task)
    assert unfinished_job(config) is None and _open_job(config, print) != task
    assert (
        not list(task.folder(config).glob("step-*"))
        and (task.folder(config) / "tensorboard").is_dir()
    )
    (task.folder(config) / "job.json").write_text(json.dumps(vars(task)), encoding="utf-8")
    assert unfinished_job(config) == task
    shutil.rmtree(config.lake / "snapshots" / task.snapshot)
    assert unfinished_job(config) is None


def test_what_is_new_is_newer_than_what_was_trained_on(config: Config) -> None:
    """Neither a pruned or rewritten lake nor a snapshot that is gone makes labels new that were
    trained on."""
    config, lake = with_training(config, steps=3), Lake(config.lake)
    assert trained_until(config) == 0.0 and lake.labels_since(0.0) == 720
    task = job(config)
    assert train_and_publish(config, task, publishes=True) is not None
    assert trained_until(config) == 240.0 and lake.labels_since(trained_until(config)) == 0
    lake.write(
        learnable(make_rollouts(250, ModelRuntime.load(config.slm.model).digest))[235:]
    )  # five come again
    shutil.rmtree(lake.root / "snapshots")
    assert lake.compact(2) and lake.labels_since(trained_until(config)) == 30


def test_a_lake_of_several_llms_trains_on_one_and_says_so(config: Config) -> None:
    digest = ModelRuntime.load(config.slm.model).digest
    Lake(config.lake).write(
        [
            replace(r, rollout_id=f"other-{r.rollout_id}", llm_digest="other")
            for r in make_rollouts(5, digest)
        ]
    )
    config = with_training(config, steps=2)
    manifest = train_and_publish(config, job(config), publishes=True)
    assert (
        manifest is not None
        and manifest.llm_digest == "llm"
        and manifest.training["skipped_labels"] == 15
    )


def test_closing_a_job_clears_what_is_past(config: Config) -> None:
    """Checkpoints of older and of closed jobs go; those of a later or a running one stay."""
    folders = {}
    for age, name in enumerate(("running", "later", "ours", "older", "closed")):
        task = Job(name, "", "")
        folders[name] = task.folder(config)
        (folders[name] / "step-00000003").mkdir(parents=True)
        (folders[name] / ".lock").touch()
        if name != "closed":
            (folders[name] / "job.json").touch()
            os.utime(folders[name] / "job.json", (1000 - age, 1000 - age))
    os.utime(folders["running"] / "job.json", (1, 1))
    with (folders["running"] / ".lock").open("w") as stream:
        flock(stream, LOCK_EX)
        _close_job(config, Job("ours", "", ""))
    assert {name for name, folder in folders.items() if list(folder.glob("step-*"))} == {
        "running",
        "later",
    }
    assert not (folders["ours"] / "job.json").exists() and (folders["later"] / "job.json").exists()


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (StoreError("disk full"), True),
        (S2TError("workers died"), True),
        (ConfigError("another SLM"), False),
    ],
)
def test_what_the_surroundings_break_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, error: S2TError, stays: bool
) -> None:
    """The job's note outlives a full disk and dead workers, not what is wrong with the settings or
    the labels."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("services.train.job._run", fail)
    with pytest.raises(type(error)):
        train(config)
    assert (job(config).folder(config) / "job.json").exists() == stays


def test_automatic_promotion_respects_the_operator(config: Config) -> None:
    """A version that was taken back stays back, and a canary on trial stays alone, until the
    operator says so."""
    config = with_training(config, steps=2)
    first, second = (
        train_and_publish(c, job(c), publishes=True)
        for c in (config, with_training(config, seed=1))
    )
    assert first is not None and second is not None
    registry, passed = Registry(config.versions), Verdict(True, ("better",))
    assert (
        enact(registry, first.version, passed, promote=False) == (False, "better")
        and registry.live() is None
    )
    assert enact(registry, first.version, passed) == (True, "better")
    assert enact(registry, second.version, passed)[0] and registry.rollback() == first.version
    registry.record(second.version, passed)
    promoted, reason = enact(registry, second.version, passed)
    assert not promoted and registry.live() == first.version
    assert (
        reason.startswith("not promoted: it was rolled back")
        and f"s2t versions promote {second.version}" in reason
    )
    registry.promote(second.version, 0.1)
    state = registry.state()
    for version in (first.version, second.version):
        promoted, reason = enact(registry, version, passed)
        assert not promoted and "canary" in reason and registry.state() == state
    registry.promote(second.version)  # the operator's last word
    registry.promote(first.version)
    assert (
        enact(registry, second.version, passed) == (True, "better")
        and registry.live() == second.version
    )
    assert enact(registry, first.version, Verdict(False, ("worse",))) == (
        False,
        "not promoted: worse",
    )


@pytest.mark.parametrize(("name", "split"), [("test.jsonl", "train"), ("tasks.jsonl", "test")])
def test_the_gate_refuses_evaluation_problems(
    config: Config, tmp_path: Path, name: str, split: str
) -> None:
    """By file name and by row, and before any training."""
    row = {"id": "t", "prompt": "w1 w2", "answer": "w1", "split": split}
    (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    config = with_training(config, gate_problems=str(tmp_path / name))
    for call in (task_problems, train):
        with pytest.raises(EvaluationSplitError):
            call(config)


def test_settings_agree_with_the_trainer() -> None:
    """Every setting of the loss and the loop can be configured, with the same default;
    contradictions are refused."""
    assert distill_config(TrainingConfig()) == DistillSettings()
    with pytest.raises(ConfigError, match="kind prefix"):
        distill_config(TrainingConfig(standardise=True))
