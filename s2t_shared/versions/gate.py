"""The gate: may a new version go live? Takes outcomes on held-out data, returns a verdict.

Answers decide: their accuracy where right answers are known, and how likely the LLM finds them
where an LLM is at hand. A gain in either opens the gate, a loss in any measure closes it. Agreement
with the LLM at held-out labels is a guard: it proved a poor guide to answers. It decides only where
there are no answers to judge by.

Both sides answer the same prompts, and items of one group of problems are correlated. So intervals
are paired and clustered by group (`statistics.clustered_difference`). Knows no models, labels or
files.

What the interval does not cover: a version that is no better passes with a probability of up to
2.5 %. Rounds of training reuse the same held-out problems, so after many rounds one passes by luck.
The published figure is the winner's on these problems, hence a little too high. New problems cure
both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

from s2t_shared.statistics import Z95, clustered_difference
from s2t_shared.versions.live import Live

TAKEN_BACK = ("rolled back", "canary ended")  # events
ALPHA = 0.025  # chance that a version which is no better shows a gain
POWER = 0.8  # chance that a gain of the size that is said to be detectable shows


@dataclass(frozen=True)
class GateSettings:
    """Bounds that a new version must keep.

    max_lm_kl: nats per token by which the adapter may change the language model on its contexts.
    max_task_loss: margin of non-inferiority; the lower end of the task accuracy's interval must
    not be below -max_task_loss. None refuses only a significant loss (interval below 0).
    min_groups: with fewer held-out groups of problems every version is refused.
    """

    max_lm_kl: float = 0.1
    max_task_loss: float | None = None
    min_groups: int = 5


@dataclass(frozen=True)
class Paired:
    """Outcomes of two versions on the same items. A higher value is better.

    groups: of each item its group of problems.
    """

    new: Sequence[float]
    old: Sequence[float]
    groups: Sequence[str]

    def __post_init__(self) -> None:
        assert len(self.new) == len(self.old) == len(self.groups), (
            "one outcome of each side per item"
        )

    @property
    def clusters(self) -> int:
        """Number of groups."""
        return len(set(self.groups))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a new version was measured on, beside the old side.

    labels: whether each held-out label's best candidate was chosen. tasks: whether each problem of
    the task set was answered right; None without one. likelihood: the LLM's mean log-probability
    per token of each answer to a held-out prompt, nats; None without an LLM. finished: whether each
    of these answers ended by itself. lm_kl: nats per token by which the adapter changes the
    language model; None where it never acts on the context (`reads: base`).
    """

    labels: Paired
    tasks: Paired | None = None
    likelihood: Paired | None = None
    finished: Paired | None = None
    lm_kl: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether the gate opens. reasons: why not, or which gains opened it. figures: of all
    measures."""

    passed: bool
    reasons: tuple[str, ...]
    figures: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Finding:
    """gains, loses: whether the measure speaks for or against the version."""

    gains: bool
    loses: bool
    text: str
    figures: dict[str, float]


def judge(
    evidence: Evidence, against: str = "the SLM alone", settings: GateSettings = GateSettings()
) -> Verdict:
    """Judge a new version against the live one, or against the SLM alone.

    against: name of the old side in the reasons.
    """
    if evidence.labels.clusters < settings.min_groups:
        return _too_few(evidence.labels, settings)
    answers = _of_answers(evidence, against, settings)
    guards = _guards(evidence, against, settings, decides=not answers)
    deciding = answers or guards[:1]
    findings = [*answers, *guards]
    losses = [finding for finding in findings if finding.loses]
    figures: dict[str, float] = {}
    for finding in findings:
        figures.update(finding.figures)
    if losses:
        return Verdict(False, tuple(loss.text for loss in losses), figures)
    if not any(finding.gains for finding in deciding):
        return Verdict(False, tuple(finding.text for finding in deciding), figures)
    gains = tuple(finding.text for finding in deciding if finding.gains)
    return Verdict(True, gains, figures)


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


def _too_few(labels: Paired, settings: GateSettings) -> Verdict:
    count = len(labels.new)
    reason = (
        f"more labels are needed: {count:,} held-out labels of {labels.clusters:,} groups of "
        f"problems are too few to compare versions on (at least {settings.min_groups}); harvest "
        "more groups"
    )
    return Verdict(False, (reason,), {"labels": count, "groups": labels.clusters})


def _of_answers(evidence: Evidence, against: str, settings: GateSettings) -> list[_Finding]:
    """The measures that decide, as far as there are any."""
    present = [evidence.tasks, evidence.likelihood]
    tests = sum(paired is not None and bool(paired.groups) for paired in present)
    findings = []
    if evidence.tasks is not None and evidence.tasks.groups:
        findings.append(_task(evidence.tasks, against, settings, tests))
    if evidence.likelihood is not None and evidence.likelihood.groups:
        what = "the LLM's log-probability per token of the answers"
        found = _compare(what, evidence.likelihood, against, "likelihood", tests)
        findings.append(found)
    return findings


def _guards(
    evidence: Evidence, against: str, settings: GateSettings, decides: bool
) -> list[_Finding]:
    """Agreement first, then the bounds. decides: whether agreement must show a gain."""
    agreement = _compare("held-out Agree@1", evidence.labels, against, "agree_at_1")
    if not decides:
        agreement = _as_guard(agreement)
    findings = [agreement]
    if evidence.finished is not None and evidence.finished.groups:
        found = _compare("share of finished answers", evidence.finished, against, "finished")
        findings.append(_as_guard(found))
    if evidence.lm_kl is not None:
        findings.append(_language_model(evidence.lm_kl, settings))
    return findings


def _compare(what: str, paired: Paired, against: str, name: str, tests: int = 1) -> _Finding:
    """Whether a measure rose or fell by more than its interval.

    tests: of how many measures any one may open the gate. They share ALPHA (Bonferroni).
    """
    difference, half = clustered_difference(paired.new, paired.old, paired.groups)
    gains = difference - half * _widening(tests) > 0
    loses = difference + half < 0
    new, old = _mean(paired.new), _mean(paired.old)
    interval = "no interval"
    if math.isfinite(half):
        interval = f"95 % interval {_signed(difference - half)} to {_signed(difference + half)}"
    text = (
        f"{what} {_number(new)} against {_number(old)} of {against}: difference "
        f"{_signed(difference)}, {interval} ({len(paired.new):,} items of {paired.clusters:,} "
        f"groups): {_word(gains, loses)}"
    )
    if not gains and not loses and math.isfinite(half):
        text += f"; one of {_signed(detectable(half, tests))} would have shown"
    figures = {
        name: new,
        f"{name}_old": old,
        f"{name}_difference": difference,
        f"{name}_low": difference - half,
        f"{name}_high": difference + half,
        f"{name}_detectable": detectable(half, tests),
        f"{name}_items": len(paired.new),
        f"{name}_groups": paired.clusters,
    }
    return _Finding(gains, loses, text, figures)


def detectable(half: float, tests: int = 1) -> float:
    """The gain that shows with probability POWER, from the half width of the 95 % interval."""
    normal = NormalDist()
    needed = normal.inv_cdf(1 - ALPHA / tests) + normal.inv_cdf(POWER)
    return half / Z95 * needed


def _widening(tests: int) -> float:
    """How much wider than 95 % the interval is of one of several tests that share ALPHA."""
    return NormalDist().inv_cdf(1 - ALPHA / tests) / Z95


def _as_guard(finding: _Finding) -> _Finding:
    """A measure that only refuses."""
    return replace(finding, gains=False)


def _task(tasks: Paired, against: str, settings: GateSettings, tests: int) -> _Finding:
    found = _compare("task accuracy", tasks, against, "task_accuracy", tests)
    bound = settings.max_task_loss
    if bound is None or found.gains:
        return found
    loses = found.figures["task_accuracy_low"] < -bound
    ruled = "not ruled out" if loses else "ruled out"
    text = f"{found.text}; a loss of {_number(bound)} is {ruled}"
    return _Finding(found.gains, loses, text, found.figures)


def _language_model(lm_kl: float, settings: GateSettings) -> _Finding:
    within = lm_kl <= settings.max_lm_kl  # False for NaN
    side = "within" if within else "above"
    text = f"LM-KL {lm_kl:.3g} nats per token: {side} the bound of {settings.max_lm_kl:g}"
    if not within:
        text += "; train with a larger reg_weight or fewer steps"
    return _Finding(False, not within, text, {"lm_kl": lm_kl})


# -- words ----------------------------------------------------------------------------------------


def _word(gains: bool, loses: bool) -> str:
    if gains:
        return "a gain"
    return "a significant loss" if loses else "no significant gain"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    """For example ".812" or "-1.204"."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _signed(value: float) -> str:
    text = _number(abs(value))
    if text == ".000":
        return text
    return f"+{text}" if value > 0 else f"-{text}"
