"""Figures from numbers: rates with intervals, ranks, local sufficiency. Pure; standard library and
numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964
T95 = (12.7062, 4.3027, 3.1824, 2.7764)  # of 1 to 4 degrees of freedom


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def t95(degrees: int) -> float:
    """97.5 % quantile of Student's t: half of a 95 % interval, in standard errors that were
    themselves estimated.

    A table up to 4 degrees of freedom; beyond, the Cornish-Fisher expansion of the normal quantile
    (Abramowitz and Stegun, 26.7.5), within 0.0004 of the truth.
    """
    assert degrees >= 1
    if degrees <= len(T95):
        return T95[degrees - 1]
    z, n = Z95, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92_160 * n**4)
    )


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """Mean of a - b over the same problems, and the half width of its 95 % interval."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(difference) < 2:
        return float(difference.mean()) if len(difference) else 0.0, math.inf
    return float(difference.mean()), float(
        Z95 * difference.std(ddof=1) / math.sqrt(len(difference))
    )


def clustered_difference(
    a: Sequence[bool], b: Sequence[bool], clusters: Sequence[str]
) -> tuple[float, float]:
    """Mean of a - b over the same items, and the half width of its 95 % interval, when items of one
    cluster (labels of one problem) are not independent: the ratio estimator of cluster sums over
    cluster sizes, and t for so many clusters, which are few. inf for one cluster.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if not len(difference):
        return 0.0, math.inf
    mean = float(difference.mean())
    _, of = np.unique(np.asarray(clusters), return_inverse=True)
    residuals = np.bincount(of, weights=difference - mean)  # per cluster: its sum - mean * its size
    if (n := len(residuals)) < 2:
        return mean, math.inf
    variance = n / (n - 1) * float((residuals**2).sum()) / len(difference) ** 2
    return mean, t95(n - 1) * math.sqrt(variance)


def hit_at(ranks: Sequence[int], k: int) -> float:
    """Hit@K: share of positions where the LLM's top-1 is among the SLM's top K. rank -1 = outside
    the support."""
    return sum(0 <= rank < k for rank in ranks) / len(ranks) if ranks else math.nan


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rho of two score lists (ties get mean ranks); 0 for a constant list."""
    x, y = _ranks(a), _ranks(b)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2.0)[inverse]
