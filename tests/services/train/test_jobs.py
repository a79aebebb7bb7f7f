"""Which job is done: its identity, finding it again, closing it."""

from __future__ import annotations

import json
import os
import shutil
from fcntl import LOCK_EX, flock

import pytest

from s2t_shared.config import Config
from s2t_shared.errors import VersionError
from s2t_shared.labels.lake import Lake
from s2t_shared.model.runtime import ModelRuntime
from services.train.jobs import Job, close_job, job_of, open_job, unfinished_job
from services.train.worker import train_and_publish
from tests.helpers.rollouts import learnable, make_rollouts
from tests.helpers.training_job import job_now, with_training


def test_a_job_is_what_decides_its_outcome(config: Config) -> None:
    """Other settings, labels or starting weights are another job; so are what rounds otherwise:
    workers, sharding, number format. What the gate wants is not."""
    first = job_now(config)
    assert job_now(config) == first == job_now(with_training(config, gate_min_groups=3))
    bfloat16 = config.slm.model_copy(update={"dtype": "bfloat16"})
    others = [
        with_training(config, steps=61),
        with_training(config, workers=2),
        with_training(config, sharding="fsdp"),
        config.model_copy(update={"slm": bfloat16}),
    ]
    assert len({first.id, *(job_now(other).id for other in others)}) == 5
    assert job_of(config, "another", "slm").id != job_of(config, "snapshot", "slm").id
    with pytest.raises(VersionError, match="v0009"):
        job_now(with_training(config, init_from="v0009-nothing"))
    # Nothing is live: from the beginning.
    assert job_now(with_training(config, init_from="live")).id == first.id


def test_an_unfinished_job_is_found_again(config: Config) -> None:
    """What a killed command left is what the next one does, though labels came since; with other
    settings it is not, nor once it is done, nor when its snapshot is gone."""
    config = with_training(config, steps=6)
    task = open_job(config, print)
    assert unfinished_job(config) is None  # nothing is lost yet
    assert train_and_publish(config, task, publishes=True) is not None  # and killed before the gate
    Lake(config.lake).write(
        learnable(make_rollouts(250, ModelRuntime.load(config.slm.model).digest))[240:]
    )
    assert unfinished_job(config) == task == open_job(config, print)
    assert unfinished_job(with_training(config, steps=7)) is None
    close_job(config, task)
    assert unfinished_job(config) is None and open_job(config, print) != task
    assert not list(task.folder(config).glob("step-*"))
    assert (task.folder(config) / "tensorboard").is_dir()
    (task.folder(config) / "job.json").write_text(json.dumps(vars(task)), encoding="utf-8")
    assert unfinished_job(config) == task
    shutil.rmtree(config.lake / "snapshots" / task.snapshot)
    assert unfinished_job(config) is None


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
        close_job(config, Job("ours", "", ""))
    assert {name for name, folder in folders.items() if list(folder.glob("step-*"))} == {
        "running",
        "later",
    }
    assert not (folders["ours"] / "job.json").exists() and (folders["later"] / "job.json").exists()
    close_job(config, Job("ours", "", ""))  # once more, as another command may have done
