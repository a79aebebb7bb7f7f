"""Fixtures for tests of published versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.versions.live import LiveVersions
from s2t_shared.versions.registry import Registry


@pytest.fixture(scope="package")
def runtime(models: dict[str, Path]) -> ModelRuntime:
    return ModelRuntime.load(str(models["slm"]))


@pytest.fixture
def versions(tmp_path: Path) -> LiveVersions:
    return LiveVersions(tmp_path / "versions")


@pytest.fixture
def registry(versions: LiveVersions) -> Registry:
    return versions.registry
