"""Shared by the tests of harvests: the bundled pair, and what an undisturbed harvest gives."""

from __future__ import annotations

import pytest

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.labels.lake import Lake
from s2t_shared.pair import Pair
from services.harvest.rollouts import PairRollouts
from services.harvest.run import harvest
from tests.helpers.harvest import OPTIONS, lake_contents, training_prompts


@pytest.fixture(scope="package")
def pair() -> Pair:
    return Pair.open(str(SLM_DIR), str(LLM_DIR), batch_size=16, threads=1)


@pytest.fixture(scope="package")
def source(pair: Pair) -> PairRollouts:
    return PairRollouts(pair)


@pytest.fixture(scope="package")
def undisturbed(source: PairRollouts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """The labels of 150 prompts."""
    lake = tmp_path_factory.mktemp("undisturbed")
    outcome = harvest(source, training_prompts(150), Lake(lake), OPTIONS)
    found = lake_contents(lake)
    assert outcome.prompts == 150
    assert outcome.rollouts == 150
    assert outcome.labels == len(found) > 150
    return found
