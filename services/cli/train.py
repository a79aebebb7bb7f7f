"""`s2t train`: flags to settings, progress, and what a run prints.

The work is in `services.train.job` and `services.train.follow`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from s2t_shared.errors import InvalidRequestError
from services.cli.labels import bring_in
from services.cli.options import ConfigFile, DataDir, Json, settings_beside_service, show
from services.cli.progress import progress

if TYPE_CHECKING:  # these import torch and Ray
    from services.train.job import TrainOutcome
    from services.train.progress import TrainProgress


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

    Labels that a running service still has on their way come first. Killed, the same command goes
    on where it was.
    """
    from services.train import follow as following
    from services.train.job import train as run_training

    if every_labels < 1 or (max_rounds is not None and max_rounds < 1):
        raise InvalidRequestError("--every-labels and --max-rounds must be at least 1")

    def say(line: str) -> None:
        print(f"s2t: {line}", file=sys.stderr, flush=True)

    resolved = settings_beside_service(
        config,
        say,
        data_dir=data_dir,
        training__kind=kind,
        training__reads=reads,
        training__objective=objective,
        training__steps=steps,
        training__learning_rate=learning_rate,
        training__workers=workers,
        training__init_from=init_from,
        training__seed=seed,
    )

    def report(outcome: TrainOutcome) -> None:
        if follow and json_out:
            print(json.dumps(asdict(outcome)), flush=True)  # one line a round
        else:
            show(asdict(outcome), json_out)

    try:
        with progress("training steps", None, json_out) as shown:

            def on_progress(now: TrainProgress) -> None:
                shown.update(now.step, now.steps, _figures(now))

            if follow:
                following.follow(
                    resolved, every_labels, max_rounds, promote, on_progress, say, report
                )
                return
            bring_in(resolved, say)
            outcome = run_training(resolved, promote, on_progress, say)
        report(outcome)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None


def _figures(now: TrainProgress) -> str:
    return (
        f"loss {now.loss:.3f}, validation loss {now.validation_loss:.3f}, "
        f"Agree@1 {now.agree_at_1:.3f}"
    )
