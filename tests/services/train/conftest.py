"""A tiny SLM and a lake of labels with a rule to learn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from s2t_shared.config import Config, load_config
from s2t_shared.labels.lake import Lake
from s2t_shared.model.runtime import ModelRuntime
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
