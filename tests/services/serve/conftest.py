"""One real service for this package's Ray tests: gateway, proposer, selector, Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from s2t_shared.bundled import LLM_DIR, SLM_DIR, problems
from s2t_shared.config import load_config
from s2t_shared.pair import Pair
from services.client import Client
from services.launch.local import RunningService, running_service


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    config = load_config(
        overrides={
            "data_dir": str(tmp_path_factory.mktemp("data")),
            "gateway.port": 0,
            "training.learning_rate": 3e-3,
            "defaults.answer_pattern": problems.ANSWER_PATTERN,
            "proposer.selection_timeout_s": 1.0,
        },
        environment={},
    )
    with running_service(config) as running:
        yield running


@pytest.fixture(scope="package")
def client(service: RunningService) -> Iterator[Client]:
    with Client(service.address, timeout_s=60) as opened:
        yield opened


@pytest.fixture(scope="package")
def pair() -> Pair:
    """The same models in this process."""
    return Pair.open(str(SLM_DIR), llm=str(LLM_DIR), batch_size=32, threads=1)
