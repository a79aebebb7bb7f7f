"""Statistics of evaluations: rates and differences with 95 % intervals, Hit@K, rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964
HIT_AT = (1, 2, 4, 8)
T95 = (12.7062, 4.3027, 3.1824, 2.7764)  # of 1 to 4 degrees of freedom

# Cornish-Fisher expansion of Student's t in the normal quantile z (Abramowitz and Stegun, 26.7.5):
# t = z + the sum over i of polynomial_i(z) / degrees**i. Coefficients by power of z.
T_EXPANSION = (
    {3: 1 / 4, 1: 1 / 4},
    {5: 5 / 96, 3: 16 / 96, 1: 3 / 96},
    {7: 3 / 384, 5: 19 / 384, 3: 17 / 384, 1: -15 / 384},
    {9: 79 / 92_160, 7: 776 / 92_160, 5: 1482 / 92_160, 3: -1920 / 92_160, 1: -945 / 92_160},
)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    z2 = Z95**2 / n
    variance = p * (1 - p) / n + z2 / (4 * n)
    centre = (p + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(variance) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def t95(degrees: int) -> float:
    """97.5 % quantile of Student's t: half the width of a 95 % interval, in estimated standard
    errors.

    A table up to 4 degrees of freedom. Above, an expansion that is within 0.0004 of the truth.
    """
    assert degrees >= 1
    if degrees <= len(T95):
        return T95[degrees - 1]
    t = Z95
    for order, polynomial in enumerate(T_EXPANSION, 1):
        value = sum(coefficient * Z95**power for power, coefficient in polynomial.items())
        t += value / degrees**order
    return t


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """Mean of a - b over the same problems, and the half width of its 95 % interval.

    The half width is inf for fewer than two problems.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    count = len(difference)
    if not count:
        return 0.0, math.inf
    mean = float(difference.mean())
    if count < 2:
        return mean, math.inf
    standard_error = float(difference.std(ddof=1)) / math.sqrt(count)
    return mean, Z95 * standard_error


def clustered_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[str]
) -> tuple[float, float]:
    """Mean of a - b over the same items, and the half width of its 95 % interval.

    Items of one cluster (labels of one problem) are not independent. The variance is the ratio
    estimator's, from cluster sums and cluster sizes, with Student's t for the number of clusters.
    The half width is inf for one cluster.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if not len(difference):
        return 0.0, math.inf
    mean = float(difference.mean())
    _, cluster_of = np.unique(np.asarray(clusters), return_inverse=True)
    # Of each cluster: its sum minus the mean times its size.
    residuals = np.bincount(cluster_of, weights=difference - mean)
    count = len(residuals)
    if count < 2:
        return mean, math.inf
    squares = float((residuals**2).sum()) / len(difference) ** 2
    variance = count / (count - 1) * squares
    return mean, t95(count - 1) * math.sqrt(variance)


def hits(ranks: Sequence[int], ks: Sequence[int] = HIT_AT) -> np.ndarray:
    """Whether the LLM's first choice is among the SLM's first K, for each K of `ks`.

    ranks: [n], place of the LLM's choice in the SLM's order, 0 = first, -1 = outside the support.
    Returns [n, len(ks)], bool.
    """
    column = np.asarray(ranks, dtype=np.int64)[:, None]
    found: np.ndarray = (column >= 0) & (column < np.asarray(ks))
    return found


def hit_at(ranks: Sequence[int], ks: Sequence[int] = HIT_AT) -> dict[int, float]:
    """Hit@K by K: share of positions where the LLM's first choice is among the SLM's first K.

    `ranks` and `ks` as in `hits`. nan for no positions.
    """
    if not ranks:
        return dict.fromkeys(ks, math.nan)
    return dict(zip(ks, hits(ranks, ks).mean(0).tolist(), strict=True))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho of two score lists (ties get mean ranks); 0 for a constant list."""
    a_ranks = _mean_ranks(a)
    b_ranks = _mean_ranks(b)
    if a_ranks.std() == 0 or b_ranks.std() == 0:
        return 0.0
    return float(np.corrcoef(a_ranks, b_ranks)[0, 1])


def _mean_ranks(values: Sequence[float]) -> np.ndarray:
    """0-based ranks; equal values get the mean of their ranks."""
    array = np.asarray(values, dtype=float)
    _, group, sizes = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    first = ends - sizes
    last = ends - 1
    mean: np.ndarray = (first + last) / 2.0
    return mean[group]
