"""Training curves: TensorBoard events while a job runs, a plot and the numbers for the version it
publishes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from s2t_shared.training.trainer import Point

matplotlib.use("Agg")
CURVE, PLOT = "curve.json", "curve.png"


class CurveWriter:
    """TensorBoard events of one job in `folder`; after a resume, what was written beyond its step
    is hidden."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._validated = -1

    def write(self, step: int, loss: float, point: Point) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        self._writer.add_scalar("loss/training", loss, step)
        self._writer.add_scalar("learning_rate", point.learning_rate, step)
        if point.step > self._validated:
            self._writer.add_scalar("loss/validation", point.loss, point.step)
            self._writer.add_scalar("agree_at_1/validation", point.agree_at_1, point.step)
            self._validated = point.step
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def curve_files(curve: Sequence[Point]) -> dict[str, bytes]:
    """What a version carries: the numbers as JSON (null: nothing yet), and their plot."""
    rows = [
        {name: value if math.isfinite(value) else None for name, value in asdict(p).items()}
        for p in curve
    ]
    return {CURVE: (json.dumps(rows, indent=1) + "\n").encode(), PLOT: _plot(curve)}


def _plot(curve: Sequence[Point]) -> bytes:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    losses, agreement = figure.subplots(1, 2)
    steps = [p.step for p in curve]
    losses.plot(steps, [p.train_loss for p in curve], marker=".", label="training")
    losses.plot(steps, [p.loss for p in curve], marker=".", label="validation")
    losses.set(xlabel="step", ylabel="loss (nats)")
    losses.legend()
    agreement.plot(steps, [p.agree_at_1 for p in curve], marker=".", color="C1")
    agreement.set(xlabel="step", ylabel="Agree@1 on validation labels")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
