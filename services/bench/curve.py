"""`s2t bench curve`: what more labels buy.

Held-out Agree@1 and task accuracy of every kind of local selector, beside controls.

Controls: the SLM alone, the untrained selector, and plain distillation (the same labels, steps,
rank and regulariser, but no selection: the adapter is always on and decodes greedily). Subsets of
the labels are nested: whole problems in the order of a hash. Agree@1 is measured on the test half
of the held-out problems, which chose nothing.

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
from functools import partial
from pathlib import Path
from typing import Any

from s2t_shared.decode.engine import Engine
from s2t_shared.decode.generate import Generator
from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.model.local_selector import LocalSelector, Reading, SelectorKind
from s2t_shared.policy import threshold_for
from s2t_shared.statistics import clustered_difference
from s2t_shared.training.dataset import Part, TrainingData, part_of
from s2t_shared.training.evaluate import Evaluation, evaluate_local_selector
from s2t_shared.training.losses import label_weight
from s2t_shared.training.settings import Objective, TrainingSettings
from s2t_shared.training.trainer import distil
from s2t_shared.types import (
    WARMUP_STEPS,
    Answer,
    CandidateRule,
    DecodeOptions,
    GenerateRequest,
    Mode,
    Policy,
    Proposals,
    Trigger,
)
from services.bench import workload
from services.bench.workload import Settings
from services.evaluation import Problem

KINDS = {
    f"{kind.value}, {reads.value}": (kind, reads) for reads in Reading for kind in SelectorKind
}
PLAIN, UNTRAINED, SLM = "plain distillation", "untrained selector", "SLM alone"
UNTRAINED_KIND = "reserved, base"


@dataclass(frozen=True, kw_only=True)
class CurveSettings:
    """`counts`: training labels, at least so many each (problems stay whole). `names`: of KINDS, or
    PLAIN. `accuracy_at`: the counts at which `problems` are answered too, at each of `budgets`
    behind the entropy trigger. `held_out_labels`: to validate on, and as many to test on, at
    most."""

    lake: Path
    counts: tuple[int, ...]
    names: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 400
    learning_rate: float = 3e-4
    budgets: tuple[float, ...] = (0.01, 0.05)
    accuracy_at: tuple[int, ...] = ()
    held_out_labels: int = 1024
    batch: int = 16


@dataclass(frozen=True)
class Point:
    """One result. agree_at_1 and gain (over the SLM's own first choice, on the same labels) each
    come with the half width of a 95 % interval, problems as clusters. `correct`: budget -> a digit
    per problem, 1 for a right answer; what has no budget has "" in its place. `labels` 0: a control
    that needs none."""

    name: str
    count: int
    seed: int
    labels: int
    agree_at_1: float
    half: float
    gain: float
    gain_half: float
    test_labels: int
    correct: dict[str, str]
    steps: int = 0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.count, self.seed

    def digits(self, budget: str) -> str:
        """`correct` at this budget; what has no budget stands beside every budget."""
        return self.correct.get(budget, self.correct.get("", ""))

    def accuracy(self, budget: str) -> float | None:
        """Share of right answers at this budget, or None if no problem was answered."""
        digits = self.digits(budget)
        return digits.count("1") / len(digits) if digits else None


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
        self.models = workload.load(settings)
        snapshot = Lake(curve.lake).freeze()
        self.snapshot = snapshot.id
        everything = list(snapshot.rollouts())
        self._rollouts = sorted((r for r in everything if r.labels), key=_hash_order)
        self._entropies = [
            r.entropy for r in everything if r.source == "plain" and part_of(r) is Part.TRAINING
        ]
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
            "dtype": s.dtype,
        }

    def subset(self, count: int) -> list[Rollout]:
        """The first training problems that together have at least `count` labels that train."""
        settings = self._config(UNTRAINED_KIND, 0)
        chosen: list[Rollout] = []
        labels, last = 0, None
        for rollout in self._rollouts:
            if part_of(rollout) is not Part.TRAINING:
                continue
            if labels >= count and (rollout.task, rollout.problem) != last:
                break
            chosen.append(rollout)
            labels += sum(label_weight(label, settings) > 0 for label in rollout.labels)
            last = rollout.task, rollout.problem
        return chosen

    # -- points -----------------------------------------------------------------------------------

    def controls(self) -> dict[str, Callable[[], Point]]:
        """Those that need no training."""
        selector = LocalSelector.untrained(self.models.proposer.reserved_ids)
        config = self._config(UNTRAINED_KIND, 0)

        def control(name: str, mine: LocalSelector | None) -> Point:
            found = evaluate_local_selector(self.models.slm, selector, self._test, config)
            return self._point(name, found, found.agreed if mine else found.slm_agreed, mine)

        return {SLM: lambda: control(SLM, None), UNTRAINED: lambda: control(UNTRAINED, selector)}

    def train(self, name: str, count: int, seed: int) -> Point:
        training = self.subset(count)
        started = time.perf_counter()
        distilled = distil(
            self.models.slm,
            self.models.proposer.reserved_ids,
            [*training, *self._held_out],
            self._config(name, seed),
        )
        seconds = time.perf_counter() - started
        point = self._point(
            name, distilled.evaluation, distilled.evaluation.agreed, distilled.local_selector, count
        )
        return replace(
            point,
            seed=seed,
            labels=distilled.training_labels,
            steps=distilled.steps,
            seconds=seconds,
        )

    def _config(self, name: str, seed: int) -> TrainingSettings:
        kind, reads = KINDS.get(name, (SelectorKind.PREFIX, Reading.ADAPTED))
        return TrainingSettings(
            kind=kind,
            reads=reads,
            steps=self.curve.steps,
            learning_rate=self.curve.learning_rate,
            held_out_labels=self.curve.held_out_labels,
            seed=seed,
            objective=Objective.PLAIN if name == PLAIN else Objective.TOP1_CE,
        )

    def _point(
        self,
        name: str,
        found: Evaluation,
        agreed: Sequence[bool],
        selector: LocalSelector | None,
        count: int = 0,
    ) -> Point:
        mean, half = clustered_difference(agreed, [False] * len(agreed), found.problems)
        gain, gain_half = clustered_difference(agreed, found.slm_agreed, found.problems)
        if math.isinf(half):
            raise ConfigError(
                f"the {len(agreed)} labels to test on are of one problem: no interval can be "
                "given; harvest more problems"
            )
        correct = {}
        if self.wants_answers(count):
            budgets: tuple[float | None, ...] = (
                (None,) if name in (SLM, PLAIN) else self.curve.budgets
            )
            correct = {str(b or ""): self._answers(name, selector, b) for b in budgets}
        return Point(name, count, 0, 0, mean, half, gain, gain_half, len(agreed), correct)

    # -- task accuracy ----------------------------------------------------------------------------

    def wants_answers(self, count: int) -> bool:
        """Whether a point of so many labels is asked the problems; all controls are, if any point
        is."""
        return bool(self.curve.accuracy_at) and count in (0, *self.curve.accuracy_at)

    def _answers(self, name: str, selector: LocalSelector | None, budget: float | None) -> str:
        """Answer the problems in this process: a digit for each, 1 where it is right."""
        if budget is not None:
            policy = Policy(
                mode=Mode.S2T_LOCAL,
                trigger=Trigger.ENTROPY,
                threshold=self._threshold(budget),
                candidates=CandidateRule(self.settings.k),
            )
        elif name == PLAIN:
            policy = Policy(mode=Mode.S2T_LOCAL, trigger=Trigger.NEVER, proposals=Proposals.ADAPTED)
        else:
            policy = Policy()
        engine = Engine(
            self.models.proposer, None, lambda version: selector, max_num_seqs=self.curve.batch
        )
        questions = {p.id: p for p in self.problems}
        requests = (
            GenerateRequest(
                request_id=p.id,
                prompt=p.prompt,
                options=DecodeOptions(policy=policy, max_new_tokens=self.settings.new),
            )
            for p in self.problems
        )
        right = {
            request.request_id
            for request, answer in Generator(self.models.tokenizer, engine).generate(requests)
            if isinstance(answer, Answer) and questions[request.request_id].is_correct(answer.text)
        }
        return "".join(str(int(p.id in right)) for p in self.problems)

    def _threshold(self, budget: float) -> float:
        """From the statistics that plain harvests leave at every position of training rollouts,
        labelled or not."""
        signals = [x for entropy in self._entropies for x in entropy[WARMUP_STEPS:]]
        try:
            return threshold_for(budget, signals, sum(map(len, self._entropies)))
        except InvalidRequestError as error:
            raise ConfigError(
                f"the lake has no plain rollouts to take entropy thresholds from ({error}); "
                "harvest some without --intervene"
            ) from error


def _hash_order(rollout: Rollout) -> tuple[str, str]:
    """Problems in an order that has nothing to do with how they were harvested."""
    problem = hashlib.sha256(f"curve/{rollout.task}/{rollout.problem}".encode()).hexdigest()
    return problem, rollout.rollout_id


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
    wanted = {(name, 0, 0): made for name, made in work.controls().items()}
    for count in sorted(curve.counts):
        for seed in curve.seeds:
            wanted |= {
                (name, count, seed): partial(work.train, name, count, seed) for name in curve.names
            }
    for key, make in wanted.items():
        if key not in points or (work.wants_answers(key[1]) and not points[key].correct):
            points[key] = make()
            _append(out, asdict(points[key]))
            on_point(points[key])
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
