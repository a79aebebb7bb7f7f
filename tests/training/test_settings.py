"""The settings of training: what contradicts, what decides the weights, what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from s2t_shared.config import load_config
from s2t_shared.errors import ConfigError
from s2t_shared.training.settings import GATE, WORKERS, Objective, TrainingSettings
from s2t_shared.types import Reading, Scoring


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.reads=adapted"):
        TrainingSettings(objective=Objective.PLAIN)
    with pytest.raises(ConfigError, match="kind prefix"):
        TrainingSettings(standardise=True)
    with pytest.raises(ConfigError, match="kind prefix"):
        TrainingSettings(scoring=Scoring.BINARY)
    with pytest.raises(ConfigError, match="kind prefix"):
        load_config(overrides={"training.standardise": True}, environment={})


def test_every_setting_is_described() -> None:
    """`description` is what a reader of the configuration has; there is no second text."""
    fields = TrainingSettings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_only_what_decides_the_weights_makes_another_run() -> None:
    """Workers and gate are left out, and the name of the version that training starts from."""
    names = set(TrainingSettings().of_weights())
    assert names == set(TrainingSettings.model_fields) - {*WORKERS, *GATE, "init_from"}
    assert {name for name in TrainingSettings.model_fields if name.startswith("gate_")} == set(GATE)


def test_keys_are_the_same_in_file_environment_and_overrides() -> None:
    environment = {"S2T_TRAINING__GATE_BUDGET": "0.2", "S2T_TRAINING__READS": "adapted"}
    settings = load_config(None, {"training.workers": 3}, environment).training
    assert (settings.gate_budget, settings.reads, settings.workers) == (0.2, Reading.ADAPTED, 3)


def test_settings_are_read_without_torch() -> None:
    """A client or a command that only reads the configuration starts fast."""
    code = "import sys, s2t_shared.config; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
