"""Which labels train and which are held out; how an epoch streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.errors import ConfigError, EvaluationSplitError, StoreError
from s2t_shared.labels.label import Rollout
from s2t_shared.labels.lake import Lake
from s2t_shared.splits import Part
from s2t_shared.training.dataset import (
    BUFFER,
    TrainingData,
    context_length,
    count_labels,
    part_of,
)
from s2t_shared.training.settings import TrainingSettings
from tests.helpers.rollouts import make_label, make_rollout, make_rollouts


def ids(rollouts: Sequence[Rollout]) -> list[str]:
    return [label.label_id for rollout in rollouts for label in rollout.labels]


def test_an_epoch_is_every_training_label_once(tmp_path: Path) -> None:
    """From shards on disk, in another order every epoch, in batches of about the wished size; the
    same for whoever asks; held-out problems are in none."""
    lake = Lake(tmp_path)
    rollouts = make_rollouts(400)
    for start in range(0, 400, 50):
        lake.write(rollouts[start : start + 50])
    data = TrainingData(lake.freeze(), "slm", TrainingSettings(batch_labels=24, seed=5))
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
    again = TrainingData(lake.freeze(), "slm", TrainingSettings(batch_labels=24, seed=5))
    assert [list(again.epoch(number)) for number in (0, 1)] == epochs
    spread = [max(map(context_length, b)) - min(map(context_length, b)) for b in epochs[0]]
    assert sum(spread) / len(spread) <= 2  # of 14..20: batches hold rollouts of like length
    held_out = ids([r for r in rollouts if r.held_out])
    assert sorted(ids(data.validation) + ids(data.test)) == sorted(held_out)


def test_streaming_mixes_across_a_bounded_buffer() -> None:
    """More rollouts than the buffer holds: all come once, and order is lost beyond neighbours."""
    rollouts = [make_rollout(r, (3,)) for r in range(BUFFER + 500)]
    data = TrainingData(rollouts, "slm", TrainingSettings(batch_labels=8))
    seen = [int(i[1:].split("-")[0]) for batch in data.epoch(0) for i in ids(batch)]
    assert len(seen) == len(set(seen)) == data.labels
    moved = sum(abs(a - b) for a, b in zip(seen, sorted(seen), strict=True)) / len(seen)
    assert moved > BUFFER / 8


def test_a_group_is_wholly_on_one_side() -> None:
    """Problems of one template must not train and test: what was learnt by heart would count."""
    rollouts = [make_rollout(i, (3,), group=f"template {i % 80}") for i in range(400)]
    parts: dict[str, set[Part]] = {}
    for rollout in rollouts:
        parts.setdefault(rollout.group, set()).add(part_of(rollout))
    assert all(len(found) == 1 for found in parts.values())
    assert {part for found in parts.values() for part in found} == set(Part)
    data = TrainingData(rollouts, "slm", TrainingSettings(batch_labels=8))
    trained = {r.group for batch in data.epoch(0) for r in batch}
    tested = {r.group for r in (*data.validation, *data.test)}
    assert tested
    assert not trained & tested


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
    data = TrainingData(rollouts, "slm", TrainingSettings(batch_labels=16, held_out_labels=5))
    trained = [rollout for number in (0, 1) for batch in data.epoch(number) for rollout in batch]
    assert count_labels(trained) == 2 * data.labels
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
    settings = TrainingSettings(held_out_labels=30)
    data = TrainingData(rollouts, "slm", settings)
    assert count_labels(data.validation) == 30 and count_labels(data.test) == 30
    assert TrainingData(rollouts[::-1], "slm", settings).test == data.test
    more = [make_rollout(r) for r in range(900, 920)]
    grown = TrainingData(rollouts + more, "slm", settings)
    assert len(set(ids(grown.test)) & set(ids(data.test))) >= 24


def test_training_refuses_foreign_or_few_labels() -> None:
    with pytest.raises(ConfigError, match="another SLM"):
        TrainingData(make_rollouts(40, "someone else"), "slm", TrainingSettings())
    with pytest.raises(StoreError, match="too few"):
        TrainingData(make_rollouts(2), "slm", TrainingSettings())
    with pytest.raises(StoreError, match="0 training labels.*filters"):
        TrainingData(make_rollouts(60), "slm", TrainingSettings(min_mass=1.0))
    mixed = make_rollouts(60)
    with pytest.raises(EvaluationSplitError):
        TrainingData([replace(mixed[0], split="test"), *mixed[1:]], "slm", TrainingSettings())


@pytest.mark.parametrize("rests", [False, True])
def test_labels_of_other_models_are_skipped(tmp_path: Path, rests: bool) -> None:
    """One rollout of another SLM or LLM does not stop training: most labels of this SLM decide, on
    disk as in memory, and nothing of the others is trained or measured on."""
    ours = make_rollouts(60)
    others = [
        make_rollout(100 + 2 * i + n, (3,), **{field: "other"})
        for i in range(40)
        for n, field in enumerate(("slm_digest", "llm_digest"))
    ]
    source = [*others[:40], *ours, *others[40:]]
    Lake(tmp_path).write(source)
    data = TrainingData(Lake(tmp_path).freeze() if rests else source, "slm", TrainingSettings())
    assert (
        data.llm_digest == "llm"
        and data.skipped == 80
        and data.newest == max(r.created_at for r in source)
    )
    epoch = [rollout for batch in data.epoch(0) for rollout in batch]
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
    data = TrainingData([*rollouts, *again], "slm", TrainingSettings())
    prompts = {r.token_ids[:4] for r in [*kept_out, *again] if r.held_out}
    trained = {rollout.token_ids[:4] for batch in data.epoch(0) for rollout in batch}
    assert trained == {r.token_ids[:4] for r in rollouts} - prompts and len(trained) > 150
