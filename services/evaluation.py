"""Evaluates modes on the same problems through a running service.

Figures: accuracy with intervals, cost, and local sufficiency (Hit@K).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from s2t_shared.bundled import problems as pair_problems
from s2t_shared.data.prompts import read_prompts
from s2t_shared.data.templates import prompt_group, tell_templates_apart
from s2t_shared.decode.generate import extract_answer
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.requests import new_request
from s2t_shared.statistics import hit_at, paired_difference, wilson_interval
from s2t_shared.types import (
    WARMUP_STEPS,
    Answer,
    DecodeOptions,
    GenerateRequest,
    Prompt,
    Sampling,
    Usage,
)
from services.rpc.ask_many import Target, answer_all

SEED_STRIDE = 1_000_003  # between the seeds of two runs


@dataclass(frozen=True)
class Problem:
    """A problem whose answer can be checked.

    group: of problems from one template, "" for a problem of its own.
    """

    id: str
    prompt: Prompt
    is_correct: Callable[[str], bool]
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class ModeSpec:
    """One row of the table.

    name: a mode, or majority@n. trigger, budget: where the mode has them. candidates: K.
    version: of the local selector; None means the live one.
    """

    name: str
    trigger: str = ""
    budget: float | None = None
    candidates: int = 8
    version: str | None = None

    @property
    def label(self) -> str:
        """The row's name in a table."""
        if not self.trigger:
            return self.name
        budget = f" {self.budget:.0%}" if self.budget else ""
        return f"{self.name} {self.trigger}{budget}"

    def request(
        self,
        prompt: Prompt,
        *,
        request_id: str,
        max_new_tokens: int,
        seed: int = 0,
        return_steps: bool = False,
    ) -> GenerateRequest:
        """The request that asks a prompt in this mode. Selections are never taken from a cache."""
        request = new_request(
            prompt,
            self.name,
            trigger=self.trigger or "entropy",
            budget=self.budget,
            threshold=0.0 if self.budget is None else None,
            candidates=self.candidates,
            max_new_tokens=max_new_tokens,
            version=self.version,
            sampling=Sampling(seed=seed),
            steps=return_steps,
            request_id=request_id,
        )
        options = replace(request.options, fresh_selections=True)
        return replace(request, options=options)


@dataclass(frozen=True, kw_only=True)
class ModeResult:
    """Figures of one mode.

    seconds: wall time for all problems, at the same concurrency as the other modes.
    """

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
    requests = []
    for i, problem in enumerate(problems):
        request = spec.request(
            problem.prompt,
            request_id=f"eval-{spec.name}-{problem.id}",
            max_new_tokens=max_new_tokens,
            seed=seed * SEED_STRIDE + i,
        )
        requests.append(request)
    started = time.perf_counter()
    outcomes = answer_all(target, requests, concurrency, on_answer=lambda _: on_answer())
    seconds = time.perf_counter() - started
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    if not answers:
        raise next(outcome for outcome in outcomes if isinstance(outcome, S2TError))
    correct = []
    for problem, outcome in zip(problems, outcomes, strict=True):
        correct.append(isinstance(outcome, Answer) and problem.is_correct(outcome.text))
    usage = sum((answer.usage for answer in answers), Usage())
    return ModeResult(
        spec=spec,
        correct=tuple(correct),
        tokens=usage.completion_tokens,
        triggers=usage.triggers,
        flips=usage.flips,
        llm_forwards=usage.llm_forwards,
        degraded=usage.degraded_steps,
        seconds=seconds,
        failed=len(outcomes) - len(answers),
    )


def local_sufficiency(
    target: Target, problems: Sequence[Problem], max_new_tokens: int, share: float = 0.05
) -> dict[int, float]:
    """Hit@1/2/4/8 at the top `share` of steps by KL of greedy SLM rollouts. Stores no label.

    Warm-up steps are left out, because they never trigger in decoding either.
    """
    options = DecodeOptions(max_new_tokens=max_new_tokens, score_rollout=True)
    requests = [
        GenerateRequest(
            request_id=f"hits-{problem.id}",
            prompt=problem.prompt,
            options=options,
            return_steps=True,
        )
        for problem in problems
    ]
    outcomes = answer_all(target, requests)
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    total = sum(len(answer.steps) for answer in answers)
    scored: list[tuple[float, int]] = []
    for answer in answers:
        for step in answer.steps[WARMUP_STEPS:]:
            if step.kl is not None and step.llm_top_rank is not None:
                scored.append((step.kl, step.llm_top_rank))
    scored.sort(key=lambda pair: pair[0], reverse=True)
    ranks = [rank for _, rank in scored[: max(1, int(share * total))]]
    return hit_at(ranks)


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
    """Problems of a JSONL file whose lines have an "answer"; without a file the bundled pair's.

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
        is_correct = answers_match(str(row["answer"]), pattern)
        group = str(row.get("group") or prompt_group(prompt))
        problems.append(Problem(row["id"], prompt, is_correct, group))
    if not tell_templates_apart([problem.group for problem in problems]):
        problems = [replace(problem, group="") for problem in problems]
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
    """The figures as a table for the terminal."""
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
