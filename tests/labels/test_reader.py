"""What is there twice is found, in memory and on disk, and nothing else is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from s2t_shared.labels import keys as keys_module
from s2t_shared.labels.keys import Repeats
from s2t_shared.labels.lake import Lake
from tests.helpers.lake import label, rollout


@pytest.mark.parametrize("in_memory", [1 << 20, 50])
def test_all_but_the_first_of_each_key(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """50: everything but the last few keys lies on disk."""
    monkeypatch.setattr(keys_module, "IN_MEMORY", in_memory)
    rng = np.random.default_rng(3)
    often = rng.integers(0, 1 << 63, 300, dtype=np.uint64) * np.uint64(2)
    keys = np.concatenate([often, rng.choice(often, 200), np.arange(100, dtype=np.uint64)])
    keys = rng.permutation(keys)
    places = np.cumsum(rng.integers(1, 5, len(keys)))
    repeats = Repeats()
    for start in range(0, len(keys), 70):
        repeats.add(keys[start : start + 70], places[start : start + 70])
    seen: set[int] = set()
    expected = []
    for key, place in zip(keys.tolist(), places.tolist(), strict=True):
        if key in seen:
            expected.append(place)
        seen.add(key)
    assert repeats.repeats().tolist() == expected and len(expected) == 200
    assert repeats.distinct == len(seen) == 400


@pytest.mark.parametrize("in_memory", [1 << 20, 50])
def test_keys_that_are_all_different(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "IN_MEMORY", in_memory)
    repeats = Repeats()
    repeats.add(np.arange(120, dtype=np.uint64) << np.uint64(57), np.arange(120))
    assert repeats.repeats().tolist() == [] and repeats.distinct == 120


def test_a_rollout_that_comes_twice_buries_no_label_of_another(lake: Lake) -> None:
    """Its second copy is left out whole: a label that only this copy had in common with a later
    rollout is still that rollout's."""
    again = replace(rollout(1), labels=(*rollout(1).labels, label("shared")))
    later = replace(rollout(2), labels=(label("shared"), label("own")))
    lake.write([rollout(1)], "a")
    lake.write([again], "b")
    lake.write([later], "c")
    found = {r.rollout_id: [x.label_id for x in r.labels] for r in lake.rollouts()}
    assert found == {"rollout-1": ["1-0", "1-1"], "rollout-2": ["shared", "own"]}
    assert lake.freeze().reader().labels == 4
