"""The training loop: it learns, stops early, keeps the best, and resumes only its own run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels.label import Label
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.dataset import TrainingData
from s2t_shared.training.evaluate import evaluate_local_selector, mean_lm_kl
from s2t_shared.training.settings import Objective, TrainingSettings
from s2t_shared.training.trainer import Point, distil, learning_rate
from s2t_shared.types import Reading, SelectorKind
from tests.helpers.rollouts import learnable, make_rollouts
from tests.helpers.training import KINDS, reserved_rows


@pytest.mark.parametrize(
    ("kind", "reads", "objective"),
    [
        *((kind, reads, Objective.TOP1_CE) for kind, reads in KINDS),
        (SelectorKind.PREFIX, Reading.BASE, Objective.KL),
        (SelectorKind.JOINT, Reading.BASE, Objective.PAIRWISE_MARGIN),
        (SelectorKind.PREFIX, Reading.ADAPTED, Objective.PLAIN),
    ],
)
def test_training_learns(
    runtime: ModelRuntime, kind: SelectorKind, reads: Reading, objective: Objective
) -> None:
    """A rule that can be learnt is learnt, by every kind and loss; the best weights are kept, not
    the last ones."""
    rollouts = learnable(make_rollouts(60, runtime.digest))
    config = TrainingSettings(
        kind=kind,
        reads=reads,
        steps=60,
        learning_rate=1e-2,
        batch_labels=32,
        patience=99,
        reg_weight=0.01,
        objective=objective,
    )
    losses: list[float] = []
    done = distil(
        runtime,
        reserved_rows(runtime),
        rollouts,
        config,
        lambda step, loss, point: losses.append(loss),
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and len(losses) == done.steps == 60
    assert {"loss", "agree_at_1", "slm_agree_at_1", "spearman", "hit_at_8", "lm_kl", "n"} <= set(
        done.metrics
    )
    best = min(point.loss for point in done.curve)
    data = TrainingData(rollouts, runtime.digest, TrainingSettings())
    again = evaluate_local_selector(runtime, done.local_selector, data.validation, config)
    assert again.metrics["loss"] == pytest.approx(best, rel=1e-5) and done.curve[0].step == 0
    tested = evaluate_local_selector(runtime, done.local_selector, data.test, config)
    lm_kl = mean_lm_kl(runtime, done.local_selector, data.test, config)
    assert tested.agreed == done.evaluation.agreed
    assert {**tested.metrics, "lm_kl": lm_kl} == done.metrics
    assert len(done.evaluation.agreed) == done.test_labels == len(done.evaluation.groups)
    assert sum(done.evaluation.agreed) / done.test_labels == pytest.approx(
        done.metrics["agree_at_1"]
    )


def test_early_stop(runtime: ModelRuntime) -> None:
    """Labels without a rule, at a rate that spoils: the run ends after `patience` validations
    without a better one, and its best weights are the untrained ones or better."""
    rollouts = make_rollouts(60, runtime.digest)
    config = TrainingSettings(steps=200, learning_rate=0.3, validate_every=5, patience=2)
    done = distil(runtime, (), rollouts, config)
    losses = [point.loss for point in done.curve]
    assert done.steps < 200 and len(losses) - 1 - losses.index(min(losses)) == 2
    assert done.steps == done.curve[-1].step


def test_an_epoch_without_labels_is_an_error(
    runtime: ModelRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that went away meanwhile end the run; it does not look for them for ever."""
    rollouts = make_rollouts(60, runtime.digest)

    def empty(step: int, loss: float, point: Point) -> None:
        monkeypatch.setattr(TrainingData, "epoch", lambda self, number, start: iter(()))

    with pytest.raises(StoreError, match="no labels to train on"):
        distil(
            runtime,
            reserved_rows(runtime),
            rollouts,
            TrainingSettings(steps=50, batch_labels=16),
            empty,
        )


def test_fusion_is_chosen_where_it_helps(runtime: ModelRuntime) -> None:
    """The LLM follows the SLM's probabilities, a selector that learnt nothing does not: lambda > 0,
    and a better Agree@1 on labels that did not choose it. Where fusion cannot help, lambda stays
    0."""

    def like_slm(label: Label) -> Label:
        return replace(label, llm_log_probs=label.slm_log_probs)

    rollouts = [
        replace(r, labels=tuple(map(like_slm, r.labels)))
        for r in make_rollouts(120, runtime.digest)
    ]
    config = TrainingSettings(kind=SelectorKind.RESERVED, steps=1, learning_rate=1e-9, fusion=True)
    fused = distil(runtime, reserved_rows(runtime), rollouts, config)
    bare = distil(
        runtime, reserved_rows(runtime), rollouts, config.model_copy(update={"fusion": False})
    )
    assert fused.local_selector.fusion > 0 == bare.local_selector.fusion
    assert fused.metrics["agree_at_1"] > bare.metrics["agree_at_1"]

    def without_slm(label: Label) -> Label:
        return replace(label, slm_log_probs=(-1.0,) * len(label.candidate_ids))

    perfect = [replace(r, labels=tuple(map(without_slm, r.labels))) for r in rollouts]
    assert distil(runtime, reserved_rows(runtime), perfect, config).local_selector.fusion == 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule(schedule: Literal["linear", "cosine", "constant"]) -> None:
    """Up over the first share of the steps, then down to a tenth (or level)."""
    config = TrainingSettings(steps=100, warmup_share=0.1, learning_rate=1.0, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:11] == pytest.approx([*((i + 1) / 10 for i in range(10)), 1.0])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.02)


def test_a_folder_of_another_run_is_refused(runtime: ModelRuntime, tmp_path: Path) -> None:
    """Two settings never share a checkpoint."""
    rollouts = make_rollouts(60, runtime.digest)
    settings = TrainingSettings(steps=2)
    distil(runtime, (), rollouts, settings, checkpoints=tmp_path)
    other = settings.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="another run"):
        distil(runtime, (), rollouts, other, checkpoints=tmp_path)
