"""Harvests of the bundled pair: prompts, what a lake holds, and a source that gets disturbed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from s2t_shared.bundled.problems import problems
from s2t_shared.errors import S2TError
from s2t_shared.labels.lake import Lake
from s2t_shared.pair import Pair
from s2t_shared.types import Trigger
from services.harvest.journal import CHUNK
from services.harvest.rollouts import (
    HarvestOptions,
    OnRollout,
    PairRollouts,
    RolloutOutcome,
    RolloutRequest,
)
from services.harvest.run import Prompts, bundled_prompts

OPTIONS = HarvestOptions(task="t", max_new_tokens=40, calibrate_on=CHUNK)


def training_prompts(count: int) -> Prompts:
    return bundled_prompts(problems("train", count))


def write_training_prompts(file: Path, count: int) -> Path:
    rows = [{"id": p.id, "prompt": p.prompt} for p in problems("train", count)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def lake_contents(lake: Path) -> dict[str, tuple]:
    """Label id -> what the label says."""
    return contents_of(Lake(lake))


def contents_of(lake: Lake) -> dict[str, tuple]:
    """Label id -> what the label says."""
    contents = {}
    for rollout in lake.rollouts():
        for label in rollout.labels:
            contents[label.label_id] = (
                rollout.problem_id,
                label.position,
                label.candidate_ids,
                label.llm_top_id,
            )
    return contents


def labels_on_disk(lake: Path) -> int:
    """Labels before any deduplication."""
    return sum(shard.labels for shard in Lake(lake).shards())


def thresholds_of(lake: Path, run: str) -> dict[str, float]:
    """Signal -> threshold, as the run's plan has them."""
    plan = json.loads((lake / "runs" / run / "plan.json").read_text(encoding="utf-8"))
    rules = dict(plan["rules"])
    assert set(rules) <= {Trigger.KL.value, Trigger.ENTROPY.value}
    return rules


class DisturbedSource:
    """A source that is stopped after some rollouts, as by Ctrl-C, or some of whose rollouts fail.

    rolled: how many rollouts it made.
    """

    returns_labels = True

    def __init__(
        self,
        inner: PairRollouts,
        pair: Pair,
        stop_after: int | None = None,
        error: S2TError | None = None,
        fails: Callable[[RolloutRequest], bool] = lambda request: False,
    ) -> None:
        self.digests = inner.digests
        self.precision = inner.precision
        self.rolled = 0
        self._inner = inner
        self._engine = pair.engine
        self._stop_after = stop_after
        self._error = error
        self._fails = fails

    def make_rollouts(
        self,
        requests: Iterable[RolloutRequest],
        options: HarvestOptions,
        on_rollout: OnRollout,
    ) -> None:
        def disturbed(request: RolloutRequest, outcome: RolloutOutcome) -> None:
            if self.rolled == self._stop_after:
                raise KeyboardInterrupt
            self.rolled += 1
            if self._error is not None and self._fails(request):
                outcome = self._error
            on_rollout(request, outcome)

        try:
            self._inner.make_rollouts(requests, options, disturbed)
        except KeyboardInterrupt:
            self._empty_engine()
            raise

    def _empty_engine(self) -> None:
        """The process would be gone; this one's engine goes on to serve the next test."""
        while not self._engine.idle:
            for sequence in self._engine.sequences:
                self._engine.cancel(sequence)
            self._engine.step()
