"""Packed forwards: the scores of every candidate of every label of a batch of rollouts in one pass.

The forwards are the runtime's own and the scores come from `local_selector.combine`, so what is
trained is what is served. The result equals one sequence per candidate (law 2).

    reads: base      forward over the contexts without gradient -> their KV; forward over the
                     scored tokens, with the adapter, on top of it
    reads: adapted   one forward over contexts and scored tokens, with the adapter

No tensor has size [positions, K, vocabulary]: scores need a few rows of the head, and what needs
the whole vocabulary goes through it a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s2t_shared.labels.label import Label, Rollout
from s2t_shared.model.local_selector import Candidates, LocalSelector, combine, split_hidden
from s2t_shared.model.padded_plan import PaddedPlan
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.dataset import context_length
from s2t_shared.training.tree_layout import TreeLayout
from s2t_shared.types import Reading, SelectorKind

VOCABULARY_ROWS = 256  # positions whose full-vocabulary logits exist at once
MASKED_LOGIT = -1e9  # of ids that are no text

LayerKV = tuple[Tensor, Tensor]  # keys and values, each [b, key heads, t, dim]


@dataclass(frozen=True, kw_only=True)
class TreeScores:
    """Scores of all m labels of a batch.

    scores: [m, K]; candidates, labels: in the same order. last: [m, hidden] of the last context
    tokens, where the kind looks at them. context: [n, t, hidden] of the contexts as the adapter
    reads them, where it read them.
    """

    scores: Tensor
    candidates: Candidates
    labels: list[Label]
    last: Tensor | None
    context: Tensor | None


@dataclass(frozen=True)
class _Hidden:
    """Hidden states of the scored tokens; see `TreeScores` and `local_selector.combine`."""

    last: Tensor | None
    siblings: Tensor | None
    context: Tensor | None = None


def tree_scores(
    runtime: ModelRuntime,
    local: LocalSelector,
    rollouts: Sequence[Rollout],
    contexts: ContextCache | None = None,
) -> TreeScores:
    """Score every candidate of every label. contexts: cached KV, for `reads: base`."""
    labels = [label for rollout in rollouts for label in rollout.labels]
    candidates = Candidates.pad(
        [label.candidate_ids for label in labels], [label.slm_log_probs for label in labels]
    )
    layout = TreeLayout.of(rollouts)
    if local.reads is Reading.ADAPTED:
        hidden = _over_adapted(runtime, local, layout, candidates)
    else:
        context = contexts.plan(rollouts, layout) if contexts is not None else None
        hidden = _over_base(runtime, local, layout, candidates, context)
    return TreeScores(
        scores=combine(runtime, local, hidden.last, hidden.siblings, candidates),
        candidates=candidates,
        labels=labels,
        last=hidden.last,
        context=hidden.context,
    )


def _over_base(
    runtime: ModelRuntime,
    local: LocalSelector,
    layout: TreeLayout,
    candidates: Candidates,
    context: PaddedPlan | None,
) -> _Hidden:
    if context is None:
        context = layout.context_plan()
        with torch.no_grad():
            runtime.forward_padded(layout.tokens, context)
    siblings = candidates.ids
    if local.kind is SelectorKind.PREFIX:
        siblings = siblings[:, :0]
    with_last = local.kind is not SelectorKind.RESERVED
    tokens, plan = layout.branch(siblings, with_last, context)
    blocks = layout.of_labels(runtime.forward_padded(tokens, plan, local.adapter))
    return _Hidden(*split_hidden(local, blocks, siblings.shape[1]))


def _over_adapted(
    runtime: ModelRuntime, local: LocalSelector, layout: TreeLayout, candidates: Candidates
) -> _Hidden:
    if local.kind is SelectorKind.PREFIX:
        context = runtime.forward_padded(layout.tokens, layout.context_plan(), local.adapter)
        return _Hidden(layout.last_context_tokens(context), None, context)
    tokens, plan = layout.with_siblings(candidates.ids)
    hidden = runtime.forward_padded(tokens, plan, local.adapter)
    length = layout.tokens.shape[1]
    context = hidden[:, :length]
    siblings = layout.of_labels(hidden[:, length:])
    last = layout.last_context_tokens(context) if local.kind is SelectorKind.JOINT else None
    return _Hidden(last, siblings, context)


# -- contexts that are read once ------------------------------------------------------------------


class ContextCache:
    """Keys and values of contexts as the base model reads them, at most `max_bytes` of them.

    They never change while a local selector with `reads: base` learns, so each context is read
    once instead of in every epoch. Each is read by itself: its numbers are the same to the last
    bit whatever else is in the batch, and after a resume.
    """

    def __init__(self, runtime: ModelRuntime, max_bytes: int) -> None:
        self._runtime = runtime
        self._free_bytes = max_bytes
        self._layers: dict[tuple[str, int], list[LayerKV]] = {}

    def plan(self, rollouts: Sequence[Rollout], layout: TreeLayout) -> PaddedPlan:
        """A finished plan of the rollouts' contexts, as a forward over all of them would leave.

        layout: of `rollouts`.
        """
        contexts = [self._read(rollout) for rollout in rollouts]
        length = layout.tokens.shape[1]
        layers = []
        for layer in zip(*contexts, strict=True):
            keys = _pad([keys for keys, _ in layer], length)
            values = _pad([values for _, values in layer], length)
            layers.append((keys, values))
        plan = layout.context_plan()
        plan.set_kv(layers)
        return plan

    @torch.no_grad()
    def _read(self, rollout: Rollout) -> list[LayerKV]:
        key = (rollout.rollout_id, context_length(rollout))
        if key in self._layers:
            return self._layers[key]
        layout = TreeLayout.of([rollout])
        plan = layout.context_plan()
        self._runtime.forward_padded(layout.tokens, plan)
        layers = [(keys.contiguous(), values.contiguous()) for keys, values in plan.kv]
        size = sum(keys.nbytes + values.nbytes for keys, values in layers)
        # Nothing is evicted: in a walk over all contexts, the one used last comes again last.
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._layers[key] = layers
        return layers


def _pad(rows: Sequence[Tensor], length: int) -> Tensor:
    """Tensors [1, heads, t, dim] of different t -> one [rows, heads, length, dim]."""
    _, heads, _, dim = rows[0].shape
    padded = rows[0].new_zeros(len(rows), heads, length, dim)
    for index, row in enumerate(rows):
        padded[index, :, : row.shape[2]] = row[0]
    return padded


# -- the whole vocabulary -------------------------------------------------------------------------


def lm_kl(
    runtime: ModelRuntime,
    local: LocalSelector,
    rollouts: Sequence[Rollout],
    context: Tensor | None,
    skip_labelled: bool,
) -> Tensor:
    """The regulariser: KL(adapted || base) of the language model over text ids, in nats.

    Summed over the contexts' positions. context: [n, t, hidden] as the adapter reads it, where
    `tree_scores` has it. skip_labelled: leave out the positions that decide a label.
    """
    layout = TreeLayout.of(rollouts)
    plan = layout.context_plan()
    if context is None:
        context = runtime.forward_padded(layout.tokens, plan, local.adapter)
    with torch.no_grad():  # the reference is the same model, its adapter off
        base = runtime.forward_padded(layout.tokens, plan)
    positions = layout.context_positions(skip_labelled).to(context.device)
    reserved = _reserved_rows(runtime, local)

    def text_log_probs(hidden: Tensor) -> Tensor:
        logits = runtime.logits(hidden)
        return logits.index_fill(-1, reserved, MASKED_LOGIT).log_softmax(-1)

    def divergence(adapted: Tensor, reference: Tensor) -> Tensor:
        log_adapted = text_log_probs(adapted)
        log_base = text_log_probs(reference)
        return (log_adapted.exp() * (log_adapted - log_base)).sum(-1)

    return _in_chunks(divergence, context[positions], base[positions]).sum()


def vocabulary_log_probs(
    runtime: ModelRuntime, local: LocalSelector, last: Tensor, candidate_ids: Tensor
) -> Tensor:
    """Log-probabilities [m, K] of `candidate_ids` [m, K] among all text ids.

    last: [m, hidden] of the last context tokens.
    """
    reserved = _reserved_rows(runtime, local)

    def normaliser(hidden: Tensor) -> Tensor:
        return runtime.logits(hidden).index_fill(-1, reserved, MASKED_LOGIT).logsumexp(-1)

    return runtime.row_logits(last, candidate_ids) - _in_chunks(normaliser, last)[:, None]


def _reserved_rows(runtime: ModelRuntime, local: LocalSelector) -> Tensor:
    """Those reserved ids that are rows of the head."""
    rows = [i for i in local.reserved_ids if i < runtime.vocab_rows]
    return torch.tensor(rows, dtype=torch.long, device=runtime.device)


def _in_chunks(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of the rows of `inputs`, a few at a time.

    Its inner values are as wide as the vocabulary: for the gradient they are computed again rather
    than kept.
    """
    outputs = []
    for start in range(0, len(inputs[0]), VOCABULARY_ROWS):
        rows = [x[start : start + VOCABULARY_ROWS] for x in inputs]
        if torch.is_grad_enabled():
            outputs.append(checkpoint(function, *rows, use_reentrant=False))
        else:
            outputs.append(function(*rows))
    return torch.cat(outputs) if outputs else inputs[0].new_zeros(0)
