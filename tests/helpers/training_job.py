"""Training jobs over a small lake, for the tests of `services.train`."""

from __future__ import annotations

from s2t_shared.config import Config
from s2t_shared.labels.lake import Lake
from s2t_shared.model.runtime import ModelRuntime
from services.train.jobs import Job, job_of


def job_now(config: Config) -> Job:
    return job_of(config, Lake(config.lake).freeze().id, ModelRuntime.load(config.slm.model).digest)


def with_training(config: Config, **values: object) -> Config:
    return Config.model_validate(
        config.model_dump() | {"training": config.training.model_dump() | values}
    )
