"""Intervals of paired differences, clustered by problem."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_shared.statistics import Z95, clustered_difference, paired_difference, t95
from tests.helpers.versions import paired


def test_clustered_interval_is_the_paired_one_for_single_items() -> None:
    a, b = [True, False, True, True, False] * 9, [False, False, True, False, True] * 9
    mean, half = clustered_difference(a, b, [str(i) for i in range(45)])
    naive, width = paired_difference(a, b)
    assert (mean, half) == pytest.approx((naive, width * t95(44) / Z95))


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (9, 2.262),
        (19, 2.093),
        (44, 2.015),
        (99, 1.984),
        (10**6, 1.960),
    ],
)
def test_few_clusters_have_wider_intervals(degrees: int, quantile: float) -> None:
    """Student's t, from tables; and the interval is that many standard errors wide."""
    assert t95(degrees) == pytest.approx(quantile, abs=1e-3)
    n = degrees + 1
    if n <= 100:
        a = [i % 3 == 0 for i in range(n)]
        mean, half = clustered_difference(a, [False] * n, [str(i) for i in range(n)])
        assert half == pytest.approx(quantile * math.sqrt(mean * (1 - mean) / degrees), rel=1e-3)


def test_clustered_interval_knows_that_copies_are_no_evidence() -> None:
    """Each problem's labels ten times over: the same interval, where the naive one shrinks by a
    root of ten."""
    single = paired(40, 1, 0.7, 0.5)
    new = [x for x in single.new for _ in range(10)]
    old = [x for x in single.old for _ in range(10)]
    problems = [x for x in single.groups for _ in range(10)]
    expected = clustered_difference(single.new, single.old, single.groups)
    assert clustered_difference(new, old, problems) == pytest.approx(expected)
    assert clustered_difference([True], [False], ["a"]) == (1.0, float("inf"))
    assert clustered_difference([], [], []) == (0.0, float("inf"))


def test_clustered_interval_covers_the_truth() -> None:
    """95 % of intervals hold the true difference, with problems of unequal size and difficulty."""
    draw, covered = random.Random(1), 0
    for _ in range(400):
        new, old, problems = [], [], []
        for i in range(60):
            easy = draw.random()
            for _ in range(draw.randint(1, 8)):
                problems.append(str(i))
                new.append(draw.random() < min(1.0, 0.3 + 0.5 * easy + 0.1))
                old.append(draw.random() < 0.3 + 0.5 * easy)
        mean, half = clustered_difference(new, old, problems)
        covered += abs(mean - 0.1) <= half
    assert 0.91 <= covered / 400 <= 0.98


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 30)), min_size=25, max_size=200)
)
def test_swapping_the_sides_mirrors_the_interval(items: list[tuple[bool, bool, int]]) -> None:
    a = [x for x, _, _ in items]
    b = [y for _, y, _ in items]
    problems = [str(z) for _, _, z in items]
    mean, half = clustered_difference(a, b, problems)
    mirrored, same = clustered_difference(b, a, problems)
    assert mirrored == pytest.approx(-mean)
    assert same == pytest.approx(half)
    assert half >= 0
    assert Z95 > 1.9
