"""A lake in object storage (moto): the service writes to it, training and the gate read from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.config import Config, load_config
from s2t_shared.errors import ConfigError
from s2t_shared.labels.known_models import KnownModels, Models
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.object_lake import ObjectLake, open_lake
from s2t_shared.labels.stream import LabelStream
from services.serve.build_gateway import label_drain
from services.train.jobs import open_job
from services.train.worker import train_and_publish
from tests.helpers.training_job import with_training


def test_from_the_drain_to_a_version(
    config: Config, bucket: str, tmp_path: Path, store: LabelStream
) -> None:
    """Every place that opened `data_dir/labels` by itself would train on nothing."""
    labels = config.labels.model_copy(update={"lake": f"{bucket}/lake"})
    rollouts = list(Lake(Path(config.lake)).rollouts())
    config = with_training(config, steps=3).model_copy(update={"labels": labels})
    known = KnownModels(config.known_models)
    for models in {Models.of(rollout) for rollout in rollouts}:
        known.add(models)
    store.append([rollout.to_json().encode() for rollout in rollouts])
    lake = open_lake(config.lake)
    assert isinstance(lake, ObjectLake)
    drain = label_drain(config, store, lake)
    drain.flush()
    assert sum(shard.rollouts for shard in lake.shards()) == len(rollouts) == 240
    job = open_job(config, print)
    manifest = train_and_publish(config, job, publishes=True)
    assert manifest is not None and manifest.snapshot == lake.freeze().id


def test_a_lake_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="labels.lake"):
        load_config(None, {"labels.lake": "/a/folder"}, {})
