"""Evaluation splits are refused; problems are held out by a hash."""

from __future__ import annotations

from dataclasses import replace

import pytest

from s2t_shared.errors import EvaluationSplitError
from s2t_shared.splits import HELD_OUT_SHARE, check_split, is_held_out
from tests.helpers.lake import rollout


@pytest.mark.parametrize("split", ["test", " Eval ", "DEV", "held-out", "", " "])
def test_an_evaluation_split_is_refused(split: str) -> None:
    with pytest.raises(EvaluationSplitError, match="use training problems"):
        check_split(split)


def test_other_splits_are_not() -> None:
    for split in ("train", "Training", "contest"):
        check_split(split)


def test_a_tenth_of_the_problems_is_held_out_and_stays_so() -> None:
    held_out = [is_held_out("sums", f"{n}") for n in range(4000)]
    assert 0.7 * HELD_OUT_SHARE < sum(held_out) / 4000 < 1.3 * HELD_OUT_SHARE
    # What was held out when labels were stored must be held out for ever.
    assert [n for n in range(40) if held_out[n]] == [1, 3, 12, 19, 20, 21, 23, 30, 35]


def test_a_rollout_without_a_problem_is_split_by_its_prompt() -> None:
    """Two answers to one prompt must not be on both sides."""
    one = replace(rollout(1), problem_id="")
    assert one.problem == replace(one, token_ids=(1, 2, 9, 9, 9), rollout_id="other").problem
    assert one.problem != replace(one, token_ids=(1, 3, 1, 4)).problem
    share = sum(replace(rollout(n), problem_id=f"{n}").held_out for n in range(4000)) / 4000
    assert 0.07 < share < 0.13
