"""What counts as new labels."""

from __future__ import annotations

import shutil

from s2t_shared.config import Config
from s2t_shared.labels.lake import Lake
from s2t_shared.model.runtime import ModelRuntime
from services.train.follow import trained_until
from services.train.worker import train_and_publish
from tests.helpers.rollouts import learnable, make_rollouts
from tests.helpers.training_job import job_now, with_training


def test_what_is_new_is_newer_than_what_was_trained_on(config: Config) -> None:
    """Neither a pruned or rewritten lake nor a snapshot that is gone makes labels new that were
    trained on."""
    config, lake = with_training(config, steps=3), Lake(config.lake)
    assert trained_until(config) == 0.0 and lake.labels_since(0.0) == 720
    task = job_now(config)
    assert train_and_publish(config, task, publishes=True) is not None
    assert trained_until(config) == 240.0 and lake.labels_since(trained_until(config)) == 0
    lake.write(
        learnable(make_rollouts(250, ModelRuntime.load(config.slm.model).digest))[235:]
    )  # five come again
    shutil.rmtree(lake.root / "snapshots")
    assert lake.compact(2) and lake.labels_since(trained_until(config)) == 30
