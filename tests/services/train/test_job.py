"""The whole job: what ends it, and what the next command goes on with."""

from __future__ import annotations

import pytest

from s2t_shared.config import Config
from s2t_shared.errors import ConfigError, S2TError, StoreError
from services.train.job import train
from tests.helpers.training_job import job_now


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
    assert (job_now(config).folder(config) / "job.json").exists() == stays
