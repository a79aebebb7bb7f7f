"""Tree packing: all scored tokens of all labelled positions of a rollout in one sequence, its
context once.

The forwards are the runtime's own and the scores `local_selector.combine`'s, so what is trained is
what is served. The result equals one sequence per candidate (DESIGN law 2).

    reads: base      context forward without gradient -> its KV; one branch with the scored tokens,
    adapter on reads: adapted   one branch with context and siblings, adapter on everywhere

Nothing here is of size [positions, K, vocabulary]: scores need the candidates' or the reserved rows
of the head, and what needs the whole vocabulary goes through it a few positions at a time. Knows
rollouts and models; no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s2t_shared.labels.label import Label, Rollout
from s2t_shared.model.attention import Aside
from s2t_shared.model.local_selector import (
    Candidates,
    LocalSelector,
    Reading,
    SelectorKind,
    block_mask,
    combine,
    split_hidden,
)
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.dataset import tree_length

VOCABULARY_ROWS = 256  # positions whose full-vocabulary logits exist at once


@dataclass(frozen=True, kw_only=True)
class TreeScores:
    """Scores [m, K] of all m labels of a batch, their candidates and labels in the same order.
    last: [m, hidden] of the tokens before them, where the kind looks at these. context: [trees, t,
    hidden] of the adapted context, where it was read."""

    scores: Tensor
    candidates: Candidates
    labels: list[Label]
    last: Tensor | None
    context: Tensor | None


class Contexts:
    """Keys and values of contexts as the base model reads them. They never change while a selector
    learns to read over them (`reads: base`), so each context is read once, not in every epoch, as
    far as `max_bytes` reach.

    A context is read by itself: the same numbers to the last bit whoever trains beside it, and
    after a resume.
    """

    def __init__(self, runtime: ModelRuntime, max_bytes: int) -> None:
        self._runtime, self._room = runtime, max_bytes
        self._kept: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}

    def plan(self, trees: Sequence[Rollout]) -> Aside:
        """The contexts of `trees` padded to one finished `Aside`."""
        parts = [self._read(tree) for tree in trees]
        longest = max(tree_length(tree) for tree in trees)
        layers = []
        for layer in zip(*parts, strict=True):
            sides = []
            for side in (0, 1):
                rows = [pair[side] for pair in layer]
                padded = rows[0].new_zeros(len(rows), rows[0].shape[1], longest, rows[0].shape[3])
                for row, values in zip(padded, rows, strict=True):
                    row[:, : values.shape[2]] = values[0]
                sides.append(padded)
            layers.append((sides[0], sides[1]))
        plan, _ = _causal(trees)
        plan.hold(layers)
        return plan

    @torch.no_grad()
    def _read(self, tree: Rollout) -> list[tuple[Tensor, Tensor]]:
        key = tree.rollout_id, tree_length(tree)
        if key not in self._kept:
            plan, tokens = _causal([tree])
            self._runtime.aside(tokens, plan)
            layers = [(k.contiguous(), v.contiguous()) for k, v in plan.stored]
            size = sum(t.numel() * t.element_size() for pair in layers for t in pair)
            if (
                size > self._room
            ):  # those that are kept stay: in a walk over all, what was used last comes again last
                return layers
            self._room -= size
            self._kept[key] = layers
        return self._kept[key]


def tree_scores(
    runtime: ModelRuntime,
    selector: LocalSelector,
    trees: Sequence[Rollout],
    contexts: Contexts | None = None,
) -> TreeScores:
    """Score every candidate of every label of `trees` in one pass; `contexts`: those of `reads:
    base`, kept."""
    labels = [label for tree in trees for label in tree.labels]
    candidates = Candidates.pad(
        [label.candidate_ids for label in labels], [label.slm_log_probs for label in labels]
    )
    if selector.reads is Reading.BASE:
        last, siblings = _over_base(runtime, selector, trees, candidates, contexts)
        context = None
    else:
        last, siblings, context = _over_adapted(runtime, selector, trees, candidates)
    return TreeScores(
        scores=combine(runtime, selector, last, siblings, candidates),
        candidates=candidates,
        labels=labels,
        last=last,
        context=context,
    )


def _over_base(
    runtime: ModelRuntime,
    selector: LocalSelector,
    trees: Sequence[Rollout],
    candidates: Candidates,
    contexts: Contexts | None,
) -> tuple[Tensor | None, Tensor | None]:
    if contexts is not None:
        context = contexts.plan(trees)
    else:
        context, context_tokens = _causal(trees)
        with torch.no_grad():
            runtime.aside(context_tokens, context)
    with_last = selector.kind is not SelectorKind.RESERVED
    k = candidates.ids.shape[1] if selector.kind is not SelectorKind.PREFIX else 0
    width, most = k + int(with_last), max(len(tree.labels) for tree in trees)
    shape = (len(trees), most, width)
    tokens, positions, visible = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    rows, columns, ends, before = _places(trees)
    tokens[rows, columns, int(with_last) :] = candidates.ids if k else candidates.ids[:, :0]
    positions[rows, columns] = ends[:, None]
    visible[rows, columns] = ends[:, None] - int(with_last)
    if with_last:
        tokens[rows, columns, 0] = before
        positions[rows, columns, 0] = ends - 1
    mask = torch.block_diag(*[block_mask(k, with_last)] * most).bool()
    plan = Aside(positions.flatten(1), mask, context, visible.flatten(1))
    hidden = runtime.aside(tokens.flatten(1), plan, selector.adapter)
    return split_hidden(selector, hidden.unflatten(1, (most, width))[rows, columns], k)


def _over_adapted(
    runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Rollout], candidates: Candidates
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    rows, columns, ends, _ = _places(trees)
    plan, tokens = _causal(trees)
    if selector.kind is SelectorKind.PREFIX:
        context = runtime.aside(tokens, plan, selector.adapter)
        return context[rows, ends - 1], None, context
    n, longest = tokens.shape
    k, most = candidates.ids.shape[1], max(len(tree.labels) for tree in trees)
    siblings, positions = (torch.zeros(n, most, k, dtype=torch.long) for _ in range(2))
    siblings[rows, columns] = candidates.ids
    positions[rows, columns] = ends[:, None]
    # A sibling sees the context before its position, and itself.
    sees = torch.arange(longest) < positions.flatten(1)[:, :, None]
    mask = torch.zeros(n, longest + most * k, longest + most * k, dtype=torch.bool)
    mask[:, :longest, :longest] = torch.ones(longest, longest).tril().bool()
    mask[:, longest:, :longest] = sees
    mask[:, longest:, longest:] = torch.eye(most * k, dtype=torch.bool)
    plan = Aside(torch.cat([plan.positions, positions.flatten(1)], 1), mask)
    hidden = runtime.aside(torch.cat([tokens, siblings.flatten(1)], 1), plan, selector.adapter)
    context, scored = (
        hidden[:, :longest],
        hidden[:, longest:].unflatten(1, (most, k))[rows, columns],
    )
    return context[rows, ends - 1] if selector.kind is SelectorKind.JOINT else None, scored, context


def _places(trees: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every label: its tree, its number in the tree, its position, and the token before it. Each
    [m]."""
    places = [
        (row, column, label.position, tree.token_ids[label.position - 1])
        for row, tree in enumerate(trees)
        for column, label in enumerate(tree.labels)
    ]
    rows, columns, ends, before = torch.tensor(places).T
    return rows, columns, ends, before


def _causal(trees: Sequence[Rollout]) -> tuple[Aside, Tensor]:
    """The plan and the padded tokens [trees, t] of reading the contexts alone."""
    lengths = [tree_length(tree) for tree in trees]
    longest = max(lengths)
    tokens = torch.tensor(
        [
            [*tree.token_ids[:n], *[0] * (longest - n)]
            for tree, n in zip(trees, lengths, strict=True)
        ]
    )
    return Aside(
        torch.arange(longest).expand(len(trees), -1), torch.ones(longest, longest).tril().bool()
    ), tokens


def parts_of(trees: Sequence[Rollout], max_tokens: int, width: int) -> Iterator[list[Rollout]]:
    """Neighbouring trees that fit one forward of about `max_tokens` tokens with padding; `width`:
    scored tokens per label. A tree that is larger stands alone."""
    part: list[Rollout] = []
    longest = most = 0
    for tree in trees:
        longest, most = max(longest, tree_length(tree)), max(most, len(tree.labels))
        if part and (len(part) + 1) * (longest + most * width) > max_tokens:
            yield part
            part, longest, most = [], tree_length(tree), len(tree.labels)
        part.append(tree)
    if part:
        yield part


def regularised_positions(trees: Sequence[Rollout], skip_labelled: bool) -> int:
    """How many positions `lm_kl` sums over."""
    skipped = (
        sum(len({label.position for label in tree.labels}) for tree in trees)
        if skip_labelled
        else 0
    )
    return sum(tree_length(tree) for tree in trees) - skipped


def lm_kl(
    runtime: ModelRuntime,
    selector: LocalSelector,
    trees: Sequence[Rollout],
    context: Tensor | None,
    skip_labelled: bool,
) -> Tensor:
    """L_reg, summed over the contexts' positions: KL(adapted || base) in nats of the language-model
    distribution over V \\ R. context: the adapted hidden states, where they are at hand.
    `skip_labelled` leaves the labelled positions out, where a prefix score is meant to move it."""
    plan, tokens = _causal(trees)
    if context is None:
        context = runtime.aside(tokens, plan, selector.adapter)
    with torch.no_grad():  # the reference is the same model, its adapter off
        base = runtime.aside(tokens, plan)
    lengths = torch.tensor([tree_length(tree) for tree in trees])
    keep = torch.arange(tokens.shape[1]) < lengths[:, None]
    if skip_labelled:
        rows, _, ends, _ = _places(trees)
        keep[rows, ends - 1] = False
    keep = keep.to(context.device)
    masked = _masked_ids(runtime, selector)

    def divergence(adapted: Tensor, reference: Tensor) -> Tensor:
        log_a, log_b = (
            runtime.logits(h).index_fill(-1, masked, -1e9).log_softmax(-1)
            for h in (adapted, reference)
        )
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    return _in_chunks(divergence, context[keep], base[keep]).sum()


def vocabulary_log_probs(
    runtime: ModelRuntime, selector: LocalSelector, last: Tensor, candidate_ids: Tensor
) -> Tensor:
    """Hidden states [m, hidden], ids [m, K] -> the ids' log-probabilities [m, K] over V \\ R."""
    masked = _masked_ids(runtime, selector)

    def normaliser(hidden: Tensor) -> Tensor:
        return runtime.logits(hidden).index_fill(-1, masked, -1e9).logsumexp(-1)

    return runtime.row_logits(last, candidate_ids) - _in_chunks(normaliser, last)[:, None]


def _masked_ids(runtime: ModelRuntime, selector: LocalSelector) -> Tensor:
    real = [i for i in selector.reserved_ids if i < runtime.vocab_rows]
    return torch.tensor(real, dtype=torch.long, device=runtime.device)


def _in_chunks(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` over the rows of `inputs`, a few at a time; its inner values are computed again
    for the gradient rather than kept, as they are as wide as the vocabulary."""
    parts = []
    for at in range(0, len(inputs[0]), VOCABULARY_ROWS):
        rows = [x[at : at + VOCABULARY_ROWS] for x in inputs]
        parts.append(
            checkpoint(function, *rows, use_reentrant=False)
            if torch.is_grad_enabled()
            else function(*rows)
        )
    return torch.cat(parts) if parts else inputs[0].new_zeros(0)
