"""Problems whose answers can be checked: the bundled ones, a file's, reasoning-gym's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from s2t_shared.bundled import problems as pair_problems
from s2t_shared.data.prompts import read_prompts
from s2t_shared.data.templates import prompt_group, tell_templates_apart
from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.types import Prompt
from services.evaluation.graders import grader_for

GYM = "reasoning-gym:"
GYM_TEST_SEED = 1_000_003  # training data made with another seed has other problems


@dataclass(frozen=True)
class Problem:
    """A problem whose answer can be checked.

    group: of problems from one template, "" for a problem of its own. expected: the right answer,
    to be shown.
    """

    id: str
    prompt: Prompt
    is_correct: Callable[[str], bool] = field(compare=False)
    group: str = ""
    expected: str = ""


def problems_of(
    source: str | None, count: int, *, pattern: str = "", grader: str = "number", seed: int = 0
) -> list[Problem]:
    """Problems of "bundled" (also None), of "reasoning-gym:family", or of a JSONL file.

    grader, pattern: see `graders`; the bundled and reasoning-gym's problems bring their own.

    Raises:
        ConfigError: the source cannot be read, or has no problem with an answer.
    """
    if source is None or source == "bundled":
        return bundled_problems(count)
    if source.startswith(GYM):
        return _gym_problems(source.removeprefix(GYM), count, seed)
    return load_problems(Path(source), count, pattern, grader)


def load_problems(
    file: Path | None, count: int, pattern: str, grader: str = "number"
) -> list[Problem]:
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
        is_correct = grader_for(grader, row, pattern)
        group = str(row.get("group") or prompt_group(prompt))
        problems.append(Problem(row["id"], prompt, is_correct, group, str(row["answer"])))
    if not tell_templates_apart([problem.group for problem in problems]):
        problems = [replace(problem, group="") for problem in problems]
    return problems[:count]


def bundled_problems(count: int) -> list[Problem]:
    """Held-out problems of the bundled pair, with their own grader."""
    found = []
    for problem in pair_problems.problems("test", count):
        is_correct = partial(pair_problems.is_correct, problem)
        prompt = Prompt(text=problem.prompt)
        found.append(Problem(problem.id, prompt, is_correct, "", problem.answer))
    return found


# -- reasoning-gym --------------------------------------------------------------------------------


def _gym_problems(family: str, count: int, seed: int) -> list[Problem]:
    """The first problems of a family, each content once, for seeds that no training run uses."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError:
        raise ConfigError(
            f"{GYM}{family} needs reasoning-gym; install it with: pip install 's2t[eval]'"
        ) from None
    try:
        dataset = gym.create_dataset(family, size=2 * count, seed=GYM_TEST_SEED + seed)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{GYM}{family}: {error}") from error
    problems = []
    for number, entry in enumerate(_distinct(dataset)):
        if len(problems) == count:
            break
        prompt = Prompt(text=entry["question"] + "\nEnd with: Answer: <answer>\n")
        is_correct = partial(_gym_grade, dataset, entry)
        identity = f"{family}-{number:05d}"
        group = prompt_group(Prompt(text=entry["question"]))
        problems.append(Problem(identity, prompt, is_correct, group, str(entry["answer"])))
    if not tell_templates_apart([problem.group for problem in problems]):
        problems = [replace(problem, group="") for problem in problems]
    return problems


def _distinct(dataset: Any) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for entry in dataset:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry


def _gym_grade(dataset: Any, entry: dict[str, Any], text: str) -> bool:
    _, stated, answer = text.rpartition("Answer:")
    if not stated:
        return False
    first_line = answer.strip().split("\n")[0].strip()
    return bool(dataset.score_answer(first_line, entry) >= 1.0)
