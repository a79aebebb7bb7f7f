"""The task set of the gate: training problems whose right answers are known."""

from __future__ import annotations

from s2t_shared.bundled import problems as bundled_problems
from s2t_shared.config import Config
from s2t_shared.data.datasets import open_records, refuse_evaluation
from s2t_shared.data.prompts import read_prompts
from s2t_shared.types import Prompt
from services.evaluation.problems import Problem, Reading, problems_of

UNHARVESTED_SEED = 1_000_000  # of bundled training problems that no harvest of ours uses


def task_problems(config: Config) -> list[Problem]:
    """The problems that both sides answer; empty where there are none for this SLM.

    They are training problems, as they decide what serves.

    Raises:
        EvaluationSplitError: the file, or a row's "split", is for evaluation.
        ConfigError: the file cannot be read.
    """
    training = config.training
    count = training.gate_problem_count
    if training.gate_problems is not None:
        # Refuses a file that is named like one for evaluation.
        open_records(str(training.gate_problems), "train")
        for row, _ in read_prompts(training.gate_problems):
            refuse_evaluation(str(row.get("split", "train")))
        reading = Reading(pattern=config.defaults.answer_pattern)
        return problems_of(training.gate_problems, count, reading)
    if config.slm.model != "bundled":
        return []
    return [_graded(p) for p in bundled_problems.problems("train", count, UNHARVESTED_SEED)]


def _graded(problem: bundled_problems.Problem) -> Problem:
    def is_correct(text: str) -> bool:
        return bundled_problems.is_correct(problem, text)

    return Problem(problem.id, Prompt(text=problem.prompt), is_correct)
