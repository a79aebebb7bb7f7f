"""`s2t bench capacity`: measures what `s2t plan` plans with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2t_shared.errors import InvalidRequestError
from services.cli.bench import (
    Budget,
    Device,
    Dtype,
    Json,
    New,
    Prefix,
    Repeats,
    Slm,
    Threads,
    bench_app,
    numbers,
    settings,
    show,
    ticks,
)


@bench_app.command()
def capacity(
    slm: Slm,
    llm: Annotated[str, typer.Option(help="folder or hub id of the LLM, or bundled")],
    calibrate: Annotated[str, typer.Option(help="clients at once, comma-separated")] = "1,32",
    validate: Annotated[
        str, typer.Option(help="clients at once at which the plan is checked")
    ] = "8,16",
    seconds: Annotated[float, typer.Option(help="of one measurement")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="file for s2t plan --measured")] = None,
    prefix: Prefix = 256,
    new: New = 64,
    budget: Budget = 0.05,
    repeats: Repeats = 5,
    threads: Threads = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_out: Json = False,
) -> None:
    """Measure what `s2t plan` plans with, on a service of one proposer and one selector, and how
    well it then plans."""
    from services.bench.capacity import Windows, bench_capacity

    made = settings(
        slm=slm,
        llm=llm,
        prefix=prefix,
        new=new,
        budget=budget,
        repeats=repeats,
        threads=threads,
        dtype=dtype,
        device=device,
    )
    if seconds < 1:
        raise InvalidRequestError(f"--seconds={seconds:g}: must be at least 1")
    windows = Windows(
        calibrate=numbers(calibrate, "--calibrate"),
        validate=numbers(validate, "--validate"),
        seconds=seconds,
    )
    with ticks() as tick:
        report, measured = bench_capacity(made, windows, tick)
    if out is not None:
        measured.write(out)
    show(report, json_out)
