"""Where the tokens and labels of a batch of rollouts stand in a packed forward. No models run here.

A rollout's context is there once, however many labels it has. Its labels' scored tokens either
branch off the finished context (`reads: base`) or follow it in the same forward (`reads:
adapted`). No scored token sees another label's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t_shared.labels.label import Rollout
from s2t_shared.model.local_selector import block_mask
from s2t_shared.model.padded_plan import PaddedPlan
from s2t_shared.training.dataset import context_length


@dataclass(frozen=True, kw_only=True)
class TreeLayout:
    """The contexts of n rollouts and the places of their m labels.

    tokens: [n, t] contexts up to the last label, padded on the right. lengths: [n] without
    padding. Of each label, in order, all [m]: rows, its rollout; columns, its number within the
    rollout; ends, its position, which is the length of its context.
    """

    tokens: Tensor
    lengths: Tensor
    rows: Tensor
    columns: Tensor
    ends: Tensor

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> TreeLayout:
        """The layout of labelled rollouts."""
        lengths = [context_length(rollout) for rollout in rollouts]
        tokens = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)
        places = []
        for row, rollout in enumerate(rollouts):
            tokens[row, : lengths[row]] = torch.tensor(rollout.token_ids[: lengths[row]])
            for column, label in enumerate(rollout.labels):
                places.append((row, column, label.position))
        rows, columns, ends = torch.tensor(places).T
        return cls(
            tokens=tokens,
            lengths=torch.tensor(lengths),
            rows=rows,
            columns=columns,
            ends=ends,
        )

    @property
    def labels_per_row(self) -> int:
        """The largest number of labels of one rollout."""
        return int(self.columns.max()) + 1

    def context_plan(self) -> PaddedPlan:
        """Attention over the contexts alone: causal."""
        n, t = self.tokens.shape
        return PaddedPlan(torch.arange(t).expand(n, -1), _causal_mask(t))

    def context_positions(self, skip_labelled: bool) -> Tensor:
        """bool [n, t]: which positions are not padding. skip_labelled: nor decide a label."""
        mask = torch.arange(self.tokens.shape[1]) < self.lengths[:, None]
        if skip_labelled:
            mask[self.rows, self.ends - 1] = False
        return mask

    def last_context_tokens(self, hidden: Tensor) -> Tensor:
        """The hidden states [m, hidden] that decide the labels, of the contexts' [n, t, hidden]."""
        return hidden[self.rows, self.ends - 1]

    # -- scored tokens ----------------------------------------------------------------------------

    def branch(
        self, siblings: Tensor, with_last: bool, context: PaddedPlan
    ) -> tuple[Tensor, PaddedPlan]:
        """Tokens [n, labels * width] and attention of all labels' blocks over a finished context.

        siblings: [m, K] candidates to score, K may be 0. with_last: a block starts with the last
        context token, read once more. context: the plan of a forward over `tokens`.
        """
        k = siblings.shape[1]
        first = int(with_last)  # where the siblings of a block start
        shape = (len(self.tokens), self.labels_per_row, first + k)
        tokens = torch.zeros(shape, dtype=torch.long)
        positions = torch.zeros(shape, dtype=torch.long)
        visible = torch.zeros(shape, dtype=torch.long)
        rows, columns = self.rows, self.columns
        tokens[rows, columns, first:] = siblings
        positions[rows, columns] = self.ends[:, None]
        visible[rows, columns] = self.ends[:, None] - first
        if with_last:
            tokens[rows, columns, 0] = self.tokens[rows, self.ends - 1]
            positions[rows, columns, 0] = self.ends - 1
        blocks = [block_mask(k, with_last)] * self.labels_per_row
        mask = torch.block_diag(*blocks).bool()
        plan = PaddedPlan(positions.flatten(1), mask, context, visible.flatten(1))
        return tokens.flatten(1), plan

    def with_siblings(self, siblings: Tensor) -> tuple[Tensor, PaddedPlan]:
        """Tokens [n, t + labels * K] and attention of contexts and siblings in one forward.

        siblings: [m, K]. Each sees the context before its label's position, and itself.
        """
        n, t = self.tokens.shape
        k = siblings.shape[1]
        tokens = torch.zeros(n, self.labels_per_row, k, dtype=torch.long)
        positions = torch.zeros(n, self.labels_per_row, k, dtype=torch.long)
        tokens[self.rows, self.columns] = siblings
        positions[self.rows, self.columns] = self.ends[:, None]
        added = self.labels_per_row * k
        mask = torch.zeros(n, t + added, t + added, dtype=torch.bool)
        mask[:, :t, :t] = _causal_mask(t)
        mask[:, t:, :t] = torch.arange(t) < positions.flatten(1)[:, :, None]
        mask[:, t:, t:] = torch.eye(added, dtype=torch.bool)
        context_positions = torch.arange(t).expand(n, -1)
        plan = PaddedPlan(torch.cat([context_positions, positions.flatten(1)], dim=1), mask)
        return torch.cat([self.tokens, tokens.flatten(1)], dim=1), plan

    def of_labels(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, labels * width, hidden] of scored tokens -> [m, width, hidden]."""
        blocks = hidden.unflatten(1, (self.labels_per_row, -1))
        return blocks[self.rows, self.columns]


def _causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


# -- what fits one forward ------------------------------------------------------------------------


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, scored_tokens_per_label: int
) -> Iterator[list[Rollout]]:
    """Neighbouring rollouts that fit one forward of about `max_tokens` tokens with padding.

    A rollout that is larger stands alone.
    """
    batch: list[Rollout] = []
    longest = most_labels = 0
    for rollout in rollouts:
        longest = max(longest, context_length(rollout))
        most_labels = max(most_labels, len(rollout.labels))
        width = longest + most_labels * scored_tokens_per_label
        if batch and (len(batch) + 1) * width > max_tokens:
            yield batch
            batch = []
            longest = context_length(rollout)
            most_labels = len(rollout.labels)
        batch.append(rollout)
    if batch:
        yield batch


def regularised_positions(rollouts: Sequence[Rollout], skip_labelled: bool) -> int:
    """How many positions `tree_forward.lm_kl` sums over."""
    total = 0
    for rollout in rollouts:
        total += context_length(rollout)
        if skip_labelled:
            total -= len({label.position for label in rollout.labels})
    return total
