"""What training minimises: selection loss + reg_weight * regulariser, of a batch of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t_shared.labels.label import Rollout
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.losses import label_weight, plain_loss, selection_loss
from s2t_shared.training.settings import Objective, TrainingSettings
from s2t_shared.training.tree_forward import (
    ContextCache,
    TreeScores,
    lm_kl,
    tree_scores,
    vocabulary_log_probs,
)
from s2t_shared.training.tree_layout import regularised_positions
from s2t_shared.types import Reading, SelectorKind


@dataclass(frozen=True)
class BatchTotals:
    """What the sums over a batch are divided by.

    Micro-batches and workers that divide by the same totals add up to the batch's mean. weight:
    of all labels together. positions: of the regulariser.
    """

    weight: float
    positions: int

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], settings: TrainingSettings) -> BatchTotals:
        """The totals of a whole batch."""
        weight = 0.0
        for rollout in rollouts:
            weight += sum(label_weight(label, settings) for label in rollout.labels)
        skip_labelled = regularise_unlabelled_only(settings.kind)
        return cls(weight, regularised_positions(rollouts, skip_labelled))


def regularise_unlabelled_only(kind: SelectorKind) -> bool:
    """Whether the regulariser leaves out labelled positions.

    There a prefix score is meant to move the language model.
    """
    return kind is not SelectorKind.RESERVED


def training_loss(
    runtime: ModelRuntime,
    local: LocalSelector,
    rollouts: Sequence[Rollout],
    settings: TrainingSettings,
    totals: BatchTotals | None = None,
    contexts: ContextCache | None = None,
) -> Tensor:
    """The share of `rollouts` in a batch's mean loss, a scalar with gradient.

    totals: of the whole batch; by default these rollouts are the batch. contexts: cached KV, for
    `reads: base`, which has no regulariser: its adapter never touches the context.
    """
    totals = totals or BatchTotals.of(rollouts, settings)
    result = tree_scores(runtime, local, rollouts, contexts)
    weights = [label_weight(label, settings) for label in result.labels]
    losses = label_losses(runtime, local, result, settings)
    loss = (torch.tensor(weights, device=runtime.device) * losses).sum() / totals.weight
    if settings.reg_weight and local.reads is Reading.ADAPTED and totals.positions:
        skip_labelled = regularise_unlabelled_only(settings.kind)
        divergence = lm_kl(runtime, local, rollouts, result.context, skip_labelled)
        loss = loss + settings.reg_weight * divergence / totals.positions
    return loss


def label_losses(
    runtime: ModelRuntime, local: LocalSelector, result: TreeScores, settings: TrainingSettings
) -> Tensor:
    """The loss of each label, unweighted, [m]."""
    valid = result.candidates.valid.to(runtime.device)
    if settings.objective is Objective.PLAIN:
        assert result.last is not None
        log_probs = vocabulary_log_probs(runtime, local, result.last, result.candidates.ids)
        return plain_loss(log_probs, result.labels, valid)
    logits = local.selection_logits(result.scores)
    return selection_loss(logits, result.labels, valid, settings)
