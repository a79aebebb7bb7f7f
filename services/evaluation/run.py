"""Asks every problem in every mode, and keeps what came."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from s2t_shared.errors import S2TError
from s2t_shared.statistics import spearman
from s2t_shared.types import Answer, ChosenBy, DecodeOptions, GenerateRequest, Mode
from services.evaluation.answering import Answerer, OnOutcome
from services.evaluation.figures import Row, Sufficiency, local_choices, row_of, sufficiency
from services.evaluation.journal import Journal, ScoredChoices, ScoredRollout
from services.evaluation.modes import SAMPLE_STRIDE, SEED_STRIDE, ModeSpec
from services.evaluation.problems import Problem
from services.evaluation.records import Record, record_of
from services.rpc.ask_many import Outcome

WARM_UP = 8  # answers before the first row


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What all rows share.

    stop: strings that end an answer. answer_pattern: finds the answer that majority@n votes on.
    steps: keep the divergence points.
    """

    max_new_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    answer_pattern: str = ""
    steps: bool = True

    def identity(self, answerer: Answerer, problems: Sequence[Problem]) -> dict[str, Any]:
        """What makes two runs' answers comparable."""
        asked = hashlib.sha256()
        for problem in problems:
            asked.update(f"{problem.id}\0{problem.prompt}\0{problem.expected}\n".encode())
        return {
            **answerer.identity(),
            "problems": asked.hexdigest()[:16],
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "stop": list(self.stop),
            **({"answer_pattern": self.answer_pattern} if self.answer_pattern else {}),
        }


def run_row(
    answerer: Answerer,
    spec: ModeSpec,
    problems: Sequence[Problem],
    settings: EvaluationSettings,
    journal: Journal,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Ask what the journal lacks of one row. A failed answer counts as wrong.

    Raises:
        S2TError: every single answer failed; the first one's error.
    """
    asked: dict[str, tuple[Problem, int]] = {}
    requests = []
    for number, problem in enumerate(problems):
        for sample in range(spec.samples):
            if (spec.label, problem.id, sample) in journal.records:
                on_answer()
                continue
            request = spec.request(
                problem.prompt,
                request_id=f"eval-{spec.name}-{problem.id}-{sample}",
                max_new_tokens=settings.max_new_tokens,
                seed=settings.seed * SEED_STRIDE + number + sample * SAMPLE_STRIDE,
                return_steps=settings.steps,
                stop=settings.stop,
            )
            asked[request.request_id] = (problem, sample)
            requests.append(replace(request, answer_pattern=settings.answer_pattern))

    def keep(request: GenerateRequest, outcome: Outcome) -> None:
        problem, sample = asked[request.request_id]
        if isinstance(outcome, S2TError):
            journal.add(
                Record(row=spec.label, problem_id=problem.id, sample=sample, error=str(outcome))
            )
        else:
            is_right = problem.is_correct(outcome.text)
            record = record_of(spec, problem.id, sample, outcome, is_right, answerer.tokenizer)
            journal.add(record)

    seconds = _ask(answerer, requests, keep, on_answer)
    if requests:
        journal.add_seconds(spec.label, seconds, len(requests))


def _ask(
    answerer: Answerer,
    requests: Sequence[GenerateRequest],
    keep: OnOutcome,
    on_answer: Callable[[], None],
) -> float:
    """Ask, and keep every outcome; returns how many seconds it took.

    Raises:
        S2TError: every single answer failed; the first one's error.
    """
    if not requests:
        return 0.0
    errors: list[S2TError] = []

    def take(request: GenerateRequest, outcome: Outcome) -> None:
        if isinstance(outcome, S2TError):
            errors.append(outcome)
        keep(request, outcome)
        on_answer()

    answerer.prepare(requests[0])
    started = time.perf_counter()
    answerer.answer(requests, take)
    if len(errors) == len(requests):
        raise errors[0]
    return time.perf_counter() - started


Watch = Callable[[str, int], AbstractContextManager["Watched"]]


class Watched(Protocol):
    """Progress of one row."""

    def advance(self) -> None: ...


def run_all(
    answerer: Answerer,
    specs: Sequence[ModeSpec],
    problems: Sequence[Problem],
    settings: EvaluationSettings,
    journal: Journal,
    scored: int,
    watch: Watch,
) -> tuple[list[Row], Sufficiency | None]:
    """All rows' figures, and local sufficiency on the first `scored` problems (0: None).

    watch: a context that is told of each answer of a row, by the row's name and size.

    Raises:
        S2TError: no answer at all came in some row.
    """
    if any(_is_unfinished(spec, problems, journal) for spec in specs):
        # The first answers are slow, and times are over the first row's: some that nobody counts.
        run_row(answerer, ModeSpec(name="greedy"), problems[:WARM_UP], settings, Journal())
    found = []
    for spec in specs:
        with watch(spec.label, len(problems) * spec.samples) as bar:
            run_row(answerer, spec, problems, settings, journal, bar.advance)
        found.append(row_of(spec, problems, journal))
    part = problems[:scored]
    if not part:
        return found, None
    with watch("scored answers", len(part)) as bar:
        score_rollouts(answerer, part, settings, journal, bar.advance)
    local = {}
    for spec in specs:
        if spec.mode is Mode.S2T_LOCAL:
            with watch(f"{spec.label}, scored", len(part)) as bar:
                score_choices(answerer, spec, part, settings, journal, bar.advance)
            keys = [(spec.label, problem.id) for problem in part]
            local[spec.label] = local_choices(
                [journal.choices[key] for key in keys if key in journal.choices]
            )
    rollouts = [journal.rollouts[p.id] for p in part if p.id in journal.rollouts]
    return found, sufficiency(rollouts, local)


def _is_unfinished(spec: ModeSpec, problems: Sequence[Problem], journal: Journal) -> bool:
    return any(
        (spec.label, problem.id, sample) not in journal.records
        for problem in problems
        for sample in range(spec.samples)
    )


def score_rollouts(
    answerer: Answerer,
    problems: Sequence[Problem],
    settings: EvaluationSettings,
    journal: Journal,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Let the LLM score every step of the SLM's greedy answers. Stores no label.

    Raises:
        S2TError: every single answer failed; the first one's error.
    """
    options = DecodeOptions(max_new_tokens=settings.max_new_tokens, score_rollout=True)
    requests = [
        GenerateRequest(
            request_id=f"hits-{problem.id}",
            prompt=problem.prompt,
            options=options,
            stop=settings.stop,
            return_steps=True,
        )
        for problem in problems
        if problem.id not in journal.rollouts
    ]

    def keep(request: GenerateRequest, outcome: Outcome) -> None:
        if isinstance(outcome, Answer):
            journal.add_rollout(_rollout(request.request_id.removeprefix("hits-"), outcome))

    _ask(answerer, requests, keep, on_answer)


def score_choices(
    answerer: Answerer,
    spec: ModeSpec,
    problems: Sequence[Problem],
    settings: EvaluationSettings,
    journal: Journal,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """Let the LLM score the answers of a local selector. Stores no label.

    Raises:
        S2TError: every single answer failed; the first one's error.
    """
    requests = []
    for problem in problems:
        if (spec.label, problem.id) in journal.choices:
            continue
        request = spec.request(
            problem.prompt,
            request_id=f"choices-{problem.id}",
            max_new_tokens=settings.max_new_tokens,
            return_steps=True,
            stop=settings.stop,
        )
        options = replace(request.options, score_rollout=True)
        requests.append(replace(request, options=options))

    def keep(request: GenerateRequest, outcome: Outcome) -> None:
        if isinstance(outcome, Answer):
            name = request.request_id.removeprefix("choices-")
            journal.add_choices(_choices(spec.label, name, outcome))

    _ask(answerer, requests, keep, on_answer)


def _choices(row: str, problem_id: str, answer: Answer) -> ScoredChoices:
    """Steps that the local selector did not choose, or that the LLM did not see, are left out."""
    rank, chosen, order = [], [], []
    for step in answer.steps:
        ids = step.candidate_ids
        if step.chosen_by is not ChosenBy.LOCAL or step.llm_top_id is None:
            continue
        rank.append(ids.index(step.llm_top_id) if step.llm_top_id in ids else -1)
        chosen.append(ids.index(step.token_id))
        if step.llm is not None and len(ids) > 1:
            rho = spearman(step.scores, step.llm.log_probs[: len(ids)])
            order.append(round(rho, 4))
    return ScoredChoices(row, problem_id, tuple(rank), tuple(chosen), tuple(order))


def _rollout(problem_id: str, answer: Answer) -> ScoredRollout:
    """Steps without the LLM's view (it did not answer) are left out."""
    kl, entropy, rank = [], [], []
    for step in answer.steps:
        if step.kl is None or step.entropy is None or step.llm_top_rank is None:
            continue
        kl.append(round(step.kl, 5))
        entropy.append(round(step.entropy, 5))
        rank.append(step.llm_top_rank)
    return ScoredRollout(problem_id, tuple(kl), tuple(entropy), tuple(rank))
