"""Training curves: TensorBoard events while a job runs, numbers and a plot for its version."""

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
CURVE = "curve.json"
PLOT = "curve.png"


class CurveWriter:
    """Writes the TensorBoard events of one job into `folder`.

    After a resume, TensorBoard hides what was written beyond the step it resumes from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._validated = -1

    def write(self, step: int, loss: float, point: Point) -> None:
        """Record one step's loss, and the validation of `point` if it is new."""
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
    """Files of a version by name: the numbers as JSON (null: not measured), and their plot."""
    rows = []
    for point in curve:
        row = {}
        for name, value in asdict(point).items():
            row[name] = value if math.isfinite(value) else None
        rows.append(row)
    return {CURVE: (json.dumps(rows, indent=1) + "\n").encode(), PLOT: _plot(curve)}


def _plot(curve: Sequence[Point]) -> bytes:
    """A PNG image."""
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
