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
    from services.evaluation.answering import Answerer
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
        str, typer.Option(help="with --slm: none, live, a version's name, or its folder")
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
    from s2t_shared.data.prompts import PromptSource
    from services.evaluation.journal import Journal
    from services.evaluation.modes import rows
    from services.evaluation.problems import Reading, problems_of
    from services.evaluation.report import Evaluated
    from services.evaluation.run import EvaluationSettings, run_all

    resolved = settings(config, data_dir=data_dir)
    specs = rows(
        _names(modes),
        _names(trigger),
        _numbers(budget, float, "--budget"),
        _numbers(candidates or str(resolved.defaults.candidates), int, "--candidates"),
    )
    source = problems or "bundled"
    reading = Reading(
        rows=PromptSource(
            source=source,
            split=split,
            group_column=group_column,
            prompt_column=prompt_column,
            template=template,
            chat=chat,
        ),
        answer_column=answer_column,
        pattern=resolved.defaults.answer_pattern,
        grader=grader,
        seed=seed,
    )
    items = problems_of(source, count, reading)
    if not items:
        raise ConfigError(f"{source}: no problem; is the file empty?")
    if slm is None:
        _refuse_without_slm(llm, selector)
        answerer = _service(address, config, token_file, resolved)
    else:
        _refuse_without_llm(llm, specs)
        answerer = _pair(
            slm,
            llm,
            selector,
            versions=resolved.versions,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            threads=threads,
            calibration_prompts=calibration_prompts,
        )
    asked = EvaluationSettings(
        max_new_tokens=max_new_tokens, seed=seed, stop=tuple(stop or ()), steps=out is not None
    )
    identity = asked.identity(answerer, items)
    journal = Journal.open(out / ANSWERS if out else None, identity)
    to_score = scored if out is not None and identity["llm"] else 0
    found, hits = run_all(answerer, specs, items, asked, journal, to_score, _watch(json_out))
    about = {
        "problems": f"{source}, {len(items)}",
        "SLM": slm or "of the service",
        "LLM": llm or ("of the service" if slm is None else "none"),
        "grader": grader,
        **_about(identity),
    }
    title = f"{len(items)} problems of {source}"
    _show(Evaluated(title=title, rows=found, problems=items, hits=hits, about=about), out, json_out)


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
            print(f"s2t: wrote {file}", file=sys.stderr)
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


def _refuse_without_slm(llm: str | None, selector: str) -> None:
    if llm is not None:
        raise InvalidRequestError("--llm needs --slm; a service has an LLM of its own")
    if selector != "none":
        raise InvalidRequestError("--selector needs --slm; a service has its live version")


def _refuse_without_llm(llm: str | None, specs: Sequence[ModeSpec]) -> None:
    asking = [spec.label for spec in specs if spec.mode.asks_llm or spec.asks_llm_all_along]
    if llm is None and asking:
        raise InvalidRequestError(f"{asking[0]} asks the LLM; give --llm, or other --modes")


def _service(
    address: str | None, config: Path | None, token_file: Path | None, resolved: Config
) -> Answerer:
    from s2t_shared.model.loading import resolve_model
    from s2t_shared.model.tokenizer import Tokenizer
    from services.evaluation.answering import ServiceAnswerer

    try:
        tokenizer = Tokenizer.load(resolve_model(resolved.slm.model))
    except ModelLoadError:
        tokenizer = None  # the report shows ids instead of texts
    return ServiceAnswerer(target(address, config, token_file), tokenizer=tokenizer)


def _pair(
    slm: str, llm: str | None, selector: str, *, calibration_prompts: Path | None, **options: Any
) -> Answerer:
    from s2t_shared.pair import Pair
    from services.evaluation.answering import PairAnswerer

    version = None if selector == "none" else selector
    pair = Pair.open(slm, llm, version, **options)
    return PairAnswerer(
        pair, calibration_prompts, lambda line: print(f"s2t: {line}", file=sys.stderr)
    )


def _watch(quiet: bool) -> Callable[[str, int], AbstractContextManager[Progress]]:
    return lambda what, total: progress(what, total, quiet)
