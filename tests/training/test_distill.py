"""Distillation (law 2: packed training == per-candidate training): losses, filters, streaming, the
loop itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.errors import ConfigError, EvaluationSplitError, StoreError
from s2t_shared.labels.label import Label, Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.model.attention import Aside
from s2t_shared.model.local_selector import (
    Candidates,
    LocalSelector,
    Reading,
    Scoring,
    SelectorKind,
    combine,
)
from s2t_shared.model.runtime import ModelRuntime
from s2t_shared.training.dataset import (
    BUFFER,
    Part,
    TrainingData,
    count_labels,
    part_of,
    tree_length,
)
from s2t_shared.training.losses import (
    LossConfig,
    MarginFilter,
    Objective,
    label_weight,
    plain_loss,
    selection_loss,
    teacher_margin,
)
from s2t_shared.training.objective import DistillSettings, Whole, evaluate_selector, training_loss
from s2t_shared.training.trainer import Point, distil, learning_rate, new_selector, trained_tensors
from s2t_shared.training.tree_forward import (
    Contexts,
    lm_kl,
    parts_of,
    regularised_positions,
    tree_scores,
    vocabulary_log_probs,
)
from tests.helpers.rollouts import learnable, make_label, make_rollout, make_rollouts

KINDS = [(kind, reads) for kind in SelectorKind for reads in Reading]


@pytest.fixture()
def runtime(models: dict[str, Path]) -> ModelRuntime:
    loaded = ModelRuntime.load(str(models["slm"]))
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    return loaded


def rows_of(runtime: ModelRuntime) -> tuple[int, ...]:
    return tuple(range(runtime.vocab_rows - 16, runtime.vocab_rows))


def trained_a_little(
    runtime: ModelRuntime, config: DistillSettings
) -> tuple[LocalSelector, list[torch.Tensor]]:
    """A selector whose every parameter matters (B is zero in a fresh one)."""
    torch.manual_seed(3)
    selector = new_selector(runtime, rows_of(runtime), config)
    parameters = trained_tensors(selector)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return selector, parameters


# -- packing --------------------------------------------------------------------------------------


def causal(
    tokens: Sequence[int], start: int = 0, context: Aside | None = None
) -> tuple[torch.Tensor, Aside]:
    """One sequence of `tokens` at positions start.., behind all columns of `context`."""
    t = len(tokens)
    plan = Aside(
        torch.arange(start, start + t)[None],
        torch.ones(t, t).tril().bool(),
        context,
        torch.full((1, t), start) if context is not None else None,
    )
    return torch.tensor([list(tokens)]), plan


def published_hidden(
    runtime: ModelRuntime, selector: LocalSelector, prefix: Sequence[int], scored: Sequence[int]
) -> torch.Tensor:
    """Hidden states [scored, hidden] of the last tokens of one whole sequence prefix + scored."""
    if selector.reads is Reading.ADAPTED:
        return runtime.aside(*causal([*prefix, *scored]), selector.adapter)[0, len(prefix) :]
    tokens, context = causal(prefix)
    with torch.no_grad():
        runtime.aside(tokens, context)
    return runtime.aside(*causal(scored, len(prefix), context), selector.adapter)[0]


def published_scores(
    runtime: ModelRuntime, selector: LocalSelector, rollout: Rollout, label: Label
) -> torch.Tensor:
    """Scores [K] the published way: one whole sequence per candidate, and the head's definition
    written out."""
    prefix, scores = rollout.token_ids[: label.position], []
    with_last = selector.kind is not SelectorKind.RESERVED
    if with_last:
        last = published_hidden(runtime, selector, prefix[:-1], prefix[-1:])[0]
        prefix_score = runtime.logits(last)[list(label.candidate_ids)].log_softmax(0)
        if selector.kind is SelectorKind.PREFIX:
            return prefix_score
    assert selector.bin_deltas is not None
    rows = runtime.head.weight[list(selector.reserved_ids)] + selector.bin_deltas
    for candidate in label.candidate_ids:
        split = label.position - int(with_last)
        hidden = published_hidden(runtime, selector, prefix[:split], [*prefix[split:], candidate])[
            -1
        ]
        z = rows @ hidden
        scores.append(
            z[1] if selector.scoring is Scoring.BINARY else z.softmax(0) @ torch.linspace(0, 1, 16)
        )
    reserved = torch.stack(scores)
    if selector.standardise:
        reserved = (reserved - reserved.mean()) / (reserved.var(correction=0) + 1e-8).sqrt()
    return (
        reserved
        if selector.kind is SelectorKind.RESERVED
        else reserved / selector.temperature + prefix_score
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
        DistillSettings(
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
        DistillSettings(
            kind=kind,
            reads=reads,
            scoring=scoring,
            standardise=True,
            temperature=1.0,
            reg_weight=0.0,
        ),
    )


def check_against_published(runtime: ModelRuntime, config: DistillSettings) -> None:
    selector, parameters = trained_a_little(runtime, config)
    trees = make_rollouts(3)
    packed = training_loss(runtime, selector, trees, config)
    ours = torch.autograd.grad(packed, parameters, allow_unused=True)
    losses = []
    for tree in trees:
        for label in tree.labels:
            scores = published_scores(runtime, selector, tree, label)[None]
            valid = torch.ones(scores.shape, dtype=torch.bool)
            losses.append(selection_loss(selector.selection_logits(scores), [label], valid, config))
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
    selector, _ = trained_a_little(runtime, DistillSettings(kind=kind, reads=Reading.BASE))
    trees = make_rollouts(5)
    with torch.no_grad():
        expected = tree_scores(runtime, selector, trees).scores
        roomy, tight = Contexts(runtime, 1 << 30), Contexts(runtime, 1)
        first = tree_scores(runtime, selector, trees, roomy).scores
        assert torch.allclose(first, expected, atol=1e-5)
        runtime.aside, aside = None, runtime.aside  # type: ignore[method-assign, assignment]
        try:
            for tree in trees:
                roomy.plan([tree])  # needs no forward
        finally:
            runtime.aside = aside  # type: ignore[method-assign]
        assert torch.equal(tree_scores(runtime, selector, trees, roomy).scores, first)
        assert torch.equal(tree_scores(runtime, selector, trees, tight).scores, first)


@pytest.mark.parametrize(("kind", "reads"), KINDS)
def test_a_batch_in_parts_is_the_same_step(
    runtime: ModelRuntime, kind: SelectorKind, reads: Reading
) -> None:
    """Accumulation over forwards of bounded size adds up to the whole batch's loss and gradient,
    L_reg included."""
    config = DistillSettings(
        kind=kind, reads=reads, max_tokens=40, teacher_margin=MarginFilter.WEIGHT
    )
    selector, parameters = trained_a_little(runtime, config)
    trees = sorted(make_rollouts(6), key=tree_length)
    parts = list(parts_of(trees, config.max_tokens, config.scored_tokens))
    assert len(parts) > 2 and [t for part in parts for t in part] == trees
    whole = training_loss(runtime, selector, trees, config)
    expected = torch.autograd.grad(whole, parameters)
    share = [
        training_loss(runtime, selector, part, config, Whole.of(trees, config)) for part in parts
    ]
    total = torch.stack(share).sum()
    assert float(total.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for a, b in zip(torch.autograd.grad(total, parameters), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_lm_kl_is_the_divergence_of_the_two_models(runtime: ModelRuntime) -> None:
    """Summed over the contexts' positions up to the last label, reserved ids left out of both
    distributions; each context once, however many labels it has; labelled positions left out on
    request."""
    selector, _ = trained_a_little(
        runtime, DistillSettings(kind=SelectorKind.JOINT, reads=Reading.ADAPTED)
    )
    trees = make_rollouts(3)
    everywhere = elsewhere = 0.0
    text = slice(0, runtime.vocab_rows - 16)
    for tree in trees:
        tokens = tree.token_ids[: tree_length(tree)]
        a = runtime.logits(runtime.aside(*causal(tokens), selector.adapter))[
            0, :, text
        ].log_softmax(-1)
        b = runtime.logits(runtime.aside(*causal(tokens)))[0, :, text].log_softmax(-1)
        per_position = (a.exp() * (a - b)).sum(-1)
        everywhere += float(per_position.sum())
        labelled = {label.position - 1 for label in tree.labels}
        elsewhere += float(sum(x for i, x in enumerate(per_position) if i not in labelled))
    assert everywhere > 0.1
    assert float(lm_kl(runtime, selector, trees, None, False)) == pytest.approx(
        everywhere, rel=1e-4
    )
    assert float(lm_kl(runtime, selector, trees, None, True)) == pytest.approx(elsewhere, rel=1e-4)
    assert regularised_positions(trees, False) == sum(tree_length(t) for t in trees)
    assert regularised_positions(trees, True) == sum(tree_length(t) for t in trees) - 9


def test_fresh_selector_changes_nothing(runtime: ModelRuntime) -> None:
    """LoRA starts as the base model: the prefix score is the SLM's own order and the LM-KL is
    zero."""
    selector = new_selector(
        runtime, (), DistillSettings(kind=SelectorKind.PREFIX, reads=Reading.ADAPTED)
    )
    trees = make_rollouts(2)
    assert float(lm_kl(runtime, selector, trees, None, False)) == pytest.approx(0.0, abs=1e-5)


def test_plain_distillation_sees_the_whole_vocabulary(runtime: ModelRuntime) -> None:
    """The control's log-probabilities are those of the adapted SLM over all text ids, not over the
    candidates."""
    selector, _ = trained_a_little(
        runtime, DistillSettings(reads=Reading.ADAPTED, objective=Objective.PLAIN)
    )
    tree = make_rollout(1)
    result = tree_scores(runtime, selector, [tree])
    assert result.last is not None
    ours = vocabulary_log_probs(runtime, selector, result.last, result.candidates.ids)
    hidden = runtime.aside(*causal(tree.token_ids), selector.adapter)[0]
    for row, label in zip(ours, tree.labels, strict=True):
        full = runtime.logits(hidden[label.position - 1])[: runtime.vocab_rows - 16].log_softmax(-1)
        k = len(label.candidate_ids)
        assert row[:k].tolist() == pytest.approx(
            full[list(label.candidate_ids)].tolist(), rel=1e-4, abs=1e-5
        )


def test_equal_scores_stay_equal_when_standardised(runtime: ModelRuntime) -> None:
    """The norm of zero spread is neither NaN nor an amplifier, and its gradient is finite."""
    selector = new_selector(
        runtime, rows_of(runtime), DistillSettings(kind=SelectorKind.RESERVED, standardise=True)
    )
    siblings = torch.ones(2, 3, 32, requires_grad=True)
    candidates = Candidates.pad([(1, 2, 3), (4, 5)], [(0.0,) * 3, (0.0,) * 2])
    scores = combine(runtime, selector, None, siblings, candidates)
    assert scores[0].abs().max() < 1e-2 and scores[1, :2].abs().max() < 1e-2
    scores[candidates.valid].sum().backward()
    assert siblings.grad is not None and torch.isfinite(siblings.grad).all()


# -- losses and filters ---------------------------------------------------------------------------

ONE = Label(
    label_id="l",
    position=3,
    candidate_ids=(7, 8, 9),
    slm_log_probs=(-0.5, -1.0, -2.0),
    llm_log_probs=tuple(math.log(p) for p in (0.2, 0.6, 0.1)),
    llm_top_id=8,
    llm_top_rank=1,
    mass=0.9,
    kl=0.5,
    entropy=0.7,
)
LOGITS = torch.tensor([[1.0, 0.5, 0.0, 5.0]])  # the last column is padding
VALID = torch.tensor([[True, True, True, False]])


def test_losses_by_hand() -> None:
    """Each loss on one label, worked out from its definition; padding has no say."""
    q = [math.exp(x) / sum(math.exp(y) for y in (1.0, 0.5, 0.0)) for x in (1.0, 0.5, 0.0)]
    p = [0.2 / 0.9, 0.6 / 0.9, 0.1 / 0.9]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def loss(**settings: object) -> float:
        return float(selection_loss(LOGITS, [ONE], VALID, LossConfig(**settings)))  # type: ignore[arg-type]

    assert loss(objective=Objective.KL) == pytest.approx(kl, rel=1e-5)
    assert loss(ce_weight=1.0, hinge_weight=0.0, kl_weight=0.0) == pytest.approx(
        -math.log(q[1]), rel=1e-5
    )
    assert loss(ce_weight=0.0, hinge_weight=1.0, kl_weight=0.0, hinge_margin=1.0) == pytest.approx(
        (1.5 + 0.5) / 2
    )
    # pairs the LLM ranks: 8 over 7 (gap -0.5), 8 over 9 (0.5), 7 over 9 (1.0)
    assert loss(objective=Objective.PAIRWISE_MARGIN, hinge_margin=1.0) == pytest.approx(
        (1.5 + 0.5 + 0.0) / 3
    )
    sharp = [x**2 / sum(y**2 for y in p) for x in p]
    assert loss(objective=Objective.KL, teacher_temperature=0.5) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(sharp, q, strict=True)), rel=1e-5
    )


def test_plain_loss_by_hand() -> None:
    """The rest of the vocabulary is one more outcome of both distributions."""
    ours = torch.tensor([[math.log(0.3), math.log(0.3), math.log(0.2), 0.0]])
    expected = sum(
        a * math.log(a / b) for a, b in zip((0.2, 0.6, 0.1, 0.1), (0.3, 0.3, 0.2, 0.2), strict=True)
    )
    assert float(plain_loss(ours, [ONE], VALID)) == pytest.approx(expected, rel=1e-4)


def test_filters_do_what_they_say() -> None:
    """The margin is (0.6 - 0.2) / 0.9. A minimum acts in both modes that have one; mass and single
    candidates too."""
    margin = 0.4 / 0.9
    assert teacher_margin(ONE) == pytest.approx(margin)

    def weight(label: Label = ONE, **settings: object) -> float:
        return label_weight(label, LossConfig(**settings))  # type: ignore[arg-type]

    assert weight() == 1.0
    assert weight(teacher_margin=MarginFilter.DROP, min_margin=0.4) == 1.0
    assert weight(teacher_margin=MarginFilter.DROP, min_margin=0.5) == 0.0
    assert weight(
        teacher_margin=MarginFilter.WEIGHT, margin_power=2, margin_eps=0.1
    ) == pytest.approx((margin + 0.1) ** 2)
    assert weight(teacher_margin=MarginFilter.WEIGHT, min_margin=0.5) == 0.0
    assert weight(min_margin=0.5) == 1.0  # none means none
    assert weight(min_mass=0.95) == 0.0
    alone = replace(ONE, candidate_ids=(7,), slm_log_probs=(-0.5,), llm_log_probs=(-0.5,))
    assert weight(alone) == 0.0 and weight(alone, objective=Objective.PLAIN) == 1.0


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.reads=adapted"):
        DistillSettings(objective=Objective.PLAIN)
    with pytest.raises(ConfigError, match="kind prefix"):
        DistillSettings(standardise=True)
    with pytest.raises(ConfigError, match="kind prefix"):
        DistillSettings(scoring=Scoring.BINARY)


# -- streaming ------------------------------------------------------------------------------------


def one(label: Label) -> float:
    return 1.0


def ids(trees: Sequence[Rollout]) -> list[str]:
    return [label.label_id for tree in trees for label in tree.labels]


def test_an_epoch_is_every_training_label_once(tmp_path: Path) -> None:
    """From shards on disk, in another order every epoch, in batches of about the wished size; the
    same for whoever asks; held-out problems are in none."""
    lake = Lake(tmp_path)
    rollouts = make_rollouts(400)
    for start in range(0, 400, 50):
        lake.write(rollouts[start : start + 50])
    data = TrainingData(lake.freeze(), "slm", one, batch_labels=24, seed=5)
    expected = Counter(ids([r for r in rollouts if not r.held_out]))
    epochs = [list(data.epoch(number)) for number in (0, 1)]
    for epoch in epochs:
        assert Counter(ids([t for batch in epoch for t in batch])) == expected
        assert all(
            count_labels(batch) == 24
            for batch in epoch[:-1]
            if batch is not min(epoch, key=count_labels)
        )
    assert epochs[0] != epochs[1] and data.labels == sum(expected.values())
    again = TrainingData(lake.freeze(), "slm", one, batch_labels=24, seed=5)
    assert [list(again.epoch(number)) for number in (0, 1)] == epochs
    spread = [max(map(tree_length, b)) - min(map(tree_length, b)) for b in epochs[0]]
    assert sum(spread) / len(spread) <= 2  # of 14..20: batches hold trees of like length
    held_out = ids([r for r in rollouts if r.held_out])
    assert sorted(ids(data.validation) + ids(data.test)) == sorted(held_out)


def test_streaming_mixes_across_a_bounded_buffer() -> None:
    """More rollouts than the buffer holds: all come once, and order is lost beyond neighbours."""
    rollouts = [make_rollout(r, (3,)) for r in range(BUFFER + 500)]
    data = TrainingData(rollouts, "slm", one, batch_labels=8)
    seen = [int(i[1:].split("-")[0]) for batch in data.epoch(0) for i in ids(batch)]
    assert len(seen) == len(set(seen)) == data.labels
    moved = sum(abs(a - b) for a, b in zip(seen, sorted(seen), strict=True)) / len(seen)
    assert moved > BUFFER / 8


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 25)), min_size=30, max_size=60))
def test_no_held_out_label_ever_trains(pairs: list[tuple[int, int]]) -> None:
    """Whatever rollouts share labels with whatever others: nothing that is measured on was ever
    trained on, nor any problem of it, however few held-out labels are chosen."""
    rollouts = [
        make_rollout(
            i, (3,), problem_id=f"p{problem}", labels=(make_label(f"shared-{label}", 3, label),)
        )
        for i, (problem, label) in enumerate(pairs)
    ]
    rollouts += [make_rollout(1000 + i, (3,)) for i in range(60)]
    data = TrainingData(rollouts, "slm", one, batch_labels=16, held_out_labels=5)
    trained = [tree for number in (0, 1) for batch in data.epoch(number) for tree in batch]
    kept_out = [r for r in rollouts if r.held_out]
    assert {*ids(data.validation), *ids(data.test)} <= set(ids(kept_out))
    assert not set(ids(trained)) & set(ids(kept_out))
    assert not {t.problem for t in trained} & {t.problem for t in kept_out}
    assert not {t.problem for t in data.validation} & {t.problem for t in data.test}


def test_held_out_labels_are_stable_and_bounded() -> None:
    """By hash of the problem: a tenth, halved; what was chosen stays chosen when the lake grows by
    other problems."""
    rollouts = make_rollouts(900)
    parts = Counter(part_of(r) for r in rollouts)
    assert 60 < parts[Part.VALIDATION] + parts[Part.TEST] < 120 and 25 < parts[Part.TEST] < 65
    data = TrainingData(rollouts, "slm", one, held_out_labels=30)
    assert count_labels(data.validation) == 30 and count_labels(data.test) == 30
    assert TrainingData(rollouts[::-1], "slm", one, held_out_labels=30).test == data.test
    grown = TrainingData(
        rollouts + [make_rollout(r) for r in range(900, 920)], "slm", one, held_out_labels=30
    )
    assert len(set(ids(grown.test)) & set(ids(data.test))) >= 24


def test_training_refuses_foreign_or_few_labels() -> None:
    with pytest.raises(ConfigError, match="another SLM"):
        TrainingData(make_rollouts(40, "someone else"), "slm", one)
    with pytest.raises(StoreError, match="too few"):
        TrainingData(make_rollouts(2), "slm", one)
    with pytest.raises(StoreError, match="0 training labels.*filters"):
        TrainingData(make_rollouts(60), "slm", lambda label: 0.0)
    mixed = make_rollouts(60)
    with pytest.raises(EvaluationSplitError):
        TrainingData([replace(mixed[0], split="test"), *mixed[1:]], "slm", one)


@pytest.mark.parametrize("rests", [False, True])
def test_labels_of_other_models_are_skipped(tmp_path: Path, rests: bool) -> None:
    """One rollout of another SLM or LLM does not stop training: most labels of this SLM decide, on
    disk as in memory, and nothing of the others is trained or measured on."""
    ours = make_rollouts(60)
    others = [
        make_rollout(100 + i, (3,), **{field: "other"})
        for i in range(40)
        for field in ("slm_digest", "llm_digest")
    ]
    source = [*others[:40], *ours, *others[40:]]
    Lake(tmp_path).write(source)
    data = TrainingData(Lake(tmp_path).freeze() if rests else source, "slm", one)
    assert (
        data.llm_digest == "llm"
        and data.skipped == 80
        and data.newest == max(r.created_at for r in source)
    )
    epoch = [tree for batch in data.epoch(0) for tree in batch]
    assert sorted(ids([*epoch, *data.validation, *data.test])) == sorted(ids(ours))


def test_a_held_out_prompt_trains_under_no_other_name() -> None:
    """The same prompt under another task or problem id is the same problem."""
    rollouts = make_rollouts(200)
    kept_out = [r for r in rollouts if r.held_out]
    again = [
        replace(
            r,
            rollout_id=f"again-{r.rollout_id}",
            task=task,
            problem_id=f"x-{r.problem_id}",
            labels=tuple(replace(label, label_id=f"{task}-{label.label_id}") for label in r.labels),
        )
        for r in kept_out
        for task in ("t", "u")
    ]
    assert sum(not r.held_out for r in again) > 10
    data = TrainingData([*rollouts, *again], "slm", one)
    prompts = {r.token_ids[:4] for r in [*kept_out, *again] if r.held_out}
    trained = {tree.token_ids[:4] for batch in data.epoch(0) for tree in batch}
    assert trained == {r.token_ids[:4] for r in rollouts} - prompts and len(trained) > 150


def test_an_epoch_without_labels_is_an_error(runtime: ModelRuntime) -> None:
    """Labels that went away meanwhile end the run; it does not look for them for ever."""
    rollouts = make_rollouts(60, runtime.digest)

    def empty(step: int, loss: float, point: Point) -> None:
        rollouts.clear()

    with pytest.raises(StoreError, match="no labels to train on"):
        distil(
            runtime, rows_of(runtime), rollouts, DistillSettings(steps=50, batch_labels=16), empty
        )


# -- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reads", "objective"),
    [
        *((kind, reads, Objective.TOP1_CE) for kind, reads in KINDS),
        (SelectorKind.PREFIX, Reading.BASE, Objective.KL),
        (SelectorKind.JOINT, Reading.BASE, Objective.PAIRWISE_MARGIN),
        (SelectorKind.PREFIX, Reading.ADAPTED, Objective.PLAIN),
    ],
)
def test_training_learns(
    runtime: ModelRuntime, kind: SelectorKind, reads: Reading, objective: Objective
) -> None:
    """A rule that can be learnt is learnt, by every kind and loss; the best weights are kept, not
    the last ones."""
    rollouts = learnable(make_rollouts(60, runtime.digest))
    config = DistillSettings(
        kind=kind,
        reads=reads,
        steps=100,
        learning_rate=1e-2,
        batch_labels=32,
        patience=99,
        reg_weight=0.01,
        objective=objective,
    )
    losses: list[float] = []
    done = distil(
        runtime, rows_of(runtime), rollouts, config, lambda step, loss, point: losses.append(loss)
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and len(losses) == done.steps == 100
    assert {"loss", "agree_at_1", "slm_agree_at_1", "spearman", "hit_at_8", "lm_kl", "n"} <= set(
        done.metrics
    )
    best = min(point.loss for point in done.curve)
    data = TrainingData(rollouts, runtime.digest, one)
    again = evaluate_selector(runtime, done.selector, data.validation, config)
    assert again.metrics["loss"] == pytest.approx(best, rel=1e-5) and done.curve[0].step == 0
    assert (
        evaluate_selector(runtime, done.selector, data.test, config, with_lm_kl=True)
        == done.evaluation
    )
    assert len(done.evaluation.agreed) == done.test_labels == len(done.evaluation.problems)
    assert sum(done.evaluation.agreed) / done.test_labels == pytest.approx(
        done.metrics["agree_at_1"]
    )


def test_early_stop(runtime: ModelRuntime) -> None:
    """Labels without a rule, at a rate that spoils: the run ends after `patience` validations
    without a better one, and its best weights are the untrained ones or better."""
    rollouts = make_rollouts(60, runtime.digest)
    config = DistillSettings(steps=200, learning_rate=0.3, validate_every=5, patience=2)
    done = distil(runtime, (), rollouts, config)
    losses = [point.loss for point in done.curve]
    assert done.steps < 200 and len(losses) - 1 - losses.index(min(losses)) == 2
    assert done.steps == done.curve[-1].step


def test_fusion_is_chosen_where_it_helps(runtime: ModelRuntime) -> None:
    """The LLM follows the SLM's probabilities, a selector that learnt nothing does not: lambda > 0,
    and a better Agree@1 on labels that did not choose it. Where fusion cannot help, lambda stays
    0."""

    def like_slm(label: Label) -> Label:
        return replace(label, llm_log_probs=label.slm_log_probs)

    rollouts = [
        replace(r, labels=tuple(map(like_slm, r.labels)))
        for r in make_rollouts(120, runtime.digest)
    ]
    config = DistillSettings(kind=SelectorKind.RESERVED, steps=1, learning_rate=1e-9, fusion=True)
    fused = distil(runtime, rows_of(runtime), rollouts, config)
    bare = distil(runtime, rows_of(runtime), rollouts, replace(config, fusion=False))
    assert fused.selector.fusion > 0 == bare.selector.fusion
    assert fused.metrics["agree_at_1"] > bare.metrics["agree_at_1"]
    perfect = [
        replace(
            r,
            labels=tuple(
                replace(x, slm_log_probs=(-1.0,) * len(x.candidate_ids)) for x in r.labels
            ),
        )
        for r in rollouts
    ]
    assert distil(runtime, rows_of(runtime), perfect, config).selector.fusion == 0


def test_training_starts_from_a_given_selector(runtime: ModelRuntime) -> None:
    """Its weights are copied, not shared; one of another shape is refused."""
    rollouts = make_rollouts(60, runtime.digest)
    config = DistillSettings(kind=SelectorKind.JOINT, steps=3, learning_rate=1e-9)
    before, _ = trained_a_little(runtime, config)
    kept = [t.detach().clone() for t in trained_tensors(before)]
    after = distil(runtime, rows_of(runtime), rollouts, config, init=before).selector
    for a, b, c in zip(trained_tensors(after), trained_tensors(before), kept, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and torch.equal(b, c) and a is not b
    with pytest.raises(ConfigError, match="init_from"):
        distil(runtime, rows_of(runtime), rollouts, replace(config, rank=4), init=before)
    with pytest.raises(ConfigError, match="init_from"):
        distil(
            runtime,
            rows_of(runtime),
            rollouts,
            replace(config, kind=SelectorKind.RESERVED),
            init=before,
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule(schedule: str) -> None:
    """Up over the first share of the steps, then down to a tenth (or level)."""
    config = DistillSettings(steps=100, warmup_share=0.1, learning_rate=1.0, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[
        10
    ] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=0.02)
