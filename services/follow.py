"""`s2t train --follow`: the closed loop. Wait for new labels, train, gate, promote, and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import ray

from s2t_shared.config import Config
from s2t_shared.errors import S2TError
from s2t_shared.lake import Lake
from s2t_shared.registry import Registry
from services.serving import local_ray
from services.training import TrainOutcome, TrainProgress, train, unfinished_job

POLL_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0


def follow(config: Config, every_labels: int, max_rounds: int | None = None, promote: bool = True,
           on_progress: Callable[[TrainProgress], None] = lambda p: None,
           say: Callable[[str], None] = lambda line: None,
           on_round: Callable[[TrainOutcome], None] = lambda outcome: None) -> None:
    """Train whenever the lake has `every_labels` labels more than the last trained snapshot; `max_rounds` None: until
    it is interrupted. A round that an earlier call left unfinished comes first. An error ends no more than its round,
    which is tried again after a pause that grows."""
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
        here, trained = labels_in(config.lake), trained_labels(config)
        # The lake may have been pruned below what was trained on: new labels then count from what is left.
        new = here - min(trained, here)
        if new >= every_labels:
            say(f"{new:,} new labels: training")
            return
        if not said:
            say(f"{new:,} new labels of {every_labels:,}; waiting")
            said = True
        time.sleep(POLL_S)


def labels_in(lake: Path) -> int:
    return sum(shard.labels for shard in Lake(lake).shards())


def trained_labels(config: Config) -> int:
    """How many labels the snapshot of the newest version held; 0 where there is none any more."""
    registry = Registry(config.versions)
    for name in reversed(registry.names()):
        try:
            return Lake(config.lake).snapshot(registry.manifest(name).snapshot).labels
        except S2TError:
            continue
    return 0
