"""The training losses: pure functions of a selector's logits and what the LLM said. Knows labels;
no models.

Every loss is one value per label; how labels are weighed and averaged is the caller's (`distill`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from s2t_shared.labels.label import Label

IMPOSSIBLE = -1e4  # stands for log 0 of padding, where -inf would make 0 * inf


class Objective(str, Enum):
    """What is minimised (paper, section on distillation, and its published code's options)."""

    TOP1_CE = (
        "top1_ce"  # cross-entropy of the LLM's choice + hinge against the others + listwise KL
    )
    KL = "kl"  # listwise KL alone
    PAIRWISE_MARGIN = "pairwise_margin"  # hinge over all pairs that the LLM ranks
    PLAIN = "plain"  # no selector at all: distillation of the SLM itself, as a control


class MarginFilter(str, Enum):
    """What the LLM's margin (its best candidate's probability minus its second's) does to a
    label."""

    NONE = "none"
    WEIGHT = "weight"
    DROP = "drop"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Settings of the loss.

    `hinge_margin` is in units of the selection logits (score / T for kind reserved).
    `teacher_temperature`: of the LLM's distribution over the candidates, in the listwise KL.
    `teacher_margin`: `drop` leaves out labels whose margin is below `min_margin`; `weight` does so
    too and weighs the others (margin + `margin_eps`) ** `margin_power`. `min_mass`: labels where
    the LLM gives all candidates together less probability are left out.
    """

    objective: Objective = Objective.TOP1_CE
    ce_weight: float = 1.0
    hinge_weight: float = 0.1
    hinge_margin: float = 0.1
    kl_weight: float = 0.5
    teacher_temperature: float = 1.0
    teacher_margin: MarginFilter = MarginFilter.NONE
    margin_power: float = 1.0
    margin_eps: float = 1e-3
    min_margin: float = 0.0
    min_mass: float = 1e-3


def label_weight(label: Label, config: LossConfig) -> float:
    """>= 0; 0 leaves the label out, as it does where there is nothing to select among."""
    if label.mass < config.min_mass:
        return 0.0
    if len(label.candidate_ids) < 2:
        return float(config.objective is Objective.PLAIN)
    if config.teacher_margin is MarginFilter.NONE:
        return 1.0
    margin = teacher_margin(label)
    if margin < config.min_margin:
        return 0.0
    return (
        1.0
        if config.teacher_margin is MarginFilter.DROP
        else (margin + config.margin_eps) ** config.margin_power
    )


def teacher_margin(label: Label) -> float:
    """The LLM's best minus its second-best candidate, as probabilities renormalised on the
    candidates."""
    top = max(label.llm_log_probs)
    shares = sorted((math.exp(x - top) for x in label.llm_log_probs), reverse=True)
    return (shares[0] - shares[1]) / sum(shares)


def selection_loss(
    logits: Tensor, labels: Sequence[Label], valid: Tensor, config: LossConfig
) -> Tensor:
    """L_sel [m] of logits [m, K]; padding is masked by `valid`."""
    logits = logits.masked_fill(~valid, IMPOSSIBLE)
    said = _llm_log_probs(labels, valid)
    if config.objective is Objective.PAIRWISE_MARGIN:
        return _pairwise_hinge(logits, said, valid, config.hinge_margin)
    listwise = _kl(
        (said / config.teacher_temperature).log_softmax(-1), logits.log_softmax(-1), valid
    )
    if config.objective is Objective.KL:
        return listwise
    best = torch.tensor([label.best for label in labels], device=logits.device)[:, None]
    ce = -logits.log_softmax(-1).gather(1, best)[:, 0]
    others = valid.scatter(1, best, torch.zeros_like(best, dtype=torch.bool))
    gap = (config.hinge_margin - logits.gather(1, best) + logits).clamp(min=0) * others
    hinge = gap.sum(-1) / others.sum(-1).clamp(min=1)
    return config.ce_weight * ce + config.hinge_weight * hinge + config.kl_weight * listwise


def plain_loss(log_probs: Tensor, labels: Sequence[Label], valid: Tensor) -> Tensor:
    """KL(p_L || p_S) [m] over the candidates and the rest of the vocabulary as one more outcome,
    from the student's log-probabilities [m, K] over the whole vocabulary. The LLM's are known only
    on the candidates."""
    ours = torch.cat([log_probs.masked_fill(~valid, IMPOSSIBLE), _rest(log_probs, valid)], dim=1)
    said = _llm_log_probs(labels, valid)
    theirs = torch.cat([said, _rest(said, valid)], dim=1)
    return _kl(theirs, ours, torch.cat([valid, valid[:, :1]], dim=1))


def _rest(log_probs: Tensor, valid: Tensor) -> Tensor:
    """[m, 1]: log of the probability that the candidates leave."""
    mass = (log_probs.exp() * valid).sum(-1, keepdim=True)
    return torch.log1p(-mass.clamp(max=1 - 1e-6))


def _kl(theirs: Tensor, ours: Tensor, valid: Tensor) -> Tensor:
    """[m]: sum over valid entries of p (log p - log q)."""
    return (theirs.exp() * (theirs - ours)).masked_fill(~valid, 0.0).sum(-1)


def _pairwise_hinge(logits: Tensor, said: Tensor, valid: Tensor, margin: float) -> Tensor:
    """[m]: mean over the pairs where the LLM strictly prefers i to j of max(0, margin - (s_i -
    s_j))."""
    pairs = (said[:, :, None] > said[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    gaps = (margin - logits[:, :, None] + logits[:, None, :]).clamp(min=0) * pairs
    return gaps.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def _llm_log_probs(labels: Sequence[Label], valid: Tensor) -> Tensor:
    """[m, K], padded."""
    k = valid.shape[1]
    rows = [
        [*label.llm_log_probs, *[IMPOSSIBLE] * (k - len(label.llm_log_probs))] for label in labels
    ]
    return torch.tensor(rows, dtype=torch.float32, device=valid.device)
