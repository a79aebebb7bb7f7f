"""What an evaluation asks: problems, models, and the grid of its rows. May stand in a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from s2t_shared.data.prompts import PromptSource
from s2t_shared.errors import ConfigError, InvalidRequestError, S2TError
from s2t_shared.types import Message
from services.evaluation.modes import ModeSpec, rows
from services.evaluation.problems import Problem, Reading, problems_of, read_examples

Budget = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Candidates = Annotated[int, Field(ge=1, le=64)]


def _as_list(value: Any) -> Any:
    """One value stands for a list of one."""
    return value if isinstance(value, list) else [value]


def _as_task(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(_Strict):
    """Problems of one source, and how they are read and graded; as the options of `s2t eval`.

    system: a message before each question. examples: a file of worked examples, shown before it.
    """

    source: str = "bundled"
    split: str = "test"
    prompt_column: str | None = None
    template: str | None = None
    chat: bool = False
    system: str | None = None
    examples: Path | None = None
    group_column: str | None = None
    answer_column: str = "answer"
    grader: str = "number"

    def problems(self, count: int, pattern: str, seed: int) -> list[Problem]:
        """The first `count` problems.

        Raises:
            ConfigError: the source or the examples cannot be read or are empty, or a row has no
                answer.
        """
        source = PromptSource(
            source=self.source,
            split=self.split,
            group_column=self.group_column,
            prompt_column=self.prompt_column,
            template=self.template,
            chat=self.chat,
            system=self.system,
        )
        reading = Reading(
            rows=source,
            examples=self._examples(source),
            answer_column=self.answer_column,
            pattern=pattern,
            grader=self.grader,
            seed=seed,
        )
        found = problems_of(self.source, count, reading)
        if not found:
            raise ConfigError(f"{self.source}: no problem; is the file empty?")
        return found

    def _examples(self, rows: PromptSource) -> tuple[Message, ...]:
        if self.examples is None:
            return ()
        rows = replace(rows, source=str(self.examples), group_column=None)
        return read_examples(rows, self.answer_column)


class Grid(_Strict):
    """Every mode at every trigger, budget, K and local selector that it has, on all problems.

    slm: evaluate in this process; None: through a service. selectors: local selectors by name.
    candidates: K; none: the configuration's. count: problems per task. scored: greedy answers that
    the LLM scores.
    """

    problems: Annotated[
        list[Annotated[Task, BeforeValidator(_as_task)]], BeforeValidator(_as_list)
    ] = [Task()]
    slm: str | None = None
    llm: str | None = None
    selectors: Annotated[list[str], BeforeValidator(_as_list)] = []
    modes: Annotated[list[str], BeforeValidator(_as_list)] = ["greedy", "s2t", "llm"]
    triggers: Annotated[list[str], BeforeValidator(_as_list)] = ["entropy"]
    budgets: Annotated[list[Budget], BeforeValidator(_as_list)] = [0.01]
    candidates: Annotated[list[Candidates], BeforeValidator(_as_list)] = []
    count: Count = 200
    scored: Annotated[int, Field(ge=0)] = 100
    max_new_tokens: Count = 256
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    seed: int = 0
    batch_size: Count = 16
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    calibration_prompts: Path | None = None

    @property
    def sources(self) -> str:
        return ", ".join(task.source for task in self.problems)

    def rows(self, default_candidates: int) -> list[ModeSpec]:
        """The grid's rows.

        Raises:
            InvalidRequestError: a row twice, or an unknown mode or trigger.
        """
        versions = self.selectors if len(self.selectors) > 1 else [None]
        candidates = self.candidates or [default_candidates]
        return rows(self.modes, self.triggers, self.budgets, candidates, versions)

    def read_problems(self, pattern: str) -> list[Problem]:
        """The problems of all tasks. Of several, an id begins with its task.

        Raises:
            ConfigError: a source cannot be read, or holds no problem.
        """
        found: list[Problem] = []
        for task in self.problems:
            of_task = task.problems(self.count, pattern, self.seed)
            if len(self.problems) > 1:
                of_task = [_of_task(problem, task.source) for problem in of_task]
            found += of_task
        return found


def _of_task(problem: Problem, task: str) -> Problem:
    group = f"{task}/{problem.group}" if problem.group else ""
    return replace(problem, id=f"{task}/{problem.id}", group=group, task=task)


# -- from a file ----------------------------------------------------------------------------------


def read_grid(file: Path) -> Grid:
    """The grid in a YAML file.

    Raises:
        ConfigError: it cannot be read, or a value is wrong; the text names the line.
    """
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 + mark.line if mark is not None else 1
        problem = getattr(error, "problem", None) or "a character that YAML has not"
        raise ConfigError(f"{file}, line {line}: no YAML: {problem}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}, line 1: keys and values are needed, such as modes: [greedy]")
    try:
        grid = Grid.model_validate(content)
    except ValidationError as error:
        found = error.errors()[0]
        raise _at(file, root, found["loc"], _reason(found)) from error
    for loc, check in _checks(grid):
        try:
            check()
        except InvalidRequestError as error:
            reason = str(error).removeprefix("--modes: ").removeprefix("--trigger ")
            raise _at(file, root, loc, reason) from error
    return grid


def _checks(grid: Grid) -> Iterator[tuple[tuple[str | int, ...], Callable[[], object]]]:
    """Names that only the rows know, one by one."""
    for number, mode in enumerate(grid.modes):
        yield ("modes", number), partial(rows, [mode], ["entropy"], [0.01], [8])
    for number, trigger in enumerate(grid.triggers):
        yield ("triggers", number), partial(rows, ["s2t"], [trigger], [0.01], [8])
    yield ("modes",), partial(grid.rows, 8)


def _reason(found: Any) -> str:
    path = [part for part in found["loc"] if isinstance(part, str)]
    if found["type"] != "extra_forbidden":
        return f"{found['input']!r}: {found['msg'][:1].lower()}{found['msg'][1:]}"
    model = Grid if len(path) == 1 else Task
    [nearest] = difflib.get_close_matches(path[-1], list(model.model_fields), n=1, cutoff=0.0)
    return f"no such key; nearest: {nearest!r}"


def _at(file: Path, root: Any, loc: tuple[str | int, ...], reason: str) -> S2TError:
    """The error at the line of a key or item."""
    line = 1
    for part in loc:
        if isinstance(root, yaml.MappingNode):
            pair = next((pair for pair in root.value if pair[0].value == part), None)
            if pair is None:
                break
            line, root = 1 + pair[0].start_mark.line, pair[1]
        elif isinstance(root, yaml.SequenceNode) and isinstance(part, int):
            root = root.value[part]
            line = 1 + root.start_mark.line
    return ConfigError(f"{file}, line {line}: {'.'.join(map(str, loc))}: {reason}")
