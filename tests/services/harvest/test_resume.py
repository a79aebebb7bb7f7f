"""Law 7: a harvest ends with the same labels however often it was stopped."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t_shared.bundled import LLM_DIR, SLM_DIR
from s2t_shared.errors import ConfigError, SelectorUnavailableError
from s2t_shared.labels.lake import Lake
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.pair import Pair
from s2t_shared.types import LabelRule, Trigger
from services.harvest.journal import CHUNK
from services.harvest.rollouts import PairRollouts
from services.harvest.run import HarvestOutcome, harvest
from tests.faults.figures import sizes
from tests.helpers.harvest import (
    OPTIONS,
    DisturbedSource,
    contents_of,
    labels_on_disk,
    lake_contents,
    training_prompts,
    write_training_prompts,
)


def command(prompts: Path, lake: Path, *options: str) -> list[str]:
    """`s2t harvest` with the bundled pair."""
    models = ["--slm", str(SLM_DIR), "--llm", str(LLM_DIR), "--threads", "1"]
    verb = [sys.executable, "-m", "services.main", "harvest"]
    return [*verb, str(prompts), "--out", str(lake), *models, *options]


def is_working(lake: Path) -> bool:
    """Whether a process holds the lock of a run."""
    for lock in lake.glob("runs/*/lock"):
        with lock.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


# -- stopped and killed ---------------------------------------------------------------------------


@pytest.mark.kill
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stops=st.lists(st.integers(0, 190), min_size=1, max_size=3))
def test_stopped_and_started_again(
    source: PairRollouts,
    pair: Pair,
    undisturbed: dict[str, tuple],
    tmp_path_factory: pytest.TempPathFactory,
    stops: list[int],
) -> None:
    """Stopped anywhere (while it calibrates, in the middle of a chunk), the labels in the end are
    the same, each written once."""
    folder = tmp_path_factory.mktemp("lake")
    lake = Lake(folder)
    prompts = training_prompts(150)
    for stop in stops:
        with suppress(KeyboardInterrupt):
            harvest(DisturbedSource(source, pair, stop), prompts, lake, OPTIONS)
    outcome = harvest(source, prompts, lake, OPTIONS)
    assert lake_contents(folder) == undisturbed
    assert labels_on_disk(folder) == len(undisturbed) == outcome.labels
    idle = DisturbedSource(source, pair)
    assert harvest(idle, prompts, lake, OPTIONS).resumed == 150
    assert idle.rolled == 0


@pytest.mark.kill
@pytest.mark.parametrize("kills", sizes([1], [20]))
def test_killed_and_started_again(
    undisturbed: dict[str, tuple], tmp_path: Path, kills: int
) -> None:
    """The same through the command line with kill -9 at random moments."""
    lake = tmp_path / "lake"
    as_undisturbed = ["--task", "t", "--max-new-tokens", "40", "--calibrate-on", str(CHUNK)]
    prompts = write_training_prompts(tmp_path / "train.jsonl", 150)
    arguments = command(prompts, lake, *as_undisturbed, "--json")
    rng = random.Random(1)
    killed = 0
    while killed < kills:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not is_working(lake):
            time.sleep(0.01)  # starting costs seconds and touches nothing
        time.sleep(rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        elif process.returncode == 0:  # it was done before: the next kills hit a new run
            assert lake_contents(lake) == undisturbed
            shutil.rmtree(lake)
    done = subprocess.run(arguments, check=True, capture_output=True)
    assert lake_contents(lake) == undisturbed
    assert labels_on_disk(lake) == len(undisturbed) == json.loads(done.stdout)["labels"]
    assert not Lake(lake).verify(values=True)


@pytest.mark.kill
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    prompts = write_training_prompts(tmp_path / "train.jsonl", 2000)
    process = subprocess.Popen(
        command(prompts, lake), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(lake.glob("shard-*.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_lake_at_a_url(
    source: PairRollouts, pair: Pair, undisturbed: dict[str, tuple], tmp_path: Path
) -> None:
    """The journal lies in a folder. Without it all is done again, and nothing counts twice."""
    lake = open_lake("memory://harvested")
    prompts = training_prompts(150)
    with suppress(KeyboardInterrupt):
        harvest(DisturbedSource(source, pair, 140), prompts, lake, OPTIONS, journals=tmp_path)
    outcome = harvest(source, prompts, lake, OPTIONS, journals=tmp_path)
    assert 0 < outcome.resumed < 150
    assert sum(shard.labels for shard in lake.shards()) == len(undisturbed)
    harvest(source, prompts, lake, OPTIONS, journals=tmp_path / "lost")
    assert contents_of(lake) == undisturbed
    assert lake.reader().labels == len(undisturbed)


# -- which run, and what is tried again -----------------------------------------------------------


@pytest.mark.slow
def test_again_mends_a_lake_that_lost_labels(
    source: PairRollouts, undisturbed: dict[str, tuple], tmp_path: Path
) -> None:
    """A shard that is gone (quarantined, say) comes back with `again`; nothing is there twice."""
    lake = Lake(tmp_path)
    prompts = training_prompts(150)
    harvest(source, prompts, lake, OPTIONS)
    lost = lake.shards()[2].name
    for suffix in (".json", ".parquet"):
        (tmp_path / f"{lost}{suffix}").unlink()
    assert lake_contents(tmp_path) != undisturbed
    # The journal does not know that labels are gone.
    assert harvest(source, prompts, lake, OPTIONS).resumed == 150
    assert harvest(source, prompts, lake, OPTIONS, again=True).prompts == 150
    assert lake_contents(tmp_path) == undisturbed
    assert labels_on_disk(tmp_path) == len(undisturbed)


def test_one_process_per_run(source: PairRollouts, pair: Pair, tmp_path: Path) -> None:
    """A second one is refused, rather than doing the same work again."""
    lake = Lake(tmp_path)
    prompts = training_prompts(5)
    refused = 0

    def second(outcome: HarvestOutcome) -> None:
        nonlocal refused
        with pytest.raises(ConfigError, match="another process"):
            harvest(DisturbedSource(source, pair), prompts, lake, OPTIONS)
        refused += 1

    harvest(source, prompts, lake, OPTIONS, second)
    assert refused > 0


def test_other_options_are_another_run(source: PairRollouts, tmp_path: Path) -> None:
    prompts = training_prompts(5)
    first = harvest(source, prompts, Lake(tmp_path), OPTIONS)
    other = harvest(source, prompts, Lake(tmp_path), replace(OPTIONS, candidates=8))
    assert first.run != other.run
    assert other.resumed == 0


@pytest.mark.slow
def test_what_failed_is_tried_again(source: PairRollouts, pair: Pair, tmp_path: Path) -> None:
    """An LLM that is away spoils only the chunks it hits, and only for now."""
    given = replace(OPTIONS, thresholds=(LabelRule(Trigger.KL, 0.3),), triggers=(Trigger.KL,))
    prompts = training_prompts(100)
    away = DisturbedSource(
        source,
        pair,
        error=SelectorUnavailableError("away"),
        fails=lambda request: request.problem_id.endswith("7"),
    )
    first = harvest(away, prompts, Lake(tmp_path / "a"), given)
    assert first.failed
    assert first.prompts < 100
    second = harvest(source, prompts, Lake(tmp_path / "a"), given)
    assert not second.failed
    assert second.prompts == 100
    harvest(source, prompts, Lake(tmp_path / "b"), given)
    assert lake_contents(tmp_path / "a") == lake_contents(tmp_path / "b")
