"""Every mode on the same problems through a running service: accuracy with intervals, cost, local
sufficiency."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from s2t_shared.bundled import problems as pair_problems
from s2t_shared.data.prompts import read_prompts
from s2t_shared.decode.generate import extract_answer
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.pb.v1 import generation_pb2 as pb
from s2t_shared.statistics import hit_at, paired_difference, wilson_interval
from s2t_shared.types import Prompt
from services.rpc.ask_many import Target, answer_all, prompt_fields


@dataclass(frozen=True)
class Problem:
    """A problem whose answer can be checked."""

    id: str
    prompt: Prompt
    is_correct: Callable[[str], bool]


@dataclass(frozen=True)
class ModeSpec:
    """One row of the table. `name`: a mode, or majority@n; `trigger` and `budget` where the mode
    has them."""

    name: str
    trigger: str = ""
    budget: float | None = None
    version: str | None = None

    @property
    def label(self) -> str:
        budget = f" {self.budget:.0%}" if self.budget else ""
        return f"{self.name} {self.trigger}{budget}" if self.trigger else self.name

    def parameters(self, prompt: Prompt, max_new_tokens: int, seed: int) -> pb.GenerationParameters:
        mode, _, samples = self.name.partition("@")
        p = pb.GenerationParameters(
            **prompt_fields(prompt),
            mode=f"MODE_{mode.upper()}",
            trigger=f"TRIGGER_{self.trigger.upper() or 'UNSPECIFIED'}",
            max_new_tokens=max_new_tokens,
            sampling=pb.Sampling(seed=seed),
            fresh_selections=True,
            labels=pb.LabelOptions(store=False),
        )
        if samples:
            p.samples = int(samples)
        if self.budget is not None:
            p.budget = self.budget
        if self.version is not None:
            p.version = self.version
        return p


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """Figures of one mode. `seconds`: wall time for all problems at the same concurrency as the
    other modes."""

    spec: ModeSpec
    correct: tuple[bool, ...]
    tokens: int
    triggers: int
    flips: int
    llm_forwards: int
    degraded: int
    seconds: float
    failed: int

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(sum(self.correct), len(self.correct))

    @property
    def trigger_rate(self) -> float:
        return self.triggers / max(1, self.tokens)

    @property
    def llm_forwards_per_token(self) -> float:
        return self.llm_forwards / max(1, self.tokens)

    def gain_over(self, other: ModeResult) -> tuple[float, float]:
        """Difference in accuracy on the same problems, and the half width of its 95 % interval."""
        return paired_difference(self.correct, other.correct)


def run_mode(
    target: Target,
    spec: ModeSpec,
    problems: Sequence[Problem],
    max_new_tokens: int,
    seed: int = 0,
    concurrency: int = 32,
    on_answer: Callable[[], None] = lambda: None,
) -> ModeResult:
    """Ask every problem in one mode. A failed answer counts as wrong.

    Raises:
        S2TError: every single answer failed; the first one's error.
    """
    started = time.perf_counter()
    questions = (
        (
            f"eval-{spec.name}-{p.id}",
            spec.parameters(p.prompt, max_new_tokens, seed * 1_000_003 + i),
        )
        for i, p in enumerate(problems)
    )
    answers = answer_all(target, questions, concurrency, on_answer=lambda _: on_answer())
    seconds = time.perf_counter() - started
    good = [a for a in answers if isinstance(a, pb.Answer)]
    if not good:
        raise next(a for a in answers if isinstance(a, S2TError))
    correct = tuple(
        isinstance(a, pb.Answer) and p.is_correct(a.text)
        for p, a in zip(problems, answers, strict=True)
    )
    return ModeResult(
        spec=spec,
        correct=correct,
        tokens=sum(a.usage.completion_tokens for a in good),
        triggers=sum(a.usage.triggers for a in good),
        flips=sum(a.usage.flips for a in good),
        llm_forwards=sum(a.usage.llm_forwards for a in good),
        degraded=sum(a.usage.degraded_steps for a in good),
        seconds=seconds,
        failed=len(answers) - len(good),
    )


def local_sufficiency(
    target: Target, problems: Sequence[Problem], max_new_tokens: int, share: float = 0.05
) -> dict[int, float]:
    """Hit@1/2/4/8 at the top `share` of steps by KL of greedy SLM rollouts (warm-up left out).
    Stores no label."""
    questions = (
        (
            f"hits-{p.id}",
            pb.GenerationParameters(
                **prompt_fields(p.prompt),
                mode=pb.MODE_GREEDY,
                max_new_tokens=max_new_tokens,
                score_rollout=True,
                return_steps=True,
                labels=pb.LabelOptions(store=False),
            ),
        )
        for p in problems
    )
    answers = [a for a in answer_all(target, questions) if isinstance(a, pb.Answer)]
    total = sum(len(a.steps) for a in answers)
    steps = [s for a in answers for s in a.steps if s.index >= 3 and s.HasField("kl")]
    top = sorted(steps, key=lambda s: s.kl, reverse=True)[: max(1, int(share * total))]
    return {k: hit_at([s.llm_top_rank for s in top], k) for k in (1, 2, 4, 8)}


def answers_match(expected: str, pattern: str = "") -> Callable[[str], bool]:
    """A grader for a stated answer: equal as text, or as a number."""
    wanted = extract_answer(expected, pattern) or expected.strip()

    def check(text: str) -> bool:
        found = extract_answer(text, pattern)
        if found is None:
            return False
        try:
            return float(found) == float(wanted)
        except ValueError:
            return found.strip() == wanted.strip()

    return check


def load_problems(file: Path | None, count: int, pattern: str) -> list[Problem]:
    """Problems of a JSONL file with "answer" beside the prompt, or the bundled pair's held-out
    ones.

    Raises:
        ConfigError: the file cannot be read, or a line has no prompt or no answer.
    """
    if file is None:
        return bundled_problems(count)
    problems = []
    for row, prompt in read_prompts(file):
        if isinstance(prompt, InvalidRequestError):
            raise ConfigError(f"{str(file)!r}: {prompt}")
        if not isinstance(row.get("answer"), (str, int, float)):
            raise ConfigError(f'{str(file)!r}: line {row["line"]}: "answer" is missing')
        problems.append(Problem(row["id"], prompt, answers_match(str(row["answer"]), pattern)))
    return problems[:count]


def bundled_problems(count: int) -> list[Problem]:
    """Held-out problems of the bundled pair, with their own grader."""
    return [
        Problem(p.id, Prompt(text=p.prompt), partial(pair_problems.is_correct, p))
        for p in pair_problems.problems("test", count)
    ]


def as_rows(results: Sequence[ModeResult]) -> dict[str, dict[str, Any]]:
    """Figures by mode; times and gains are relative to the first one."""
    first = results[0]
    return {
        r.spec.label: {
            "accuracy": r.accuracy,
            "n": len(r.correct),
            "interval": list(r.interval),
            "gain": list(r.gain_over(first)),
            "trigger_rate": r.trigger_rate,
            "llm_forwards_per_token": r.llm_forwards_per_token,
            "relative_time": r.seconds / first.seconds,
            "degraded": r.degraded,
            "failed": r.failed,
        }
        for r in results
    }


def table(results: Sequence[ModeResult], title: str) -> Table:
    """The same for people."""
    first = results[0]
    shown = Table(title=title, title_justify="left")
    for column in (
        "mode",
        "accuracy",
        "95 % interval",
        f"paired gain\nover {first.spec.name}",
        "triggered",
        "LLM forwards\nper token",
        f"time /\n{first.spec.name}",
    ):
        shown.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    for r in results:
        gain, half = r.gain_over(first)
        shown.add_row(
            r.spec.label,
            f"{r.accuracy:.3f}",
            f"{r.interval[0]:.2f} - {r.interval[1]:.2f}",
            "" if r is first else f"{gain:+.3f} ± {half:.3f}",
            f"{r.trigger_rate:.1%}",
            f"{r.llm_forwards_per_token:.3f}",
            f"{r.seconds / first.seconds:.2f}",
        )
    return shown
