"""What a local selector is worth on held-out labels: agreement with the LLM, loss, LM-KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from s2t_shared.labels.label import Label, Rollout
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.statistics import hit_at, spearman
from s2t_shared.training.dataset import count_labels
from s2t_shared.training.distributed import shared_turns, sum_over_workers
from s2t_shared.training.loss import label_losses, regularise_unlabelled_only
from s2t_shared.training.settings import TrainingSettings
from s2t_shared.training.tree_forward import ContextCache, lm_kl, tree_scores
from s2t_shared.training.tree_layout import micro_batches, regularised_positions

LM_KL_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A local selector on held-out labels; the tuples have one entry per label.

    metrics: n, loss, agree_at_1, slm_agree_at_1, spearman, hit_at_1 .. hit_at_8. agreed: whether
    it selects the LLM's choice. slm_agreed: whether the SLM's first choice is the LLM's. groups:
    the group of problems the label belongs to, as labels of one group are alike.
    """

    metrics: dict[str, float]
    agreed: tuple[bool, ...]
    slm_agreed: tuple[bool, ...]
    groups: tuple[str, ...]


@torch.no_grad()
def evaluate_local_selector(
    runtime: ModelRuntime,
    local: LocalSelector,
    rollouts: Sequence[Rollout],
    settings: TrainingSettings,
    contexts: ContextCache | None = None,
) -> Evaluation:
    """Score the labels of `rollouts` and compare with the LLM's choices.

    Under torch.distributed all workers call this with the same arguments and share the work.
    """
    batches = list(micro_batches(rollouts, settings.max_tokens, settings.scored_tokens_per_label))
    ends = list(accumulate(count_labels(batch) for batch in batches))
    # Per label: agreement, Spearman's rho, loss.
    figures = torch.zeros(count_labels(rollouts), 3, dtype=torch.float64)
    for number, counts in shared_turns(len(batches)):
        found = _label_figures(runtime, local, batches[number], settings, contexts)
        if counts:
            figures[ends[number] - len(found) : ends[number]] = found
    figures = sum_over_workers(figures, runtime.device)
    labels = [label for rollout in rollouts for label in rollout.labels]
    slm_agreed = tuple(label.best == 0 for label in labels)
    agree_at_1, rho, loss = figures.mean(0).tolist()
    metrics = {
        "n": float(len(labels)),
        "loss": loss,
        "agree_at_1": agree_at_1,
        "slm_agree_at_1": sum(slm_agreed) / len(slm_agreed),
        "spearman": rho,
    }
    ranks = [label.llm_top_rank for label in labels]
    metrics |= {f"hit_at_{k}": rate for k, rate in hit_at(ranks).items()}
    groups = []
    for rollout in rollouts:
        groups += [f"{rollout.task}/{rollout.split_group}"] * len(rollout.labels)
    return Evaluation(
        metrics=metrics,
        agreed=tuple(bool(agreed) for agreed in figures[:, 0].tolist()),
        slm_agreed=slm_agreed,
        groups=tuple(groups),
    )


def _label_figures(
    runtime: ModelRuntime,
    local: LocalSelector,
    rollouts: Sequence[Rollout],
    settings: TrainingSettings,
    contexts: ContextCache | None,
) -> torch.Tensor:
    """Agreement, Spearman's rho and loss of each label, [m, 3]."""
    result = tree_scores(runtime, local, rollouts, contexts)
    losses = label_losses(runtime, local, result, settings).tolist()
    rows = []
    for scores, label, loss in zip(result.scores.tolist(), result.labels, losses, strict=True):
        agreed, rho = _agreement(scores, label)
        rows.append([agreed, rho, loss])
    return torch.tensor(rows, dtype=torch.float64)


def _agreement(scores: Sequence[float], label: Label) -> tuple[float, float]:
    """Whether the selection is the LLM's (ties go to the SLM's order), and Spearman's rho."""
    k = len(label.candidate_ids)
    choice = max(range(k), key=lambda i: (scores[i], -i))
    return float(choice == label.best), spearman(scores[:k], label.llm_log_probs)


@torch.no_grad()
def mean_lm_kl(
    runtime: ModelRuntime,
    local: LocalSelector,
    rollouts: Sequence[Rollout],
    settings: TrainingSettings,
) -> float:
    """KL(adapted || base) of the language model in nats per token, were the adapter on everywhere.

    Over about LM_KL_POSITIONS of the contexts' positions that the regulariser covers, as the whole
    vocabulary at each is expensive. Shared among workers like `evaluate_local_selector`.
    """
    skip_labelled = regularise_unlabelled_only(local.kind)
    stride = math.ceil(regularised_positions(rollouts, skip_labelled) / LM_KL_POSITIONS) or 1
    sample = rollouts[::stride]
    batches = list(micro_batches(sample, settings.max_tokens, scored_tokens_per_label=0))
    sums = torch.zeros(len(batches), dtype=torch.float64)
    for number, counts in shared_turns(len(batches)):
        divergence = float(lm_kl(runtime, local, batches[number], None, skip_labelled))
        if counts:
            sums[number] = divergence
    total = float(sum_over_workers(sums, runtime.device).sum())
    return total / max(1, regularised_positions(sample, skip_labelled))
