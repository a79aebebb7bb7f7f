"""The gate: is a new version good enough to go live? Pure numbers in, a verdict with its reasons
out.

Both versions select at the same held-out labels, and labels of one problem are alike: so the
intervals are paired and clustered by problem (`metrics.clustered_difference`). Knows no models,
labels or registry.

What the interval does not cover: every version that is judged has a chance of up to 2.5 % to pass
without being better, and rounds of training judge on the same test labels again and again; with
many, one will pass by luck. The figure that is published is the winner's, chosen by these labels,
hence a little too high. New problems mend both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from s2t_shared.statistics import clustered_difference


@dataclass(frozen=True)
class GateSettings:
    """`min_gain`: the lower end of Agree@1's 95 % interval (new - live) must be above it.
    `max_lm_kl`: nats per token by which the adapter may move the language model on its contexts.
    `max_task_loss`: None refuses only a significant loss of accuracy on the task set (its whole
    interval below 0); a number is a margin of non-inferiority: the interval's lower end must not be
    below -max_task_loss. `min_problems`: with fewer held-out problems nothing is judged, as an
    interval over them would mean little."""

    min_gain: float = 0.0
    max_lm_kl: float = 0.1
    max_task_loss: float | None = None
    min_problems: int = 20


@dataclass(frozen=True)
class Paired:
    """The same items judged for both sides: whether each was right, and the problem each belongs
    to."""

    new: Sequence[bool]
    old: Sequence[bool]
    problems: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.new) == len(self.old) == len(self.problems), (
            "one outcome of each side per item"
        )

    @property
    def clusters(self) -> int:
        return len(set(self.problems))


@dataclass(frozen=True)
class Verdict:
    """Whether the gate opens; why not (or, where it opens, what was found); the numbers behind the
    sentences."""

    passed: bool
    reasons: tuple[str, ...]
    figures: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Finding:
    passed: bool
    text: str
    figures: dict[str, float]


def judge(
    labels: Paired,
    lm_kl: float | None,
    tasks: Paired | None = None,
    against: str = "the SLM alone",
    settings: GateSettings = GateSettings(),
) -> Verdict:
    """Judge a new version against what is live.

    labels: agreement with the LLM on held-out labels, by new and live version (or the SLM alone).
    lm_kl: nats per token, None where the adapter never touches the context (`reads: base`). tasks:
    correct answers on a task set. against: what the other side is called, for the sentences.
    """
    findings = [_agreement(labels, against, settings)]
    if lm_kl is not None:
        findings.append(_language_model(lm_kl, settings))
    if tasks is not None and tasks.problems:
        findings.append(_task(tasks, against, settings))
    failed = [f for f in findings if not f.passed]
    figures = {name: value for f in findings for name, value in f.figures.items()}
    return Verdict(not failed, tuple(f.text for f in failed or findings), figures)


def _agreement(labels: Paired, against: str, settings: GateSettings) -> _Finding:
    n, clusters = len(labels.new), labels.clusters
    if clusters < settings.min_problems:
        return _Finding(
            False,
            f"more labels are needed: {n:,} held-out labels of {clusters:,} problems are too few to "
            f"compare versions on (at least {settings.min_problems} problems); harvest more",
            {"labels": n, "problems": clusters},
        )
    difference, half = clustered_difference(labels.new, labels.old, labels.problems)
    low = difference - half
    passed = low > settings.min_gain
    text = (
        f"{_comparison('held-out Agree@1', labels, against, difference, half)} ({n:,} labels of {clusters:,} "
        f"problems): {'' if passed else 'not '}above {_bound(settings.min_gain)}"
    )
    gain = difference - settings.min_gain
    if not passed and gain > 0:
        # The half width shrinks with the root of the number of problems.
        text += f"; a gain of this size would show with about {math.ceil(clusters * (half / gain) ** 2):,} problems"
    return _Finding(
        passed,
        text,
        {
            "agree_at_1": _mean(labels.new),
            "agree_at_1_old": _mean(labels.old),
            "difference": difference,
            "difference_low": low,
            "difference_high": difference + half,
            "labels": n,
            "problems": clusters,
        },
    )


def _language_model(lm_kl: float, settings: GateSettings) -> _Finding:
    passed = lm_kl <= settings.max_lm_kl  # False for NaN
    return _Finding(
        passed,
        f"LM-KL {lm_kl:.3g} nats per token: {'within' if passed else 'above'} the bound of "
        f"{settings.max_lm_kl:g}"
        + ("" if passed else "; train with a larger reg_weight or fewer steps"),
        {"lm_kl": lm_kl},
    )


def _task(tasks: Paired, against: str, settings: GateSettings) -> _Finding:
    difference, half = clustered_difference(tasks.new, tasks.old, tasks.problems)
    low, high = difference - half, difference + half
    if settings.max_task_loss is None:
        passed = not high < 0
        verdict = "no significant loss" if passed else "a significant loss"
    else:
        passed = low >= -settings.max_task_loss
        verdict = f"a loss of {_share(settings.max_task_loss)} is {'ruled out' if passed else 'not ruled out'}"
    return _Finding(
        passed,
        f"{_comparison('task accuracy', tasks, against, difference, half)} "
        f"({tasks.clusters:,} problems): {verdict}",
        {
            "task_accuracy": _mean(tasks.new),
            "task_accuracy_old": _mean(tasks.old),
            "task_difference": difference,
            "task_difference_low": low,
            "task_difference_high": high,
            "task_problems": tasks.clusters,
        },
    )


def _comparison(what: str, paired: Paired, against: str, difference: float, half: float) -> str:
    interval = (
        f"95 % interval {_signed(difference - half)} to {_signed(difference + half)}"
        if math.isfinite(half)
        else "no interval"
    )
    return (
        f"{what} {_share(_mean(paired.new))} against {_share(_mean(paired.old))} of {against}: "
        f"difference {_signed(difference)}, {interval}"
    )


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _share(value: float) -> str:
    """.812, as shares are printed."""
    return f"{value:.3f}".replace("0.", ".", 1) if value < 1 else f"{value:.3f}"


def _signed(value: float) -> str:
    text = _share(abs(value))
    return text if text == ".000" else ("+" if value > 0 else "-") + text


def _bound(value: float) -> str:
    return "0" if value == 0 else _signed(value)
