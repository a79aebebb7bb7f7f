"""Teaching the SLM to select: labels in, a trained `LocalSelector` and held-out metrics out (paper, S2T-LOCAL).

Every rollout is one tree: its tokens once, then the scored tokens of all its labelled positions, under one mask.
The forwards are the runtime's own, so what is trained is what is served.

    reads: base      context forward without gradient -> its KV; one branch with the scored tokens, adapter on
    reads: adapted   one branch with context and siblings, adapter on everywhere

Knows labels and models; no Ray (several workers only need torch.distributed), no registry.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s2t_shared.attention import Aside
from s2t_shared.errors import ConfigError, StoreError
from s2t_shared.labels import Label
from s2t_shared.local_selector import (
    Candidates,
    LocalSelector,
    Reading,
    SelectorKind,
    block_mask,
    combine,
    split_hidden,
)
from s2t_shared.lora import new_adapter
from s2t_shared.metrics import hit_at, spearman
from s2t_shared.runtime import ModelRuntime
from s2t_shared.trees import Tree, build_trees, is_held_out

REGULARISER_ROWS = 256  # positions whose full-vocabulary KL exists at once


@dataclass(frozen=True)
class DistillConfig:
    """Training settings. Loss = ce * CE + hinge * margin loss + kl * listwise KL to the LLM + reg * L_reg.

    `temperature`: T of the reserved score; scores lie in [0, 1], so T = 1 would leave a loss floor of 1.87 nats at
    K = 16. `row_scale`: standard deviation of the reserved-row deltas at the start, in units of the head's own.
    `patience`: validations without improvement before stopping.
    """

    kind: SelectorKind = SelectorKind.PREFIX
    reads: Reading = Reading.BASE
    steps: int = 1000
    batch_labels: int = 64
    learning_rate: float = 3e-4
    rank: int = 16
    alpha: float = 32.0
    temperature: float = 0.1
    row_scale: float = 1.0
    ce_weight: float = 1.0
    hinge_weight: float = 0.1
    hinge_margin: float = 0.1
    kl_weight: float = 0.5
    reg_weight: float = 0.1
    warmup_share: float = 0.05
    validations: int = 10
    patience: int = 3
    seed: int = 0


# -- forward and loss ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeScores:
    """Scores [m, K] of all m groups of a batch, their candidates and labels in the same order. `context_hidden`:
    [trees, t, hidden] of the adapted context, where it was read."""

    scores: Tensor
    candidates: Candidates
    labels: list[Label]
    context_hidden: Tensor | None


def tree_scores(runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Tree]) -> TreeScores:
    """Score every candidate of every group of `trees` in one pass."""
    groups = [(row, group) for row, tree in enumerate(trees) for group in tree.groups]
    candidates = Candidates.pad([g.label.candidate_ids for _, g in groups], [g.label.slm_log_probs for _, g in groups])
    if selector.reads is Reading.BASE:
        last, siblings = _scored_over_base(runtime, selector, trees, candidates)
        context_hidden = None
    else:
        last, siblings, context_hidden = _scored_over_adapted(runtime, selector, trees, candidates)
    scores = combine(runtime, selector, last, siblings, candidates)
    return TreeScores(scores, candidates, [g.label for _, g in groups], context_hidden)


def _scored_over_base(runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Tree],
                      candidates: Candidates) -> tuple[Tensor | None, Tensor | None]:
    context, context_tokens = _causal(trees)
    with torch.no_grad():
        runtime.aside(context_tokens, context)
    with_last = selector.kind is not SelectorKind.RESERVED
    k = candidates.ids.shape[1] if selector.kind is not SelectorKind.PREFIX else 0
    width = k + int(with_last)
    most = max(len(tree.groups) for tree in trees)
    tokens = torch.zeros(len(trees), most * width, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    visible = torch.zeros_like(tokens)
    places = []
    at = 0
    for row, tree in enumerate(trees):
        for j, group in enumerate(tree.groups):
            block = slice(j * width, (j + 1) * width)
            last_id = [tree.token_ids[group.length - 1]] if with_last else []
            tokens[row, block] = torch.tensor([*last_id, *(candidates.ids[at].tolist() if k else [])])
            positions[row, block] = group.length
            if with_last:
                positions[row, j * width] = group.length - 1
            visible[row, block] = group.length - int(with_last)
            places.append((row, j))
            at += 1
    mask = torch.block_diag(*[block_mask(k, with_last)] * most).bool()
    hidden = runtime.aside(tokens, Aside(positions, mask, context, visible), selector.adapter)
    blocks = hidden.view(len(trees), most, width, -1)[[r for r, _ in places], [j for _, j in places]]
    return split_hidden(selector, blocks, k)


def _causal(trees: Sequence[Tree]) -> tuple[Aside, Tensor]:
    """The plan and the padded tokens [trees, t] of reading the contexts alone."""
    longest = max(len(tree.token_ids) for tree in trees)
    tokens = torch.tensor([[*t.token_ids, *[0] * (longest - len(t.token_ids))] for t in trees])
    return Aside(torch.arange(longest).expand(len(trees), -1), torch.ones(longest, longest).tril().bool()), tokens


def _scored_over_adapted(runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Tree],
                         candidates: Candidates) -> tuple[Tensor | None, Tensor | None, Tensor]:
    k = candidates.ids.shape[1] if selector.kind is not SelectorKind.PREFIX else 0
    longest = max(len(tree.token_ids) for tree in trees)
    most = max(len(tree.groups) for tree in trees)
    total = longest + most * k
    tokens = torch.zeros(len(trees), total, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    positions[:, :longest] = torch.arange(longest)
    mask = torch.eye(total, dtype=torch.bool).repeat(len(trees), 1, 1)
    mask[:, :longest, :longest] = torch.ones(longest, longest).tril().bool()
    places = []
    at = 0
    for row, tree in enumerate(trees):
        tokens[row, : len(tree.token_ids)] = torch.tensor(tree.token_ids)
        for j, group in enumerate(tree.groups):
            block = slice(longest + j * k, longest + (j + 1) * k)
            if k:
                tokens[row, block] = candidates.ids[at]
                positions[row, block] = group.length
                mask[row, block, : group.length] = True
            places.append((row, j, group.length - 1))
            at += 1
    hidden = runtime.aside(tokens, Aside(positions, mask), selector.adapter)
    rows = [r for r, _, _ in places]
    last = hidden[rows, [p for _, _, p in places]] if selector.kind is not SelectorKind.RESERVED else None
    siblings = None
    if k:
        siblings = hidden[:, longest:].reshape(len(trees), most, k, -1)[rows, [j for _, j, _ in places]]
    return last, siblings, hidden[:, :longest]


def selection_loss(logits: Tensor, labels: Sequence[Label], valid: Tensor, config: DistillConfig) -> Tensor:
    """L_sel of logits [m, K] (padding masked by `valid`): cross-entropy against the LLM's best candidate, pairwise
    hinge against the others, listwise KL(p_L || softmax) on the candidates (paper, section on distillation)."""
    m, k = logits.shape
    teacher = torch.full((m, k), -torch.inf)
    for row, label in enumerate(labels):
        teacher[row, : len(label.llm_log_probs)] = torch.tensor(label.llm_log_probs)
    teacher = teacher.to(logits.device).log_softmax(-1)
    best = torch.tensor([label.best for label in labels], device=logits.device)
    log_q = logits.masked_fill(~valid, -torch.inf).log_softmax(-1)
    ce = -log_q.gather(1, best[:, None]).mean()
    gap = logits.gather(1, best[:, None]) - logits.masked_fill(~valid, -1e9)
    others = valid.clone()
    others[torch.arange(m), best] = False
    hinge = (config.hinge_margin - gap).clamp(min=0)[others].sum() / max(1, int(others.sum()))
    difference = torch.where(valid, teacher - log_q.masked_fill(~valid, 0.0), torch.zeros_like(logits))
    listwise = (teacher.exp() * difference).nan_to_num(0.0).sum(-1).mean()
    return config.ce_weight * ce + config.hinge_weight * hinge + config.kl_weight * listwise


def lm_kl(runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Tree], context_hidden: Tensor | None,
          skip_labelled: bool) -> Tensor:
    """L_reg: mean KL(adapted || base) in nats of the language-model distribution over V \\ R at the context's
    positions. `skip_labelled` leaves the labelled positions out, where a prefix score is meant to move it."""
    plan, tokens = _causal(trees)
    if context_hidden is None:
        context_hidden = runtime.aside(tokens, plan, selector.adapter)
    with torch.no_grad():
        base_hidden = runtime.aside(tokens, plan)
    keep = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, tree in enumerate(trees):
        keep[row, : len(tree.token_ids)] = True
        if skip_labelled:
            keep[row, [group.length - 1 for group in tree.groups]] = False
    if not keep.any():
        return context_hidden.new_zeros(())
    reserved = [i for i in selector.reserved_ids if i < runtime.vocab_rows]

    def chunk(adapted: Tensor, base: Tensor) -> Tensor:
        a, b = runtime.logits(adapted), runtime.logits(base)
        a[:, reserved], b[:, reserved] = -1e9, -1e9
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        return (log_a.exp() * (log_a - log_b)).sum()

    adapted, base = context_hidden[keep], base_hidden[keep]
    parts = [checkpoint(chunk, adapted[i: i + REGULARISER_ROWS], base[i: i + REGULARISER_ROWS], use_reentrant=False)
             for i in range(0, len(adapted), REGULARISER_ROWS)]
    return torch.stack([p for p in parts if p is not None]).sum() / len(adapted)


# -- training -----------------------------------------------------------------------------------------------------


def new_selector(runtime: ModelRuntime, reserved_ids: tuple[int, ...], config: DistillConfig) -> LocalSelector:
    """An untrained selector: LoRA that changes nothing yet, and reserved-row deltas that break the near equality of
    real models' spare rows (equal rows score every candidate 0.5, and their gradient keeps them equal)."""
    adapter = new_adapter(runtime.model, config.rank, config.alpha, config.seed)
    deltas = None
    if config.kind is not SelectorKind.PREFIX:
        generator = torch.Generator().manual_seed(config.seed + 1)
        scale = float(runtime.head.weight.float().std()) * config.row_scale
        shape = (len(reserved_ids), runtime.head.weight.shape[1])
        deltas = (torch.randn(shape, generator=generator) * scale).to(runtime.device).requires_grad_()
    return LocalSelector("", config.kind, config.reads, reserved_ids, adapter, deltas, config.temperature)


@dataclass(frozen=True)
class Distilled:
    """A trained selector, its metrics on the held-out labels, and how it got there."""

    selector: LocalSelector
    metrics: dict[str, float]
    training_labels: int
    held_out_labels: int
    steps: int
    curve: list[tuple[int, float, float]]  # (step, held-out loss, held-out Agree@1)


def distil(runtime: ModelRuntime, reserved_ids: tuple[int, ...], labels: Sequence[Label], config: DistillConfig,
           on_progress: Callable[[int, float], None] = lambda step, loss: None) -> Distilled:
    """Train one selector. Under torch.distributed each worker takes every world-size-th tree of the same order and
    gradients are averaged.

    Raises:
        StoreError: too few labels. ConfigError: labels of another SLM or tokenizer size.
    """
    training, held_out = _prepare(runtime, labels)
    for parameter in runtime.model.parameters():
        parameter.requires_grad_(False)
    selector = new_selector(runtime, reserved_ids, config)
    assert selector.adapter is not None
    parameters = selector.adapter.parameters() + ([selector.bin_deltas] if selector.bin_deltas is not None else [])
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _learning_rate(s, config))
    best, best_loss, bad, curve, step = _copy(parameters), math.inf, 0, [], 0
    every = max(1, config.steps // config.validations)
    batches = _batches(training, config)
    for step in range(1, config.steps + 1):
        loss = training_loss(runtime, selector, next(batches), config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_progress(step, float(loss.detach()))
        if step % every == 0 or step == config.steps:
            metrics = evaluate_selector(runtime, selector, held_out, config)
            curve.append((step, metrics["loss"], metrics["agree_at_1"]))
            if metrics["loss"] < best_loss:
                best, best_loss, bad = _copy(parameters), metrics["loss"], 0
            elif (bad := bad + 1) >= config.patience:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
    metrics = evaluate_selector(runtime, selector, held_out, config, with_lm_kl=True)
    return Distilled(selector, metrics, sum(len(t.groups) for t in training), sum(len(t.groups) for t in held_out),
                     step, curve)


def training_loss(runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Tree],
                  config: DistillConfig) -> Tensor:
    """L = L_sel + reg * L_reg. With `reads: base` the adapter never touches the context: there is no L_reg."""
    result = tree_scores(runtime, selector, trees)
    valid = result.candidates.valid.to(runtime.device)
    loss = selection_loss(selector.selection_logits(result.scores), result.labels, valid, config)
    if config.reg_weight and selector.reads is Reading.ADAPTED:
        loss = loss + config.reg_weight * lm_kl(runtime, selector, trees, result.context_hidden,
                                                selector.kind is not SelectorKind.RESERVED)
    return loss


@torch.no_grad()
def evaluate_selector(runtime: ModelRuntime, selector: LocalSelector, trees: Sequence[Tree], config: DistillConfig,
                      with_lm_kl: bool = False) -> dict[str, float]:
    """Held-out figures: loss, Agree@1, the SLM's own Agree@1, Spearman, Hit@K of the labels, LM-KL."""
    agreed, first, rhos, losses, kls, ranks = [], [], [], [], [], []
    for start in range(0, len(trees), 16):
        batch = trees[start: start + 16]
        result = tree_scores(runtime, selector, batch)
        logits = selector.selection_logits(result.scores)
        valid = result.candidates.valid.to(runtime.device)
        losses.append((float(selection_loss(logits, result.labels, valid, config)), len(result.labels)))
        for scores, label in zip(result.scores.tolist(), result.labels, strict=True):
            k = len(label.candidate_ids)
            agreed.append(max(range(k), key=lambda i: (scores[i], -i)) == label.best)
            first.append(label.best == 0)
            rhos.append(spearman(scores[:k], label.llm_log_probs))
            ranks.append(label.llm_top_rank)
        if with_lm_kl:
            kls.append(float(lm_kl(runtime, selector, batch, None, skip_labelled=False)))
    n = len(agreed)
    metrics = {"n": float(n), "loss": sum(x * m for x, m in losses) / n, "agree_at_1": sum(agreed) / n,
               "slm_agree_at_1": sum(first) / n, "spearman": sum(rhos) / n}
    metrics |= {f"hit_at_{k}": hit_at(ranks, k) for k in (1, 2, 4, 8)}
    if kls:
        metrics["lm_kl"] = sum(kls) / len(kls)
    return metrics


def _prepare(runtime: ModelRuntime, labels: Sequence[Label]) -> tuple[list[Tree], list[Tree]]:
    foreign = {label.slm_digest for label in labels} - {runtime.digest}
    if foreign:
        raise ConfigError(f"the labels were made with another SLM (digest {sorted(foreign)[0]}, this one is "
                          f"{runtime.digest}); harvest with this SLM")
    if len(llms := {label.llm_digest for label in labels}) > 1:
        raise ConfigError(f"the labels come from {len(llms)} different LLMs ({', '.join(sorted(llms))}); keep each "
                          "LLM's labels in a lake of its own (data_dir)")
    held_out = [label for label in labels if is_held_out(label)]
    training = [label for label in labels if not is_held_out(label)]
    if len(training) < 8 or len(held_out) < 2:
        raise StoreError(f"{len(training)} training and {len(held_out)} held-out labels are too few to train on; "
                         "harvest more problems")
    return build_trees(training), build_trees(held_out)


def _batches(trees: Sequence[Tree], config: DistillConfig) -> Iterator[list[Tree]]:
    """Endless batches of about `batch_labels` labels, reshuffled every epoch; this worker's share of each."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = random.Random(config.seed)
    while True:
        shuffled = list(trees)
        order.shuffle(shuffled)
        batch: list[Tree] = []
        size = 0
        for tree in shuffled:
            batch.append(tree)
            size += len(tree.groups)
            if size >= config.batch_labels and len(batch) >= world:
                yield batch[rank::world]
                batch, size = [], 0
        if len(batch) >= world:
            yield batch[rank::world]


def _learning_rate(step: int, config: DistillConfig) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    warmup = max(1, int(config.warmup_share * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, config.steps - warmup)


def _average_gradients(parameters: Sequence[Tensor]) -> None:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)  # one message, not one per layer
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter) / dist.get_world_size()


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
