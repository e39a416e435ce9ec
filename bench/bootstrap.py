"""Ratios of sums over prompts, and their bootstrap intervals."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def ratio(pairs: np.ndarray) -> float:
    """Of the sums of pairs [N, 2]; 0 where the lower one is 0."""
    over, under = pairs.sum(0)
    return float(over / under) if under else 0.0


def interval(pairs: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Percentiles of the ratio of sums over prompts drawn with replacement. pairs [N, 2]: of each prompt."""
    draws = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    sums = pairs[draws].sum(1)
    low, high = np.quantile(sums[:, 0] / np.maximum(sums[:, 1], 1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def gain(new: np.ndarray, old: np.ndarray) -> float:
    """The ratio of one's sums over the ratio of another's sums, of the same prompts."""
    return ratio(new) / ratio(old)


def gain_interval(new: np.ndarray, old: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Percentiles of `gain` over prompts drawn with replacement, the same ones for both: paired."""
    draws = np.random.default_rng(0).integers(len(new), size=(RESAMPLES, len(new)))
    sums = [pairs[draws].sum(1) for pairs in (new, old)]
    ratios = [s[:, 0] / np.maximum(s[:, 1], 1) for s in sums]
    low, high = np.quantile(ratios[0] / ratios[1], [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
