"""Packed forwards (law 2): the same loss and gradients as one sequence per candidate."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from s2t_shared.labels.label import Label, Rollout
from s2t_shared.model.local_selector import LocalSelector
from s2t_shared.model.padded_plan import PaddedPlan
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.dataset import context_length
from s2t_shared.training.loss import training_loss
from s2t_shared.training.losses import selection_loss
from s2t_shared.training.settings import Objective, TrainingSettings
from s2t_shared.training.tree_forward import (
    ContextCache,
    lm_kl,
    tree_scores,
    vocabulary_log_probs,
)
from s2t_shared.training.tree_layout import TreeLayout, regularised_positions
from s2t_shared.types import Reading, Scoring, SelectorKind
from tests.helpers.rollouts import make_rollout, make_rollouts
from tests.helpers.training import KINDS, trained_a_little


def causal(
    tokens: Sequence[int], start: int = 0, context: PaddedPlan | None = None
) -> tuple[torch.Tensor, PaddedPlan]:
    """One sequence of `tokens` at positions start.., behind all columns of `context`."""
    t = len(tokens)
    plan = PaddedPlan(
        torch.arange(start, start + t)[None],
        torch.ones(t, t).tril().bool(),
        context,
        torch.full((1, t), start) if context is not None else None,
    )
    return torch.tensor([list(tokens)]), plan


def published_hidden(
    runtime: ModelRuntime, local: LocalSelector, prefix: Sequence[int], scored: Sequence[int]
) -> torch.Tensor:
    """Hidden states [scored, hidden] of the last tokens of one whole sequence prefix + scored."""
    if local.reads is Reading.ADAPTED:
        return runtime.forward_padded(*causal([*prefix, *scored]), local.adapter)[0, len(prefix) :]
    tokens, context = causal(prefix)
    with torch.no_grad():
        runtime.forward_padded(tokens, context)
    return runtime.forward_padded(*causal(scored, len(prefix), context), local.adapter)[0]


def published_scores(
    runtime: ModelRuntime, local: LocalSelector, rollout: Rollout, label: Label
) -> torch.Tensor:
    """Scores [K] the published way: one whole sequence per candidate, and the head's definition
    written out."""
    prefix, scores = rollout.token_ids[: label.position], []
    with_last = local.kind is not SelectorKind.RESERVED
    if with_last:
        last = published_hidden(runtime, local, prefix[:-1], prefix[-1:])[0]
        prefix_score = runtime.logits(last)[list(label.candidate_ids)].log_softmax(0)
        if local.kind is SelectorKind.PREFIX:
            return prefix_score
    assert local.bin_deltas is not None
    rows = runtime.head.weight[list(local.reserved_ids)] + local.bin_deltas
    for candidate in label.candidate_ids:
        split = label.position - int(with_last)
        hidden = published_hidden(runtime, local, prefix[:split], [*prefix[split:], candidate])[-1]
        z = rows @ hidden
        scores.append(
            z[1] if local.scoring is Scoring.BINARY else z.softmax(0) @ torch.linspace(0, 1, 16)
        )
    reserved = torch.stack(scores)
    if local.standardise:
        reserved = (reserved - reserved.mean()) / (reserved.var(correction=0) + 1e-8).sqrt()
    return (
        reserved
        if local.kind is SelectorKind.RESERVED
        else reserved / local.temperature + prefix_score
    )


@pytest.mark.parametrize("objective", [Objective.TOP1_CE, Objective.KL, Objective.PAIRWISE_MARGIN])
@pytest.mark.parametrize(("kind", "reads"), KINDS)
def test_packed_training_equals_per_candidate_training(
    runtime: ModelRuntime, kind: SelectorKind, reads: Reading, objective: Objective
) -> None:
    """Law 2: one tree per rollout against one whole sequence per candidate: same loss, same
    gradients, to 1e-5."""
    check_against_published(
        runtime,
        TrainingSettings(
            kind=kind, reads=reads, objective=objective, hinge_margin=1.0, reg_weight=0.0
        ),
    )


@pytest.mark.parametrize("scoring", list(Scoring))
@pytest.mark.parametrize(
    ("kind", "reads"),
    [(SelectorKind.RESERVED, Reading.ADAPTED), (SelectorKind.JOINT, Reading.BASE)],
)
def test_scoring_options_are_what_they_say(
    runtime: ModelRuntime, kind: SelectorKind, reads: Reading, scoring: Scoring
) -> None:
    """`binary` and `standardise` in the packed forward, gradients included."""
    check_against_published(
        runtime,
        TrainingSettings(
            kind=kind,
            reads=reads,
            scoring=scoring,
            standardise=True,
            temperature=1.0,
            reg_weight=0.0,
        ),
    )


def check_against_published(runtime: ModelRuntime, config: TrainingSettings) -> None:
    local, parameters = trained_a_little(runtime, config)
    rollouts = make_rollouts(2)
    packed = training_loss(runtime, local, rollouts, config)
    ours = torch.autograd.grad(packed, parameters, allow_unused=True)
    losses = []
    for rollout in rollouts:
        for label in rollout.labels:
            scores = published_scores(runtime, local, rollout, label)[None]
            valid = torch.ones(scores.shape, dtype=torch.bool)
            losses.append(selection_loss(local.selection_logits(scores), [label], valid, config))
    plain = torch.cat(losses).mean()
    theirs = torch.autograd.grad(plain, parameters, allow_unused=True)
    assert float(packed.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    largest = max(float(b.abs().max()) for b in theirs if b is not None)
    moved = 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * largest)
            moved += int(a.abs().max() > 0)
    assert moved > len(parameters) // 2


@pytest.mark.parametrize("kind", list(SelectorKind))
def test_kept_contexts_change_nothing(runtime: ModelRuntime, kind: SelectorKind) -> None:
    """Contexts that are read once give the scores of contexts read every time; the same to the last
    bit whether they are kept, newly read, or find no room."""
    local, _ = trained_a_little(runtime, TrainingSettings(kind=kind, reads=Reading.BASE))
    rollouts = make_rollouts(5)
    with torch.no_grad():
        expected = tree_scores(runtime, local, rollouts).scores
        roomy, tight = ContextCache(runtime, 1 << 30), ContextCache(runtime, 1)
        first = tree_scores(runtime, local, rollouts, roomy).scores
        assert torch.allclose(first, expected, atol=1e-5)
        runtime.forward_padded, forward = None, runtime.forward_padded  # type: ignore[method-assign, assignment]
        try:
            for rollout in rollouts:
                roomy.plan([rollout], TreeLayout.of([rollout]))  # needs no forward
        finally:
            runtime.forward_padded = forward  # type: ignore[method-assign]
        assert torch.equal(tree_scores(runtime, local, rollouts, roomy).scores, first)
        assert torch.equal(tree_scores(runtime, local, rollouts, tight).scores, first)


def test_lm_kl_is_the_divergence_of_the_two_models(runtime: ModelRuntime) -> None:
    """Summed over the contexts' positions up to the last label, reserved ids left out of both
    distributions; each context once, however many labels it has; labelled positions left out on
    request."""
    local, _ = trained_a_little(
        runtime, TrainingSettings(kind=SelectorKind.JOINT, reads=Reading.ADAPTED)
    )
    rollouts = make_rollouts(3)
    everywhere = elsewhere = 0.0
    text = slice(0, runtime.vocab_rows - 16)
    for rollout in rollouts:
        tokens = rollout.token_ids[: context_length(rollout)]
        adapted = runtime.forward_padded(*causal(tokens), local.adapter)
        base = runtime.forward_padded(*causal(tokens))
        a = runtime.logits(adapted)[0, :, text].log_softmax(-1)
        b = runtime.logits(base)[0, :, text].log_softmax(-1)
        per_position = (a.exp() * (a - b)).sum(-1)
        everywhere += float(per_position.sum())
        labelled = {label.position - 1 for label in rollout.labels}
        elsewhere += float(sum(x for i, x in enumerate(per_position) if i not in labelled))
    assert everywhere > 0.1
    assert float(lm_kl(runtime, local, rollouts, None, False)) == pytest.approx(
        everywhere, rel=1e-4
    )
    assert float(lm_kl(runtime, local, rollouts, None, True)) == pytest.approx(elsewhere, rel=1e-4)
    assert regularised_positions(rollouts, False) == sum(context_length(t) for t in rollouts)
    assert regularised_positions(rollouts, True) == sum(context_length(t) for t in rollouts) - 9


def test_plain_distillation_sees_the_whole_vocabulary(runtime: ModelRuntime) -> None:
    """The control's log-probabilities are those of the adapted SLM over all text ids, not over the
    candidates."""
    local, _ = trained_a_little(
        runtime, TrainingSettings(reads=Reading.ADAPTED, objective=Objective.PLAIN)
    )
    rollout = make_rollout(1)
    result = tree_scores(runtime, local, [rollout])
    assert result.last is not None
    ours = vocabulary_log_probs(runtime, local, result.last, result.candidates.ids)
    hidden = runtime.forward_padded(*causal(rollout.token_ids), local.adapter)[0]
    for row, label in zip(ours, rollout.labels, strict=True):
        full = runtime.logits(hidden[label.position - 1])[: runtime.vocab_rows - 16].log_softmax(-1)
        k = len(label.candidate_ids)
        assert row[:k].tolist() == pytest.approx(
            full[list(label.candidate_ids)].tolist(), rel=1e-4, abs=1e-5
        )
