"""`s2t eval`: modes compared on the same problems, in this process or through a service."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2t_shared.errors import ConfigError, InvalidRequestError, ModelLoadError
from services.cli.options import (
    Address,
    BatchSize,
    Chat,
    ConfigFile,
    DataDir,
    Device,
    Dtype,
    GroupColumn,
    Json,
    PromptColumn,
    PromptTemplate,
    Threads,
    TokenFile,
    settings,
    target,
    wide_console,
)
from services.cli.progress import Progress, progress

if TYPE_CHECKING:
    from s2t_shared.config import Config
    from services.evaluation.answering import Answerer, PairAnswerer
    from services.evaluation.grid import Grid
    from services.evaluation.modes import ModeSpec
    from services.evaluation.report import Evaluated

ANSWERS = "answers.jsonl"


def evaluate(
    problems: Annotated[
        str | None,
        typer.Argument(
            help="file, folder or hub id of questions with answers, reasoning-gym:FAMILY, or "
            "bundled (default)"
        ),
    ] = None,
    slm: Annotated[
        str | None, typer.Option(help="folder or hub id: evaluate in this process, no service")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="with --slm: folder or hub id")] = None,
    selector: Annotated[
        str, typer.Option(help="with --slm: none, live, a version's name or folder; or several")
    ] = "none",
    modes: Annotated[
        str, typer.Option(help="comma-separated, e.g. greedy,majority@8,pass@8,s2t,llm")
    ] = "greedy,s2t,llm",
    trigger: Annotated[str, typer.Option(help="one or several")] = "entropy",
    budget: Annotated[str, typer.Option(help="one or several, e.g. 0.01,0.05")] = "0.01",
    candidates: Annotated[str | None, typer.Option(help="K, one or several")] = None,
    count: Annotated[int, typer.Option(help="problems at most")] = 200,
    scored: Annotated[
        int, typer.Option(help="greedy answers that the LLM scores, for Hit@K; 0: none")
    ] = 100,
    max_new_tokens: Annotated[int, typer.Option()] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="ends an answer; may be repeated")] = None,
    prompt_column: PromptColumn = None,
    template: PromptTemplate = None,
    chat: Chat = False,
    system: Annotated[
        str | None, typer.Option(help="system message before it (implies --chat)")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="file of questions with worked answers, shown before each question"),
    ] = None,
    group_column: GroupColumn = None,
    answer_column: Annotated[str, typer.Option(help="where the right answer stands")] = "answer",
    split: Annotated[str, typer.Option(help="of a data set")] = "test",
    grader: Annotated[
        str, typer.Option(help="number, exact, choice, math, or module:function")
    ] = "number",
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the report; the same command resumes what is in it"),
    ] = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    calibration_prompts: Annotated[
        Path | None, typer.Option(help="with --slm: training prompts to calibrate budgets on")
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """Compare modes on the same problems: with --slm in this process, else through a service.

    Prints a table; --out DIR also writes report.html, report.md, report.json and all answers.
    """
    from services.evaluation.grid import Grid, Task

    task = Task(
        source=problems or "bundled",
        split=split,
        prompt_column=prompt_column,
        template=template,
        chat=chat,
        system=system,
        examples=examples,
        group_column=group_column,
        answer_column=answer_column,
        grader=grader,
    )
    grid = _checked(
        Grid,
        problems=[task],
        slm=slm,
        llm=llm,
        selectors=[] if selector == "none" else _names(selector),
        modes=_names(modes),
        triggers=_names(trigger),
        budgets=_numbers(budget, float, "--budget"),
        candidates=_numbers(candidates or "", int, "--candidates"),
        count=count,
        scored=scored,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        threads=threads,
        calibration_prompts=calibration_prompts,
    )
    resolved = settings(config, data_dir=data_dir)
    where = (address, config, token_file)
    run_grid(grid, where, resolved, out, json_out)


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML: problems, models, modes, budgets ...")],
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the report; default: the file's name without its ending"),
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    json_out: Json = False,
) -> None:
    """`s2t eval` of a grid in a file: modes, triggers, budgets, K, local selectors, tasks.

    One report, with what each setting changes. The same command resumes. Keys are the options of
    `s2t eval`, in the plural where they take a list: problems, selectors, modes, triggers, budgets,
    candidates; also slm, llm, count, scored, max_new_tokens, stop, seed.
    """
    from services.evaluation.grid import read_grid

    grid = read_grid(file)
    folder = out or Path(file.stem)
    if folder == file:
        raise ConfigError(f"{str(file)!r} has no ending, so its report has no name; give --out")
    resolved = settings(config, data_dir=data_dir)
    run_grid(grid, (address, config, token_file), resolved, folder, json_out)


def _checked(kind: type[Grid], **values: Any) -> Grid:
    """A grid of options.

    Raises:
        InvalidRequestError: a value is out of range.
    """
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        found = error.errors()[0]
        field = str(found["loc"][0])
        option = {"budgets": "budget", "triggers": "trigger"}.get(field, field).replace("_", "-")
        raise InvalidRequestError(f"--{option}={found['input']!r}: {found['msg']}") from error


def run_grid(
    grid: Grid,
    where: tuple[str | None, Path | None, Path | None],
    resolved: Config,
    out: Path | None,
    json_out: bool,
) -> None:
    """Ask all rows of a grid, write the report where one is wanted, and print the figures.

    where: of the service, if the grid names no SLM: address, configuration, file of its token.
    """
    from s2t_shared.types import Mode
    from services.evaluation.journal import Journal
    from services.evaluation.report import Evaluated
    from services.evaluation.run import EvaluationSettings, run_all

    specs = grid.rows(resolved.defaults.candidates)
    items = grid.read_problems(resolved.defaults.answer_pattern)
    answerer: Answerer
    if grid.slm is None:
        _refuse_without_slm(grid)
        answerer = _service(*where, resolved)
    else:
        _refuse_without_llm(grid.llm, specs)
        if not grid.selectors and any(spec.mode is Mode.S2T_LOCAL for spec in specs):
            _say("s2t_local selects with an untrained local selector; name a version (selector)")
        answerer = in_process = _pair(grid, resolved.versions)
        if len(grid.selectors) > 1:  # by the versions' own names: a folder may have another
            names = list(in_process.pair.others)
            specs = grid.model_copy(update={"selectors": names}).rows(resolved.defaults.candidates)
    asked = EvaluationSettings(
        max_new_tokens=grid.max_new_tokens,
        seed=grid.seed,
        stop=tuple(grid.stop),
        answer_pattern=resolved.defaults.answer_pattern,
        steps=out is not None,
    )
    identity = asked.identity(answerer, items)
    if len(grid.selectors) > 1:
        identity["local_selector"] = "in each row"
    journal = Journal.open(out / ANSWERS if out else None, identity)
    to_score = grid.scored if out is not None and identity["llm"] else 0
    found, hits = run_all(answerer, specs, items, asked, journal, to_score, _watch(json_out))
    about = {
        "problems": f"{grid.sources}, {len(items)}",
        "SLM": grid.slm or "of the service",
        "LLM": grid.llm or ("of the service" if grid.slm is None else "none"),
        "grader": ", ".join(dict.fromkeys(task.grader for task in grid.problems)),
        **_about(identity),
    }
    tasks = len(grid.problems)
    title = f"{len(items)} problems of {grid.sources if tasks == 1 else f'{tasks} tasks'}"
    evaluated = Evaluated(
        title=title,
        rows=found,
        problems=items,
        hits=hits,
        about=about,
        tokenizer=answerer.tokenizer,
    )
    _show(evaluated, out, json_out)


def _about(identity: Mapping[str, Any]) -> dict[str, str]:
    """What a reader must know to repeat an evaluation."""
    from services.bench.measure import machine

    return {
        "local selector": identity["local_selector"] or "none",
        "answers": f"up to {identity['max_new_tokens']} tokens, seed {identity['seed']}",
        "digests": f"SLM {identity['slm'][:12]}, LLM {identity['llm'][:12] or 'none'}",
        "machine": machine(),
        "command": "s2t " + shlex.join(sys.argv[1:]),
    }


def _show(evaluated: Evaluated, out: Path | None, json_out: bool) -> None:
    """Write the report where one is wanted, and print the figures."""
    from services.evaluation.report import row_figures, write_report
    from services.evaluation.terminal import table

    found = evaluated.rows
    if out is not None:
        for file in write_report(evaluated, out):
            _say(f"wrote {file}")
    if json_out:
        print(json.dumps({row.label: row_figures(row, found[0]) for row in found}))
        return
    console = wide_console()
    console.print(table(found, evaluated.title))
    console.print(f"[bold]{evaluated.verdict.headline}[/bold]", soft_wrap=True)
    for reason in evaluated.verdict.reasons:
        console.print(f"  {reason}", soft_wrap=True, markup=False)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(name) for name in _names(text)]
    except ValueError:
        raise InvalidRequestError(
            f"{option}={text!r}: numbers, separated by commas, are needed"
        ) from None


def _refuse_without_slm(grid: Grid) -> None:
    if grid.llm is not None:
        raise InvalidRequestError("--llm needs --slm; a service has an LLM of its own")
    if len(grid.selectors) == 1:
        raise InvalidRequestError(
            "--selector needs --slm; a service has its live version (several may be named)"
        )


def _refuse_without_llm(llm: str | None, specs: Sequence[ModeSpec]) -> None:
    asking = [spec.label for spec in specs if spec.mode.asks_llm or spec.asks_llm_all_along]
    if llm is None and asking:
        raise InvalidRequestError(f"{asking[0]} asks the LLM; give --llm, or other --modes")


def _service(
    address: str | None, config: Path | None, token_file: Path | None, resolved: Config
) -> Answerer:
    from s2t_shared.model.folders import resolve_model
    from s2t_shared.model.tokenizer import Tokenizer
    from services.evaluation.answering import ServiceAnswerer

    try:
        tokenizer = Tokenizer.load(resolve_model(resolved.slm.model))
    except ModelLoadError:
        tokenizer = None  # the report shows ids instead of texts
    return ServiceAnswerer(target(address, config, token_file), tokenizer=tokenizer)


def _pair(grid: Grid, versions: Path) -> PairAnswerer:
    """The models of a grid, with all its local selectors; a row names its own if there are more."""
    from s2t_shared.pair import Pair
    from services.evaluation.answering import PairAnswerer

    assert grid.slm is not None
    only = grid.selectors[0] if len(grid.selectors) == 1 else None
    pair = Pair.open(
        grid.slm,
        grid.llm,
        only,
        others=grid.selectors if only is None else (),
        versions=versions,
        batch_size=grid.batch_size,
        dtype=grid.dtype,
        device=grid.device,
        threads=grid.threads,
    )
    return PairAnswerer(pair, grid.calibration_prompts, _say)


def _say(line: str) -> None:
    print(f"s2t: {line}", file=sys.stderr)


def _watch(quiet: bool) -> Callable[[str, int], AbstractContextManager[Progress]]:
    return lambda what, total: progress(what, total, quiet)
