"""`s2t train --follow`: the closed loop. Wait for new labels, train, gate, promote, and again."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.labels.lake import Lake
from s2t_shared.versions.registry import Registry
from services.launch.local import local_ray
from services.train.job import TrainOutcome, TrainProgress, train, unfinished_job

POLL_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0


def follow(
    config: Config,
    every_labels: int,
    max_rounds: int | None = None,
    promote: bool = True,
    on_progress: Callable[[TrainProgress], None] = lambda p: None,
    say: Callable[[str], None] = lambda line: None,
    on_round: Callable[[TrainOutcome], None] = lambda outcome: None,
) -> None:
    """Train whenever the lake has `every_labels` labels that are newer than what was trained on;
    `max_rounds` None: until it is interrupted. A round that an earlier call left unfinished comes
    first. An error ends no more than its round, which is tried again after a pause that grows."""
    rounds, pause = 0, FIRST_PAUSE_S
    while max_rounds is None or rounds < max_rounds:
        try:
            _wait(config, every_labels, say)
            with local_ray():
                outcome = train(config, promote, on_progress, say)
        except (S2TError, ray.exceptions.RayError, OSError) as error:
            say(f"this round failed: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        rounds, pause = rounds + 1, FIRST_PAUSE_S
        on_round(outcome)


def _wait(config: Config, every_labels: int, say: Callable[[str], None]) -> None:
    """Until there is something to do."""
    said = False
    while unfinished_job(config) is None:
        new = Lake(config.lake).labels_since(trained_until(config))
        if new >= every_labels:
            say(f"{new:,} new labels: training")
            return
        if not said:
            say(f"{new:,} new labels of {every_labels:,}; waiting")
            said = True
        time.sleep(POLL_S)


def trained_until(config: Config) -> float:
    """When the newest rollout was made that any version was trained on, Unix seconds; 0: there is
    no version."""
    return max(
        (
            float(m.training.get("labels_until", 0.0))
            for m in Registry(config.versions).manifests()[0]
        ),
        default=0.0,
    )
