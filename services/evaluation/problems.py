"""Problems whose answers can be checked: the bundled ones, a file's, reasoning-gym's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from s2t_shared.bundled import problems as pair_problems
from s2t_shared.data.prompts import PromptSource, read_problems
from s2t_shared.data.templates import prompt_group, tell_templates_apart
from s2t_shared.errors import ConfigError, InvalidRequestError
from s2t_shared.types import Message, Prompt
from services.evaluation.graders import grader_for

GYM = "reasoning-gym:"
GYM_TEST_SEED = 1_000_003  # training data made with another seed has other problems


@dataclass(frozen=True)
class Problem:
    """A problem whose answer can be checked.

    group: of problems from one template, "" for a problem of its own. expected: the right answer,
    to be shown. task: where several tasks are asked, the one that it is from.
    """

    id: str
    prompt: Prompt
    is_correct: Callable[[str], bool] = field(compare=False)
    group: str = ""
    expected: str = ""
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How problems are read and graded; the bundled and reasoning-gym's bring their own.

    rows: how a row of a data set becomes a prompt; None for plain JSONL. examples: turns of a chat
    that come before every question. answer_column: where the right answer stands. pattern, grader:
    see `graders`. seed: of reasoning-gym.
    """

    rows: PromptSource | None = None
    examples: tuple[Message, ...] = ()
    answer_column: str = "answer"
    pattern: str = ""
    grader: str = "number"
    seed: int = 0


def problems_of(
    source: str | Path | None, count: int, reading: Reading = Reading()
) -> list[Problem]:
    """The first problems of "bundled" (also None), of "reasoning-gym:family", or of a data set.

    Raises:
        ConfigError: the source cannot be read, or a row has no prompt or no answer.
    """
    if source is None or source == "bundled":
        return bundled_problems(count)
    if isinstance(source, str) and source.startswith(GYM):
        return _gym_problems(source.removeprefix(GYM), count, reading)
    rows = reading.rows or PromptSource(source=str(source))
    problems: list[Problem] = []
    for row, prompt in read_problems(rows):
        if len(problems) == count:
            break
        if isinstance(prompt, InvalidRequestError):
            raise ConfigError(f"{str(source)!r}: {prompt}")
        answer = row.get(reading.answer_column)
        if not isinstance(answer, (str, int, float)):
            raise ConfigError(
                f"{str(source)!r}: {row['id']}: {reading.answer_column!r} is missing; "
                "it must hold the right answer"
            )
        is_correct = grader_for(reading.grader, {**row, "answer": answer}, reading.pattern)
        asked = after_examples(prompt, reading.examples)
        problems.append(Problem(row["id"], asked, is_correct, row["group"], str(answer)))
    return _grouped(problems)


def read_examples(rows: PromptSource, answer_column: str = "answer") -> tuple[Message, ...]:
    """Worked examples as turns of a chat: a question by the user, its answer by the assistant.

    Raises:
        ConfigError: the source cannot be read or is empty, or a row has no question or no answer.
    """
    turns: list[Message] = []
    for row, prompt in read_problems(replace(rows, system=None, chat=False)):
        answer = row.get(answer_column)
        if isinstance(prompt, InvalidRequestError) or not prompt.text:
            reason = prompt if isinstance(prompt, InvalidRequestError) else "text is needed"
            raise ConfigError(f"examples {rows.source!r}: {reason}")
        if not isinstance(answer, str) or not answer:
            raise ConfigError(
                f"examples {rows.source!r}: {row['id']}: {answer_column!r} must hold the worked "
                "answer, a text"
            )
        turns += [Message("user", prompt.text), Message("assistant", answer)]
    if not turns:
        raise ConfigError(f"examples {rows.source!r}: no example; is the file empty?")
    return tuple(turns)


def after_examples(prompt: Prompt, examples: tuple[Message, ...]) -> Prompt:
    """The prompt as the last turn of a chat that begins with its system message and the examples.

    Raises:
        ConfigError: the prompt is token ids.
    """
    if not examples:
        return prompt
    if prompt.token_ids:
        raise ConfigError("--examples needs text or messages; token ids are taken as they are")
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    has_system = messages[0].role == "system"
    return Prompt(messages=(*messages[:has_system], *examples, *messages[has_system:]))


def _grouped(problems: list[Problem]) -> list[Problem]:
    """The problems, without groups where prompts do not tell templates apart."""
    if tell_templates_apart([problem.group for problem in problems]):
        return problems
    return [replace(problem, group="") for problem in problems]


def bundled_problems(count: int) -> list[Problem]:
    """Held-out problems of the bundled pair, with their own grader."""
    found = []
    for problem in pair_problems.problems("test", count):
        is_correct = partial(pair_problems.is_correct, problem)
        prompt = Prompt(text=problem.prompt)
        found.append(Problem(problem.id, prompt, is_correct, "", problem.answer))
    return found


# -- reasoning-gym --------------------------------------------------------------------------------


def _gym_problems(family: str, count: int, reading: Reading) -> list[Problem]:
    """The first problems of a family, each content once, for seeds that no training run uses."""
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError:
        raise ConfigError(
            f"{GYM}{family} needs reasoning-gym; install it with: pip install 's2t[gym]'"
        ) from None
    try:
        dataset = gym.create_dataset(family, size=2 * count, seed=GYM_TEST_SEED + reading.seed)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{GYM}{family}: {error}") from error
    problems: list[Problem] = []
    for number, entry in enumerate(_distinct(dataset)):
        if len(problems) == count:
            break
        prompt = _gym_prompt(entry["question"], reading)
        is_correct = partial(_gym_grade, dataset, entry)
        identity = f"{family}-{number:05d}"
        group = prompt_group(Prompt(text=entry["question"]))
        problems.append(Problem(identity, prompt, is_correct, group, str(entry["answer"])))
    return _grouped(problems)


def _gym_prompt(question: str, reading: Reading) -> Prompt:
    """The question; how an answer ends is said, unless examples show it."""
    text = question if reading.examples else f"{question}\nEnd with: Answer: <answer>\n"
    rows = reading.rows
    if rows is not None and rows.system is not None:
        messages = (Message("system", rows.system), Message("user", text))
        return after_examples(Prompt(messages=messages), reading.examples)
    if rows is not None and rows.chat:
        return after_examples(Prompt(messages=(Message("user", text),)), reading.examples)
    return after_examples(Prompt(text=text), reading.examples)


def _distinct(dataset: Any) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for entry in dataset:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry


def _gym_grade(dataset: Any, entry: dict[str, Any], text: str) -> bool:
    _, marked, answer = text.rpartition("Answer:")
    if not marked:
        return False
    first_line = answer.strip().split("\n")[0].strip()
    stated = [first_line, first_line.removesuffix(".")]  # a full stop may end the sentence
    return any(dataset.score_answer(text, entry) >= 1.0 for text in stated)
