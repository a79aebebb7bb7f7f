"""Figures from numbers: rates with intervals, ranks, local sufficiency. Pure; standard library and numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959964


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """Mean of a - b over the same problems, and the half width of its 95 % interval."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(difference) < 2:
        return float(difference.mean()) if len(difference) else 0.0, math.inf
    return float(difference.mean()), float(Z95 * difference.std(ddof=1) / math.sqrt(len(difference)))


def clustered_difference(a: Sequence[bool], b: Sequence[bool], clusters: Sequence[str]) -> tuple[float, float]:
    """Mean of a - b over the same items, and the half width of its 95 % interval, when items of one cluster (labels
    of one problem) are not independent: the ratio estimator of cluster sums over cluster sizes. inf for one cluster.
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
    return mean, Z95 * math.sqrt(variance)


def hit_at(ranks: Sequence[int], k: int) -> float:
    """Hit@K: share of positions where the LLM's top-1 is among the SLM's top K. rank -1 = outside the support."""
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
