"""Intervals of one figure by itself: a share, a correlation, the variance explained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

ALPHA = 0.05
RESAMPLES = 2000


def share_interval(right: int, count: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927, JASA 22, equation 5), such as an accuracy."""
    z = float(norm.ppf(1 - alpha / 2))
    share, spread = right / count, 1 + z * z / count
    center = (share + z * z / (2 * count)) / spread
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / spread
    return max(0.0, center - half), min(1.0, center + half)


def correlation_interval(correlation: float, count: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the interval of Pearson's correlation by Fisher's z; from -1 to 1 for fewer than four pairs."""
    if count < 4 or abs(correlation) >= 1:
        return (-1.0, 1.0) if count < 4 else (correlation, correlation)
    z, half = math.atanh(correlation), float(norm.ppf(1 - alpha / 2)) / math.sqrt(count - 3)
    return math.tanh(z - half), math.tanh(z + half)


def explained_interval(
    predicted: Sequence[float], true: Sequence[float], alpha: float = ALPHA, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval, by percentiles over pairs, of R2: one less the squared error over the variance."""
    given, wanted = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    drawn_RN = np.random.default_rng(seed).integers(0, len(wanted), (RESAMPLES, len(wanted)))
    error_R = ((given - wanted)[drawn_RN] ** 2).sum(axis=1)
    own_RN = wanted[drawn_RN]
    variance_R = ((own_RN - own_RN.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    found_R = 1 - error_R[variance_R > 0] / variance_R[variance_R > 0]
    if not len(found_R):
        return -math.inf, 1.0
    low, high = np.quantile(found_R, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)
