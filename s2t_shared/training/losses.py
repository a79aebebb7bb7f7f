"""The training losses: functions of a local selector's logits and of the labels. No models.

Every loss is one value per label. `label_weight` says how much a label counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s2t_shared.labels.label import Label
from s2t_shared.training.published_losses import pairwise_hinge
from s2t_shared.training.settings import MarginFilter, Objective, TrainingSettings

IMPOSSIBLE = -1e4  # stands for log 0 of padding, where -inf would make 0 * inf
MAX_MASS = 1 - 1e-6  # of the candidates together, so that the rest has a logarithm


# -- how much a label counts ----------------------------------------------------------------------


def label_weight(label: Label, settings: TrainingSettings) -> float:
    """Weight of a label in the batch's mean, >= 0.

    0 leaves the label out: the LLM gives its candidates too little probability, there is nothing
    to select among, or the LLM's margin is too small.
    """
    if label.mass < settings.min_mass:
        return 0.0
    if len(label.candidate_ids) < 2:
        return 1.0 if settings.objective is Objective.PLAIN else 0.0
    if settings.teacher_margin is MarginFilter.NONE:
        return 1.0
    margin = teacher_margin(label)
    if margin < settings.min_margin:
        return 0.0
    if settings.teacher_margin is MarginFilter.DROP:
        return 1.0
    return (margin + settings.margin_eps) ** settings.margin_power


def label_weights(
    mass: np.ndarray, counts: np.ndarray, log_probs: np.ndarray, settings: TrainingSettings
) -> np.ndarray:
    """`label_weight` of many labels, [n].

    counts: [n], of the candidates; log_probs: the LLM's, of all candidates of all labels.
    """
    weights = np.ones(len(mass))
    if settings.teacher_margin is not MarginFilter.NONE and len(counts):
        margins = _teacher_margins(counts, log_probs)
        if settings.teacher_margin is MarginFilter.WEIGHT:
            weights = (margins + settings.margin_eps) ** settings.margin_power
        weights = weights * (margins >= settings.min_margin)
    alone = 1.0 if settings.objective is Objective.PLAIN else 0.0
    weights = np.where(counts < 2, alone, weights)
    found: np.ndarray = weights * (mass.astype(np.float64) >= settings.min_mass)
    return found


def _teacher_margins(counts: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    """`teacher_margin` of many labels, [n]."""
    valid = np.arange(counts.max())[None, :] < counts[:, None]
    padded = np.full(valid.shape, -np.inf)
    padded[valid] = log_probs
    padded = np.sort(padded, axis=1)[:, ::-1]
    shares = np.exp(padded - padded[:, :1])
    second = shares[:, 1] if shares.shape[1] > 1 else 0.0
    found: np.ndarray = (shares[:, 0] - second) / shares.sum(1)
    return found


def teacher_margin(label: Label) -> float:
    """The LLM's best minus its second-best probability, renormalised on the candidates."""
    top = max(label.llm_log_probs)
    shares = sorted((math.exp(x - top) for x in label.llm_log_probs), reverse=True)
    return (shares[0] - shares[1]) / sum(shares)


# -- losses ---------------------------------------------------------------------------------------


def selection_loss(
    logits: Tensor, labels: Sequence[Label], valid: Tensor, settings: TrainingSettings
) -> Tensor:
    """Selection loss [m] of the local selector's logits [m, K].

    valid: bool [m, K], False on padding.
    """
    logits = logits.masked_fill(~valid, IMPOSSIBLE)
    teacher = _llm_log_probs(labels, valid)
    if settings.objective is Objective.PAIRWISE_MARGIN:
        return pairwise_hinge(logits, teacher, valid, settings.hinge_margin)
    softened = (teacher / settings.teacher_temperature).log_softmax(-1)
    listwise = _kl(softened, logits.log_softmax(-1), valid)
    if settings.objective is Objective.KL:
        return listwise
    best = torch.tensor([label.best for label in labels], device=logits.device)[:, None]
    cross_entropy = -logits.log_softmax(-1).gather(1, best)[:, 0]
    hinge = _top1_hinge(logits, best, valid, settings.hinge_margin)
    return (
        settings.ce_weight * cross_entropy
        + settings.hinge_weight * hinge
        + settings.kl_weight * listwise
    )


def plain_loss(log_probs: Tensor, labels: Sequence[Label], valid: Tensor) -> Tensor:
    """KL(p_LLM || p_SLM) [m] over the candidates and, as one more outcome, the other tokens.

    log_probs: [m, K] of the SLM over the whole vocabulary. The LLM's are known on the candidates
    only.
    """
    teacher = _llm_log_probs(labels, valid)
    student = log_probs.masked_fill(~valid, IMPOSSIBLE)
    teacher = torch.cat([teacher, _log_rest(teacher, valid)], dim=1)
    student = torch.cat([student, _log_rest(log_probs, valid)], dim=1)
    with_rest = torch.cat([valid, valid[:, :1]], dim=1)
    return _kl(teacher, student, with_rest)


def _top1_hinge(logits: Tensor, best: Tensor, valid: Tensor, margin: float) -> Tensor:
    """Mean over the other candidates of max(0, margin - (s_best - s_other)), [m]."""
    others = valid.scatter(1, best, torch.zeros_like(best, dtype=torch.bool))
    gaps = (margin - logits.gather(1, best) + logits).clamp(min=0) * others
    return gaps.sum(-1) / others.sum(-1).clamp(min=1)


def _kl(teacher: Tensor, student: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid entries of p (log p - log q), [m]."""
    return (teacher.exp() * (teacher - student)).masked_fill(~valid, 0.0).sum(-1)


def _log_rest(log_probs: Tensor, valid: Tensor) -> Tensor:
    """Log of the probability that the candidates leave to other tokens, [m, 1]."""
    mass = (log_probs.exp() * valid).sum(-1, keepdim=True)
    return torch.log1p(-mass.clamp(max=MAX_MASS))


def _llm_log_probs(labels: Sequence[Label], valid: Tensor) -> Tensor:
    """The LLM's log-probabilities [m, K], padded with `IMPOSSIBLE`."""
    rows = []
    for label in labels:
        padding = [IMPOSSIBLE] * (valid.shape[1] - len(label.llm_log_probs))
        rows.append([*label.llm_log_probs, *padding])
    return torch.tensor(rows, dtype=torch.float32, device=valid.device)
