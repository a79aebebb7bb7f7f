"""What training minimises, and what is measured of a selector on held-out labels.

Knows labels and models; how weights change is `distill`'s. Several workers only need
torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from s2t_shared.errors import ConfigError
from s2t_shared.labels.label import Label, Rollout
from s2t_shared.model.local_selector import LocalSelector, Reading, Scoring, SelectorKind
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.statistics import hit_at, spearman
from s2t_shared.training.dataset import count_labels
from s2t_shared.training.losses import (
    LossConfig,
    Objective,
    label_weight,
    plain_loss,
    selection_loss,
)
from s2t_shared.training.tree_forward import (
    Contexts,
    TreeScores,
    lm_kl,
    parts_of,
    regularised_positions,
    tree_scores,
    vocabulary_log_probs,
)

LM_KL_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True)
class DistillSettings(LossConfig):
    """Training settings. Loss = L_sel (`losses`) + reg_weight * L_reg.

    `temperature`: T of the reserved score; scores lie in [0, 1], so T = 1 would leave a loss floor
    of 1.87 nats at K = 16. `row_scale`: standard deviation of the reserved-row deltas at the start,
    in units of the head's own. `fusion`: choose lambda (weight of log p_base in the score) on the
    validation labels. `batch_labels`: labels per step, of all workers together; `max_tokens`:
    tokens of one forward, more of a batch is accumulated. `validate_every`: steps; 0: a tenth of
    all. `patience`: validations without improvement before stopping. `checkpoint_every`: steps.
    `held_out_labels`: to validate on, and as many to test on, at most. `kept_gib`: memory for
    contexts that are read once (`reads: base`, unsharded); 0: read in every epoch.
    """

    kind: SelectorKind = SelectorKind.PREFIX
    reads: Reading = Reading.BASE
    scoring: Scoring = Scoring.EXPECTED
    standardise: bool = False
    fusion: bool = False
    steps: int = 1000
    batch_labels: int = 64
    max_tokens: int = 16_384
    learning_rate: float = 3e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    temperature: float = 0.1
    row_scale: float = 1.0
    reg_weight: float = 0.1
    validate_every: int = 0
    patience: int = 3
    checkpoint_every: int = 100
    held_out_labels: int = 4096
    kept_gib: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError: settings that contradict one another."""
        plain = self.objective is Objective.PLAIN
        if plain and (self.kind, self.reads) != (SelectorKind.PREFIX, Reading.ADAPTED):
            raise ConfigError(
                "training.objective=plain distils the SLM itself: it needs training.kind=prefix and "
                "training.reads=adapted"
            )
        if self.kind is SelectorKind.PREFIX and (
            self.standardise or self.scoring is not Scoring.EXPECTED
        ):
            raise ConfigError(
                "training.scoring and training.standardise change the reserved score, which kind prefix "
                "does not have; choose training.kind=joint or reserved"
            )

    @property
    def scored_tokens(self) -> int:
        """Per label of 16 candidates, about: what a forward has besides the contexts."""
        return (self.kind is not SelectorKind.PREFIX) * 16 + (self.reads is Reading.BASE)

    def weigh(self, label: Label) -> float:
        return label_weight(label, self)


# -- loss -----------------------------------------------------------------------------------------


def skips_labelled(kind: SelectorKind) -> bool:
    """L_reg leaves out the positions where a prefix score is meant to move the language model."""
    return kind is not SelectorKind.RESERVED


@dataclass(frozen=True)
class Whole:
    """What the sums over a whole batch are divided by, so that its parts and workers add up to its
    mean."""

    weight: float
    positions: int

    @classmethod
    def of(cls, trees: Sequence[Rollout], config: DistillSettings) -> Whole:
        return cls(
            sum(config.weigh(label) for tree in trees for label in tree.labels),
            regularised_positions(trees, skips_labelled(config.kind)),
        )


def training_loss(
    runtime: ModelRuntime,
    selector: LocalSelector,
    trees: Sequence[Rollout],
    config: DistillSettings,
    whole: Whole | None = None,
    contexts: Contexts | None = None,
) -> Tensor:
    """L = L_sel + reg * L_reg: the share of `trees` in the mean over `whole` (by default: these
    trees alone). With `reads: base` the adapter never touches the context: there is no L_reg, and
    `contexts` may keep it."""
    whole = whole or Whole.of(trees, config)
    result = tree_scores(runtime, selector, trees, contexts)
    weights = torch.tensor([config.weigh(label) for label in result.labels], device=runtime.device)
    loss = (weights * _label_losses(runtime, selector, result, config)).sum() / whole.weight
    if config.reg_weight and selector.reads is Reading.ADAPTED and whole.positions:
        moved = lm_kl(runtime, selector, trees, result.context, skips_labelled(config.kind))
        loss = loss + config.reg_weight * moved / whole.positions
    return loss


def _label_losses(
    runtime: ModelRuntime, selector: LocalSelector, result: TreeScores, config: DistillSettings
) -> Tensor:
    """[m]"""
    valid = result.candidates.valid.to(runtime.device)
    if config.objective is Objective.PLAIN:
        assert result.last is not None
        log_probs = vocabulary_log_probs(runtime, selector, result.last, result.candidates.ids)
        return plain_loss(log_probs, result.labels, valid)
    return selection_loss(selector.selection_logits(result.scores), result.labels, valid, config)


# -- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A selector on held-out labels. agreed: per label, whether it selects what the LLM does;
    slm_agreed: whether the SLM's first choice does; problems: the one each label belongs to (labels
    of one problem are alike)."""

    metrics: dict[str, float]
    agreed: tuple[bool, ...]
    slm_agreed: tuple[bool, ...]
    problems: tuple[str, ...]


@torch.no_grad()
def evaluate_selector(
    runtime: ModelRuntime,
    selector: LocalSelector,
    trees: Sequence[Rollout],
    config: DistillSettings,
    with_lm_kl: bool = False,
    together: bool = False,
    contexts: Contexts | None = None,
) -> Evaluation:
    """Loss, Agree@1, the SLM's own Agree@1, Spearman, Hit@K of the labels; LM-KL in nats per token
    (of some of the trees), as if the adapter were on everywhere, at the positions L_reg is about.
    `together`: all workers call this and share the work."""
    rank, world = place() if together else (0, 1)
    figures = torch.zeros(count_labels(trees), 3, dtype=torch.float64)
    parts = list(parts_of(trees, config.max_tokens, config.scored_tokens))
    ends = list(accumulate(map(count_labels, parts)))
    for number, counts in _turns(len(parts), rank, world):
        result = tree_scores(runtime, selector, parts[number], contexts)
        losses = _label_losses(runtime, selector, result, config).tolist()
        rows = zip(result.scores.tolist(), result.labels, losses, strict=True)
        if counts:
            figures[ends[number] - len(losses) : ends[number]] = torch.tensor(
                [[*_agreement(scores, label), loss] for scores, label, loss in rows],
                dtype=torch.float64,
            )
    if world > 1:
        figures = _sum_over_workers(figures, runtime.device)
    labels = [label for tree in trees for label in tree.labels]
    first = tuple(label.best == 0 for label in labels)
    agreed, rho, loss = figures.mean(0).tolist()
    metrics = {
        "n": float(len(labels)),
        "loss": loss,
        "agree_at_1": agreed,
        "slm_agree_at_1": sum(first) / len(first),
        "spearman": rho,
    }
    metrics |= {
        f"hit_at_{k}": hit_at([label.llm_top_rank for label in labels], k) for k in (1, 2, 4, 8)
    }
    if with_lm_kl and selector.adapter is not None:
        metrics["lm_kl"] = _mean_lm_kl(runtime, selector, trees, config, rank, world)
    return Evaluation(
        metrics,
        tuple(bool(x) for x in figures[:, 0].tolist()),
        first,
        tuple(f"{tree.task}/{tree.problem}" for tree in trees for _ in tree.labels),
    )


def _agreement(scores: Sequence[float], label: Label) -> tuple[float, float]:
    """Whether the selection is the LLM's (ties to the SLM's order), and Spearman's rho."""
    k = len(label.candidate_ids)
    choice = max(range(k), key=lambda i: (scores[i], -i))
    return float(choice == label.best), spearman(scores[:k], label.llm_log_probs)


def _mean_lm_kl(
    runtime: ModelRuntime,
    selector: LocalSelector,
    trees: Sequence[Rollout],
    config: DistillSettings,
    rank: int,
    world: int,
) -> float:
    """Nats per token, over about LM_KL_POSITIONS of the contexts' positions: the whole vocabulary
    at each is dear."""
    skip = skips_labelled(selector.kind)
    some = trees[:: math.ceil(regularised_positions(trees, skip) / LM_KL_POSITIONS) or 1]
    parts = list(parts_of(some, config.max_tokens, 0))
    sums = torch.zeros(len(parts), dtype=torch.float64)
    for number, counts in _turns(len(parts), rank, world):
        sums[number] += counts * float(lm_kl(runtime, selector, parts[number], None, skip))
    if world > 1:
        sums = _sum_over_workers(sums, runtime.device)
    return float(sums.sum()) / max(1, regularised_positions(some, skip))


def _turns(count: int, rank: int, world: int) -> Iterator[tuple[int, bool]]:
    """Which of `count` parts this worker does, and whether it counts. All do as many, if need be
    one that another does: with a sharded model a forward takes all workers."""
    for start in range(0, count, world):
        yield min(start + rank, count - 1), start + rank < count


def place() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _sum_over_workers(values: Tensor, device: torch.device) -> Tensor:
    moved = values.to(device)
    dist.all_reduce(moved)
    return moved.cpu()
