"""`s2t bench curve`: what more labels buy.

Held-out Agree@1, task accuracy and, with an LLM, how likely it finds the answers: of every kind of
local selector, beside controls.

Controls without training: the SLM alone, its majority of 8 samples, the untrained selector, and
with an LLM `s2t` and the LLM alone. Controls with the same labels, steps, rank and regulariser:
plain distillation (no selection: the adapter is always on and decodes greedily), and the same
adapter at the triggers only. Subsets of the labels are nested: whole groups of problems in the
order of a hash. Agree@1 is measured on the test half of the held-out groups, which chose nothing.

Every result is a line of a JSONL file as soon as it is there; the same command again goes on behind
the last one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from s2t_shared.errors import ConfigError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.policy import Calibration
from s2t_shared.splits import Part
from s2t_shared.statistics import clustered_difference
from s2t_shared.training.dataset import TrainingData, part_of
from s2t_shared.training.evaluate import Evaluation, evaluate_local_selector
from s2t_shared.training.losses import label_weight
from s2t_shared.training.settings import Objective, TrainingSettings
from s2t_shared.training.trainer import distil
from s2t_shared.types import Trigger
from services.bench import workload
from services.bench.curve_answers import (
    LLM,
    MAJORITY,
    PLAIN,
    PLAIN_GATED,
    S2T,
    SLM,
    UNTRAINED,
    Answered,
    Answerer,
    lake_calibration,
)
from services.bench.workload import Settings
from services.evaluation.problems import Problem

KINDS = {
    f"{kind.value}, {reads.value}": (kind, reads) for reads in Reading for kind in SelectorKind
}
UNTRAINED_KIND = "reserved, base"


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """`counts`: training labels, at least so many each (problems stay whole). `names`: of KINDS, or
    PLAIN. `accuracy_at`: the counts at which `problems` are answered too, at each of `budgets`
    behind each of `triggers`. `held_out_labels`: to validate on, and as many to test on, at
    most. `pattern`: finds an answer in a text, for the majority."""

    lake: Path
    counts: tuple[int, ...]
    names: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 400
    learning_rate: float = 3e-4
    batch_labels: int = 64
    rank: int = 16
    triggers: tuple[Trigger, ...] = (Trigger.ENTROPY,)
    budgets: tuple[float, ...] = (0.01, 0.05)
    pattern: str = ""
    accuracy_at: tuple[int, ...] = ()
    held_out_labels: int = 1024
    batch: int = 16


@dataclass(frozen=True)
class Point:
    """One result. agree_at_1 and gain (over the SLM's own first choice, on the same labels) each
    come with the half width of a 95 % interval, groups as clusters; None for a way to answer that
    does not select at labels. `correct`: condition ("entropy 0.05") -> a digit per problem, 1 for
    a right answer; what has no trigger has "" in its place. `log_probs`: the same of the LLM's mean
    log-probability per token of each answer. `labels` 0: a control that needs none."""

    name: str
    count: int
    seed: int
    labels: int
    agree_at_1: float | None
    half: float
    gain: float
    gain_half: float
    test_labels: int
    correct: dict[str, str]
    log_probs: dict[str, list[float]]
    steps: int = 0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.count, self.seed

    @property
    def figures(self) -> str:
        """For example "Agree@1 0.700, accuracy 0.610 (entropy 0.05)"."""
        parts = [] if self.agree_at_1 is None else [f"Agree@1 {self.agree_at_1:.3f}"]
        for condition in self.correct:
            where = f" ({condition})" if condition else ""
            parts.append(f"accuracy {self.accuracy(condition):.3f}{where}")
        return ", ".join(parts)

    def right(self, condition: str) -> list[bool]:
        """Whether each answer is right; what has no trigger stands beside every condition."""
        digits = self.correct.get(condition, self.correct.get("", ""))
        return [digit == "1" for digit in digits]

    def accuracy(self, condition: str) -> float | None:
        """Share of right answers, or None if no problem was answered."""
        right = self.right(condition)
        return sum(right) / len(right) if right else None

    def likelihood(self, condition: str) -> list[float]:
        """As `right`, of `log_probs`."""
        return self.log_probs.get(condition, self.log_probs.get("", []))


class Curve:
    """Labels, problems and the SLM of one curve, and what is measured on them.

    Raises: StoreError: too few labels. ConfigError: fewer than `counts`, or of another SLM; no
        problems to answer.
    """

    def __init__(
        self, settings: Settings, curve: CurveSettings, problems: Sequence[Problem]
    ) -> None:
        self.settings, self.curve, self.problems = settings, curve, problems
        if curve.accuracy_at and not problems:
            raise ConfigError(
                "there are no problems to answer; give others with --problems, or --accuracy-at "
                "none"
            )
        self.models = workload.load(settings, needs_llm=settings.llm is not None)
        snapshot = Lake(curve.lake).freeze()
        self.snapshot = snapshot.id
        everything = list(snapshot.rollouts())
        self._rollouts = sorted((r for r in everything if r.labels), key=_hash_order)
        self._plain = [r for r in everything if r.source == "plain" and part_of(r) is Part.TRAINING]
        self._held_out = [r for r in self._rollouts if part_of(r) is not Part.TRAINING]
        config = self._config(UNTRAINED_KIND, 0)
        data = TrainingData(self._rollouts, self.models.slm.digest, config)
        self._test = data.test  # the same for every point
        if (largest := max(curve.counts)) > data.labels:
            raise ConfigError(
                f"--counts: {largest} training labels wanted, the lake has {data.labels}; harvest "
                "more, or ask for fewer"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What all points of one file must share, to be compared."""
        s, c = self.settings, self.curve
        ids = hashlib.sha256(json.dumps([p.id for p in self.problems]).encode()).hexdigest()[:16]
        return {
            "snapshot": self.snapshot,
            "slm": self.models.slm.digest,
            "steps": c.steps,
            "learning_rate": c.learning_rate,
            "held_out_labels": c.held_out_labels,
            "problems": ids,
            "new": s.new,
            "k": s.k,
            "budgets": list(c.budgets),
            "triggers": [trigger.value for trigger in c.triggers],
            "batch_labels": c.batch_labels,
            "rank": c.rank,
            "llm": self.models.scorer.info.digest if self.models.scorer else "",
            "dtype": s.dtype,
        }

    def subset(self, count: int) -> list[Rollout]:
        """The first training groups that together have at least `count` labels that train."""
        settings = self._config(UNTRAINED_KIND, 0)
        chosen: list[Rollout] = []
        labels, last = 0, None
        for rollout in self._rollouts:
            if part_of(rollout) is not Part.TRAINING:
                continue
            if labels >= count and (rollout.task, rollout.split_group) != last:
                break
            chosen.append(rollout)
            labels += sum(label_weight(label, settings) > 0 for label in rollout.labels)
            last = rollout.task, rollout.split_group
        return chosen

    # -- points -----------------------------------------------------------------------------------

    def controls(self) -> list[str]:
        """Names of those that need no training."""
        names = [SLM, UNTRAINED]
        if self.curve.accuracy_at:
            names.append(MAJORITY)
            if self.models.scorer is not None:
                names += [S2T, LLM]
        return names

    def control(self, name: str) -> list[Point]:
        """The point of a control that needs no training."""
        selector = LocalSelector.untrained(self.models.proposer.reserved_ids)
        if name not in (SLM, UNTRAINED):
            return [self._point(name, None, (), None)]
        config = self._config(UNTRAINED_KIND, 0)
        found = evaluate_local_selector(self.models.slm, selector, self._test, config)
        if name == SLM:
            return [self._point(SLM, found, found.slm_agreed, None)]
        return [self._point(UNTRAINED, found, found.agreed, selector)]

    def train(self, name: str, count: int, seed: int) -> list[Point]:
        """Train once. Plain distillation makes two points: always on, and at the triggers."""
        training = self.subset(count)
        started = time.perf_counter()
        distilled = distil(
            self.models.slm,
            self.models.proposer.reserved_ids,
            [*training, *self._held_out],
            self._config(name, seed),
        )
        seconds = time.perf_counter() - started
        points = []
        for way in trained_together(name):
            point = self._point(
                way,
                distilled.evaluation,
                distilled.evaluation.agreed,
                distilled.local_selector,
                count,
            )
            made = replace(
                point,
                seed=seed,
                labels=distilled.training_labels,
                steps=distilled.steps,
                seconds=seconds,
            )
            points.append(made)
        return points

    def _config(self, name: str, seed: int) -> TrainingSettings:
        kind, reads = KINDS.get(name, (SelectorKind.PREFIX, Reading.ADAPTED))
        return TrainingSettings(
            kind=kind,
            reads=reads,
            rank=self.curve.rank,
            alpha=2.0 * self.curve.rank,
            steps=self.curve.steps,
            batch_labels=self.curve.batch_labels,
            learning_rate=self.curve.learning_rate,
            held_out_labels=self.curve.held_out_labels,
            seed=seed,
            objective=Objective.PLAIN if name == PLAIN else Objective.TOP1_CE,
        )

    def _point(
        self,
        name: str,
        found: Evaluation | None,
        agreed: Sequence[bool],
        selector: LocalSelector | None,
        count: int = 0,
    ) -> Point:
        agreement: tuple[float | None, float, float, float] = (None, 0.0, 0.0, 0.0)
        if found is not None:
            agreement = self._agreement(found, agreed)
        answered: dict[str, Answered] = {}
        if self.wants_answers(count):
            answered = self.answerer.answer(name, selector)
        return Point(
            name,
            count,
            0,
            0,
            *agreement,
            len(agreed),
            {condition: outcome.correct for condition, outcome in answered.items()},
            {condition: outcome.log_probs for condition, outcome in answered.items()},
        )

    def _agreement(
        self, found: Evaluation, agreed: Sequence[bool]
    ) -> tuple[float, float, float, float]:
        mean, half = clustered_difference(agreed, [False] * len(agreed), found.groups)
        gain, gain_half = clustered_difference(agreed, found.slm_agreed, found.groups)
        if math.isinf(half):
            raise ConfigError(
                f"the {len(agreed)} labels to test on are of one group of problems: no interval "
                "can be given; harvest more groups"
            )
        return mean, half, gain, gain_half

    # -- answers ----------------------------------------------------------------------------------

    def wants_answers(self, count: int) -> bool:
        """Whether a point of so many labels is asked the problems; all controls are, if any point
        is."""
        return bool(self.curve.accuracy_at) and count in (0, *self.curve.accuracy_at)

    def calibration(self) -> Calibration:
        """Thresholds of the triggers at the budgets.

        Raises:
            ConfigError: the lake has no plain rollouts.
        """
        curve = self.curve
        return lake_calibration(
            self.models,
            self._plain,
            triggers=curve.triggers,
            budgets=curve.budgets,
            max_new_tokens=self.settings.new,
            batch=curve.batch,
        )

    @cached_property
    def answerer(self) -> Answerer:
        """Answers the problems, at thresholds of training rollouts."""
        return Answerer(
            self.models,
            self.problems,
            calibration=self.calibration(),
            triggers=self.curve.triggers,
            budgets=self.curve.budgets,
            candidates=self.settings.k,
            max_new_tokens=self.settings.new,
            batch=self.curve.batch,
            pattern=self.curve.pattern,
        )


def trained_together(name: str) -> tuple[str, ...]:
    """Names of the points that one training makes."""
    return (PLAIN, PLAIN_GATED) if name == PLAIN else (name,)


def _hash_order(rollout: Rollout) -> tuple[str, str]:
    """Problems in an order that has nothing to do with how they were harvested."""
    name = f"curve/{rollout.task}/{rollout.split_group}"
    return hashlib.sha256(name.encode()).hexdigest(), rollout.rollout_id


def bench_curve(
    settings: Settings,
    curve: CurveSettings,
    problems: Sequence[Problem],
    out: Path,
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Every point that `out` does not have yet.

    Raises: ConfigError: `out` holds points of other labels, models or settings, or cannot be
        written; as `Curve`.
    """
    work = Curve(settings, curve, problems)
    points = {p.key: p for p in _read(out, work.identity)}
    wanted: dict[tuple[str, int, int], Callable[[], list[Point]]] = {}
    for name in work.controls():
        wanted[name, 0, 0] = partial(work.control, name)
    for count in sorted(curve.counts):
        for seed in curve.seeds:
            for name in curve.names:
                for way in trained_together(name):
                    wanted[way, count, seed] = partial(work.train, name, count, seed)
    for key, make in wanted.items():
        if key in points and (points[key].correct or not work.wants_answers(key[1])):
            continue
        for point in make():
            points[point.key] = point
            _append(out, asdict(point))
            on_point(point)
    return [points[key] for key in wanted]


def _read(out: Path, identity: dict[str, Any]) -> list[Point]:
    """The points of `out`, whose first line says what they are points of; it is written when there
    is none."""
    try:
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(out)!r} cannot be read: {error}") from error
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # torn when a run was killed: measured again
    if not lines:
        _append(out, identity)
    elif rows[:1] != [identity]:
        raise ConfigError(
            f"{str(out)!r} holds something else, or points of other labels, models, problems or "
            "settings; name another file with --out, or remove it"
        )
    return [Point(**row) for row in rows[1:]]


def _append(out: Path, row: dict[str, Any]) -> None:
    try:
        with out.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if stream.tell() else "") + json.dumps(row))
    except OSError as error:
        raise ConfigError(f"{str(out)!r} cannot be written: {error.strerror}") from error
