"""`s2t train`: what the verb does around the job."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from s2t_shared.config import Config
from s2t_shared.errors import StoreError
from s2t_shared.labels.lake import Lake
from s2t_shared.types import LabelCounts
from services.cli.train import train
from services.train.job import TrainOutcome
from tests.helpers.fake_service import pretend_service
from tests.helpers.lake import rollout


@pytest.fixture(autouse=True)
def job_that_only_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze(config: Config, *_: object) -> TrainOutcome:
        labels = sum(shard.labels for shard in Lake(config.lake).freeze().shards())
        return TrainOutcome(
            version="",
            promoted=False,
            reason="",
            metrics={},
            live_agree_at_1=None,
            training_labels=labels,
            held_out_labels=0,
            steps=0,
            snapshot="",
            job="",
            figures={},
        )

    monkeypatch.setattr("services.train.job.train", freeze)
    monkeypatch.setattr("services.launch.ray_connection.local_ray", contextlib.nullcontext)


def s2t_train(*arguments: str) -> tuple[str, str]:
    """Stdout and stderr. Typed errors pass through."""
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


def test_labels_that_a_service_has_on_their_way_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a harvest it used to say "no labels; harvest first"."""
    lake = Lake(tmp_path / "labels")
    waiting = [rollout(1), rollout(2)]
    wanted = sum(len(r.labels) for r in waiting)

    def count(flush: bool) -> LabelCounts:
        if flush and waiting:
            lake.write([waiting.pop()])
        return LabelCounts(queued=len(waiting))

    pretend_service(monkeypatch, count)
    out, _ = s2t_train("--data-dir", str(tmp_path), "--json")
    assert json.loads(out)["training_labels"] == wanted > 0


def test_labels_that_do_not_come_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that always has new ones does not hold up the training."""
    monkeypatch.setattr("services.cli.labels.BRING_IN_S", 0.0)
    pretend_service(monkeypatch, lambda flush: LabelCounts(queued=12))
    with pytest.raises(StoreError, match="no labels"):
        s2t_train("--data-dir", str(tmp_path))
    Lake(tmp_path / "labels").write([rollout(1)])
    _, err = s2t_train("--data-dir", str(tmp_path))
    assert "12 rollouts are still on their way" in err


def test_a_service_that_cannot_count_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(flush: bool) -> LabelCounts:
        raise StoreError("Redis is away")

    pretend_service(monkeypatch, fail)
    Lake(tmp_path / "labels").write([rollout(1)])
    _, err = s2t_train("--data-dir", str(tmp_path))
    assert "Redis is away" in err
