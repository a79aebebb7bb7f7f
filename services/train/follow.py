"""`s2t train --follow`: the closed loop. Wait for new labels, train, gate, promote, and again."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.labels.object_lake import open_lake
from s2t_shared.versions.registry import Registry
from services.train.job import TrainOutcome, train
from services.train.jobs import unfinished_job
from services.train.progress import OnProgress

POLL_S = 1.0
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 300.0


def follow(
    config: Config,
    every_labels: int,
    max_rounds: int | None = None,
    promote: bool = True,
    on_progress: OnProgress = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
    on_round: Callable[[TrainOutcome], None] = lambda outcome: None,
) -> None:
    """Train whenever the lake has `every_labels` labels newer than what was trained on.

    A round that an earlier call left unfinished comes first. An error ends only its round, which is
    tried again after a pause that grows. max_rounds: None runs until it is interrupted.
    """
    rounds = 0
    pause = FIRST_PAUSE_S
    while max_rounds is None or rounds < max_rounds:
        try:
            _wait(config, every_labels, say)
            outcome = train(config, promote, on_progress, say)
        except (S2TError, ray.exceptions.RayError, OSError) as error:
            say(f"this round failed: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        rounds += 1
        pause = FIRST_PAUSE_S
        on_round(outcome)


def _wait(config: Config, every_labels: int, say: Callable[[str], None]) -> None:
    """Return when there are enough new labels, or an unfinished job."""
    announced = False
    while unfinished_job(config) is None:
        new = open_lake(config.lake).labels_since(trained_until(config))
        if new >= every_labels:
            say(f"{new:,} new labels: training")
            return
        if not announced:
            say(f"{new:,} new labels of {every_labels:,}; waiting")
            announced = True
        time.sleep(POLL_S)


def trained_until(config: Config) -> float:
    """When the newest rollout was made that any version was trained on.

    In Unix seconds; 0 where there is no version.
    """
    manifests, _ = Registry(config.versions).manifests()
    times = [float(manifest.training.get("labels_until", 0.0)) for manifest in manifests]
    return max(times, default=0.0)
