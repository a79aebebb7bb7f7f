"""The gate: may a new version go live? Takes outcomes on held-out data, returns a verdict.

Both versions select at the same held-out labels, and labels of one problem are correlated. So the
intervals are paired and clustered by problem (`statistics.clustered_difference`). Knows no models,
labels or files.

What the interval does not cover: a version that is no better passes with a probability of up to
2.5 %. Rounds of training reuse the same test labels, so after many rounds one passes by luck. The
published figure is the winner's on these labels, hence a little too high. New problems cure both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from s2t_shared.statistics import clustered_difference
from s2t_shared.versions.live import Live

TAKEN_BACK = ("rolled back", "canary ended")  # events


@dataclass(frozen=True)
class GateSettings:
    """Bounds that a new version must keep.

    min_gain: the lower end of the 95 % interval of Agree@1 (new - live) must be above it.
    max_lm_kl: nats per token by which the adapter may change the language model on its contexts.
    max_task_loss: margin of non-inferiority; the lower end of the task accuracy's interval must
        not be below -max_task_loss. None refuses only a significant loss (interval below 0).
    min_problems: with fewer held-out problems every version is refused.
    """

    min_gain: float = 0.0
    max_lm_kl: float = 0.1
    max_task_loss: float | None = None
    min_problems: int = 20


@dataclass(frozen=True)
class Paired:
    """Outcomes of two versions on the same items: whether each was right, and its problem's id."""

    new: Sequence[bool]
    old: Sequence[bool]
    problems: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.new) == len(self.old) == len(self.problems), (
            "one outcome of each side per item"
        )

    @property
    def clusters(self) -> int:
        """Number of problems."""
        return len(set(self.problems))


@dataclass(frozen=True)
class Verdict:
    """Whether the gate opens. reasons: why not, or what was found. figures: their numbers."""

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
    """Judge a new version against the live one, or against the SLM alone.

    labels: agreement with the LLM on held-out labels. lm_kl: nats per token; None where the
    adapter never acts on the context (`reads: base`). tasks: correct answers on a task set.
    against: name of the old side in the reasons.
    """
    findings = [_agreement(labels, against, settings)]
    if lm_kl is not None:
        findings.append(_language_model(lm_kl, settings))
    if tasks is not None and tasks.problems:
        findings.append(_task(tasks, against, settings))
    failed = [f for f in findings if not f.passed]
    figures: dict[str, float] = {}
    for finding in findings:
        figures.update(finding.figures)
    return Verdict(not failed, tuple(f.text for f in failed or findings), figures)


def objection(live: Live, events: Sequence[Mapping[str, Any]], version: str) -> str:
    """Why only an operator should make `version` live now, "" for no reason.

    An operator has put a canary on trial, or has taken this version back.

    events: of this version, oldest first.
    """
    command = f"s2t versions promote {version}"
    if live.canary is not None:
        return (
            f"the canary {live.canary.version} is on trial; end it (s2t versions rollback), "
            f"or make this version live ({command})"
        )
    moves = [event.get("event") for event in events if event.get("event") != "gate"]
    if moves and moves[-1] in TAKEN_BACK:
        return f"it was rolled back; to make it live again: {command}"
    return ""


# -- findings -------------------------------------------------------------------------------------


def _agreement(labels: Paired, against: str, settings: GateSettings) -> _Finding:
    n = len(labels.new)
    clusters = labels.clusters
    if clusters < settings.min_problems:
        return _Finding(
            False,
            f"more labels are needed: {n:,} held-out labels of {clusters:,} problems are too few "
            f"to compare versions on (at least {settings.min_problems} problems); harvest more",
            {"labels": n, "problems": clusters},
        )
    difference, half = clustered_difference(labels.new, labels.old, labels.problems)
    low = difference - half
    passed = low > settings.min_gain
    comparison = _comparison("held-out Agree@1", labels, against, difference, half)
    size = f"({n:,} labels of {clusters:,} problems)"
    text = f"{comparison} {size}: {'' if passed else 'not '}above {_bound(settings.min_gain)}"
    gain = difference - settings.min_gain
    if not passed and gain > 0:
        # The half width shrinks with the root of the number of problems.
        needed = math.ceil(clusters * (half / gain) ** 2)
        text += f"; a gain of this size would show with about {needed:,} problems"
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
    side = "within" if passed else "above"
    text = f"LM-KL {lm_kl:.3g} nats per token: {side} the bound of {settings.max_lm_kl:g}"
    if not passed:
        text += "; train with a larger reg_weight or fewer steps"
    return _Finding(passed, text, {"lm_kl": lm_kl})


def _task(tasks: Paired, against: str, settings: GateSettings) -> _Finding:
    difference, half = clustered_difference(tasks.new, tasks.old, tasks.problems)
    low = difference - half
    high = difference + half
    if settings.max_task_loss is None:
        passed = not high < 0
        verdict = "no significant loss" if passed else "a significant loss"
    else:
        passed = low >= -settings.max_task_loss
        found = "ruled out" if passed else "not ruled out"
        verdict = f"a loss of {_share(settings.max_task_loss)} is {found}"
    comparison = _comparison("task accuracy", tasks, against, difference, half)
    return _Finding(
        passed,
        f"{comparison} ({tasks.clusters:,} problems): {verdict}",
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
    interval = "no interval"
    if math.isfinite(half):
        interval = f"95 % interval {_signed(difference - half)} to {_signed(difference + half)}"
    new = _share(_mean(paired.new))
    old = _share(_mean(paired.old))
    return f"{what} {new} against {old} of {against}: difference {_signed(difference)}, {interval}"


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _share(value: float) -> str:
    """For example ".812"."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if value < 1 else text


def _signed(value: float) -> str:
    text = _share(abs(value))
    if text == ".000":
        return text
    return f"+{text}" if value > 0 else f"-{text}"


def _bound(value: float) -> str:
    return "0" if value == 0 else _signed(value)
