"""The tiny SLM, ready to be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.model.runtime import ModelRuntime


@pytest.fixture()
def runtime(models: dict[str, Path]) -> ModelRuntime:
    loaded = ModelRuntime.load(str(models["slm"]))
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    return loaded
