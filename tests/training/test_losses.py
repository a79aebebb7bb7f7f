"""Losses worked out by hand, and which labels count how much."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from s2t_shared.labels.label import Label
from s2t_shared.training.losses import label_weight, plain_loss, selection_loss, teacher_margin
from s2t_shared.training.settings import MarginFilter, Objective, TrainingSettings
from s2t_shared.types import Reading

ONE = Label(
    label_id="l",
    position=3,
    candidate_ids=(7, 8, 9),
    slm_log_probs=(-0.5, -1.0, -2.0),
    llm_log_probs=tuple(math.log(p) for p in (0.2, 0.6, 0.1)),
    llm_top_id=8,
    llm_top_rank=1,
    mass=0.9,
    kl=0.5,
    entropy=0.7,
)


LOGITS = torch.tensor([[1.0, 0.5, 0.0, 5.0]])  # the last column is padding


VALID = torch.tensor([[True, True, True, False]])


def test_losses_by_hand() -> None:
    """Each loss on one label, worked out from its definition; padding has no say."""
    q = [math.exp(x) / sum(math.exp(y) for y in (1.0, 0.5, 0.0)) for x in (1.0, 0.5, 0.0)]
    p = [0.2 / 0.9, 0.6 / 0.9, 0.1 / 0.9]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def loss(**settings: object) -> float:
        return float(selection_loss(LOGITS, [ONE], VALID, TrainingSettings(**settings)))  # type: ignore[arg-type]

    assert loss(objective=Objective.KL) == pytest.approx(kl, rel=1e-5)
    assert loss(ce_weight=1.0, hinge_weight=0.0, kl_weight=0.0) == pytest.approx(
        -math.log(q[1]), rel=1e-5
    )
    assert loss(ce_weight=0.0, hinge_weight=1.0, kl_weight=0.0, hinge_margin=1.0) == pytest.approx(
        (1.5 + 0.5) / 2
    )
    # pairs the LLM ranks: 8 over 7 (gap -0.5), 8 over 9 (0.5), 7 over 9 (1.0)
    assert loss(objective=Objective.PAIRWISE_MARGIN, hinge_margin=1.0) == pytest.approx(
        (1.5 + 0.5 + 0.0) / 3
    )
    sharp = [x**2 / sum(y**2 for y in p) for x in p]
    assert loss(objective=Objective.KL, teacher_temperature=0.5) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(sharp, q, strict=True)), rel=1e-5
    )


def test_plain_loss_by_hand() -> None:
    """The rest of the vocabulary is one more outcome of both distributions."""
    ours = torch.tensor([[math.log(0.3), math.log(0.3), math.log(0.2), 0.0]])
    expected = sum(
        a * math.log(a / b) for a, b in zip((0.2, 0.6, 0.1, 0.1), (0.3, 0.3, 0.2, 0.2), strict=True)
    )
    assert float(plain_loss(ours, [ONE], VALID)) == pytest.approx(expected, rel=1e-4)


def test_filters_do_what_they_say() -> None:
    """The margin is (0.6 - 0.2) / 0.9. A minimum acts in both modes that have one; mass and single
    candidates too."""
    margin = 0.4 / 0.9
    assert teacher_margin(ONE) == pytest.approx(margin)

    def weight(label: Label = ONE, **settings: object) -> float:
        return label_weight(label, TrainingSettings(**settings))  # type: ignore[arg-type]

    assert weight() == 1.0
    assert weight(teacher_margin=MarginFilter.DROP, min_margin=0.4) == 1.0
    assert weight(teacher_margin=MarginFilter.DROP, min_margin=0.5) == 0.0
    assert weight(
        teacher_margin=MarginFilter.WEIGHT, margin_power=2, margin_eps=0.1
    ) == pytest.approx((margin + 0.1) ** 2)
    assert weight(teacher_margin=MarginFilter.WEIGHT, min_margin=0.5) == 0.0
    assert weight(min_margin=0.5) == 1.0  # none means none
    assert weight(min_mass=0.95) == 0.0
    alone = replace(ONE, candidate_ids=(7,), slm_log_probs=(-0.5,), llm_log_probs=(-0.5,))
    plain = {"objective": Objective.PLAIN, "reads": Reading.ADAPTED}
    assert weight(alone) == 0.0 and weight(alone, **plain) == 1.0
