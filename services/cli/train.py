"""`s2t train`: flags to settings, progress, and what a run prints. The work is in `training` and
`follow`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from s2t_shared.errors import InvalidRequestError
from services.cli.options import ConfigFile, DataDir, Json, settings_beside_service, show

LINE_EVERY_S = 30.0


def train(
    config: ConfigFile = None,
    data_dir: DataDir = None,
    kind: Annotated[str | None, typer.Option(help="prefix, joint or reserved")] = None,
    reads: Annotated[str | None, typer.Option(help="base or adapted")] = None,
    objective: Annotated[
        str | None, typer.Option(help="top1_ce, kl, pairwise_margin or plain")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="training steps at most")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    workers: Annotated[int | None, typer.Option(help="Ray Train workers")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="start from this version, or from the 'live' one")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    promote: Annotated[bool, typer.Option(help="make it live when the gate opens")] = True,
    follow: Annotated[
        bool, typer.Option("--follow", help="again whenever enough labels have come")
    ] = False,
    every_labels: Annotated[int, typer.Option(help="with --follow: how many")] = 10_000,
    max_rounds: Annotated[
        int | None, typer.Option(help="with --follow: stop after so many")
    ] = None,
    json_out: Json = False,
) -> None:
    """Distil the labels into a new version (a Ray Train job) and make it live if it is better.
    Killed, the same command goes on where it was."""
    from services.launch.local import local_ray
    from services.train import follow as following
    from services.train.job import train as run_training

    if every_labels < 1 or (max_rounds is not None and max_rounds < 1):
        raise InvalidRequestError("--every-labels and --max-rounds must be at least 1")

    def say(line: str) -> None:
        print(f"s2t: {line}", file=sys.stderr, flush=True)

    resolved = settings_beside_service(
        config,
        say,
        data_dir=str(data_dir) if data_dir else None,
        training__kind=kind,
        training__reads=reads,
        training__objective=objective,
        training__steps=steps,
        training__learning_rate=learning_rate,
        training__workers=workers,
        training__init_from=init_from,
        training__seed=seed,
    )

    def report(outcome: Any) -> None:
        print(json.dumps(asdict(outcome)), flush=True) if follow and json_out else show(
            asdict(outcome), json_out
        )

    try:
        with training_progress(json_out) as advance:
            if follow:
                following.follow(resolved, every_labels, max_rounds, promote, advance, say, report)
                return
            with local_ray():
                outcome = run_training(resolved, promote, advance, say)
        report(outcome)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None


@contextmanager
def training_progress(quiet: bool) -> Iterator[Any]:
    """A bar with loss, Agree@1 and time left on a terminal, a line now and then elsewhere; yields
    what to call with each `TrainProgress`."""
    console = Console(stderr=True)
    if quiet:
        yield lambda now: None
        return
    if not console.is_terminal:
        started = last = time.monotonic()

        def line(now: Any) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_EVERY_S or now.step == now.steps:
                last = time.monotonic()
                left = (last - started) / max(1, now.step) * (now.steps - now.step)
                print(
                    f"s2t: step {now.step} of {now.steps}: {_figures(now)}, about {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None, figures="reading labels")
        yield lambda now: bar.update(
            task, total=now.steps, completed=now.step, figures=_figures(now)
        )


def _figures(now: Any) -> str:
    return f"loss {now.loss:.3f}, validation loss {now.validation_loss:.3f}, Agree@1 {now.agree_at_1:.3f}"
