"""`s2t plan`: what a configuration would do and cost, before it is launched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2t_shared.errors import InvalidRequestError
from services.cli.options import LLM, SLM, ConfigFile, Json, settings, wide_console

if TYPE_CHECKING:
    from services.plan.queues import QueuePoint
    from services.plan.report import Plan

Prompt = Annotated[float, typer.Option(help="mean tokens of a prompt")]
New = Annotated[
    float | None, typer.Option(help="mean tokens of an answer; default: half of max_new_tokens")
]
Budget = Annotated[
    float | None, typer.Option(help="share of steps that trigger; default: the configuration's")
]
GpuCost = Annotated[str, typer.Option(help="dollars an hour by device, as in H100=2.5,L4=0.6")]
SlmDevice = Annotated[str | None, typer.Option(help="of a proposer: H100, H200, A100-80G, L4 ...")]
LlmDevice = Annotated[str | None, typer.Option(help="of a selector")]
MeasuredFile = Annotated[
    Path | None, typer.Option("--measured", help="what `s2t bench capacity --out` has written")
]
Simulate = Annotated[
    int, typer.Option(help="also simulate the queues, with so many proposers in all")
]
Ratios = Annotated[
    str, typer.Option(help="with --simulate: proposers per selector, comma-separated")
]
Load = Annotated[
    float, typer.Option(help="with --simulate: requests that come, of what proposers can finish")
]
Out = Annotated[Path | None, typer.Option(help="folder for plan.json and plan.svg")]


def plan(
    config: ConfigFile = None,
    prompt: Prompt = 256,
    new: New = None,
    budget: Budget = None,
    slm: SLM = None,
    llm: LLM = None,
    slm_device: SlmDevice = None,
    llm_device: LlmDevice = None,
    gpu_cost: GpuCost = "",
    measured: MeasuredFile = None,
    simulate: Simulate = 0,
    ratios: Ratios = "1,2,4,8,16",
    load: Load = 0.7,
    out: Out = None,
    json_out: Json = False,
) -> None:
    """Memory, tokens per second, cost and what saturates first, by mode, without a GPU or weights.

    Models are read by their config.json; `--slm 1.5B --llm 32B` stand for Qwen2.5's shapes. Exit
    status 1: a model does not fit its device.
    """
    from services.plan.demand import Traffic
    from services.plan.deployment import Assumptions, prefill_chunk
    from services.plan.devices import parse_prices
    from services.plan.measured import read_measured
    from services.plan.report import make_plan

    resolved = settings(config, slm__model=slm, llm__model=llm)
    traffic = Traffic(
        prompt=_positive(prompt, "--prompt"),
        new=_positive(new or resolved.defaults.max_new_tokens / 2, "--new"),
        budget=budget or resolved.defaults.budget,
        max_draft=resolved.proposer.max_draft_tokens,
        chunk=prefill_chunk(resolved),
    )
    if not 0 < traffic.budget <= 1:
        raise InvalidRequestError(f"--budget={budget}: must be above 0 and at most 1")
    found = read_measured(measured) if measured else None
    given = Assumptions(
        prices=parse_prices(gpu_cost),
        measured=found.costs() if found else {},
        measured_on=f"{found.machine}; {found.conditions}" if found else "",
        slm_device=slm_device,
        llm_device=llm_device,
    )
    made = make_plan(resolved, traffic, given)
    if simulate:
        made = replace(made, queues=tuple(_queues(made, simulate, load, ratios)))
    if out is not None:
        _write(made, out)
    if json_out:
        print(json.dumps(made.as_json()))
    else:
        wide_console().print(*made.tables())
        if out is not None:
            print(f"{out / 'plan.json'} and {out / 'plan.svg'}")
        for note in made.notes():
            print(note)
        for trouble in made.troubles():
            print(f"does not fit: {trouble}")
    if made.troubles():
        raise typer.Exit(1)


def _positive(value: float, option: str) -> float:
    if not value > 0:
        raise InvalidRequestError(f"{option}={value:g}: must be above 0")
    return value


def _queues(made: Plan, proposers: int, load: float, ratios: str) -> Iterator[QueuePoint]:
    from services.plan.queues import sweep

    if proposers < 1 or not 0 < load <= 2:
        raise InvalidRequestError(
            f"--simulate={proposers}, --load={load:g}: at least one proposer, and a load above 0 "
            "and at most 2"
        )
    if made.deployment.selector is None:
        raise InvalidRequestError(
            "--simulate: without an LLM there are no queries; name one: --llm"
        )
    try:
        wanted = [float(part) for part in ratios.split(",")]
    except ValueError:
        wanted = []
    if not wanted or not all(0 < ratio <= proposers for ratio in wanted):
        raise InvalidRequestError(
            f"--ratios={ratios!r}: give numbers above 0 and at most --simulate, as in 1,2,4"
        )
    return sweep(made.deployment, made.traffic, proposers, load, wanted)


def _write(made: Plan, folder: Path) -> None:
    from services.plan.plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made.as_json(), indent=1)
    (folder / "plan.json").write_text(text + "\n", encoding="utf-8")
    draw(made, made.queues, folder / "plan.svg")
