"""Shared by all tests: one thread per process, nothing from the network, and the tiny models."""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.helpers.models import build_models  # noqa: E402

pytest_plugins = [
    "tests.helpers.redis",
    "tests.helpers.lake",
    "tests.helpers.object_store",
    "tests.helpers.scored_rollouts",
]
torch.set_num_threads(1)
# The same examples on every run, and no time limit on a busy machine: a red test means changed
# code.
settings.register_profile("s2t", derandomize=True, deadline=None, database=None)
settings.load_profile("s2t")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny random models, by their name in `tests.helpers.models.SPECS`."""
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """What earlier tests ran may have set more: on a busy machine threads wait for each other
    longer than they work."""
    torch.set_num_threads(1)
