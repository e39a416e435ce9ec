"""What sampled tokens are held against: probabilities by definition in fp64, Pearson's chi-square test."""

from __future__ import annotations

import math

import torch
from scipy import stats

from orthrus_kernels import Sampling


def by_definition(scaled: list[float], sampling: Sampling) -> torch.Tensor:
    """Probability of each token after top-k, top-p on the rest, and min-p, one token at a time. scaled:
    logits over temperature."""
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(math.exp(scaled[i]) for i in order)
    share = {i: math.exp(scaled[i]) / total for i in order}
    nucleus, mass = [], 0.0
    for i in order:
        if mass < sampling.top_p or not nucleus:
            nucleus.append(i)
        mass += share[i]
    kept = [i for i in nucleus if share[i] >= sampling.min_p * share[order[0]]]
    norm = sum(share[i] for i in kept)
    return torch.tensor(
        [share[i] / norm if i in kept else 0.0 for i in range(len(scaled))], dtype=torch.float64
    )


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of counts [R, N], each row a sample of its row of probabilities [R, N]; 0 for a count where
    there is no probability. Rows that expect a cell less than 5 times are left out."""
    if counts[probabilities == 0].sum():
        return 0.0
    expected = counts.sum(-1, keepdim=True) * probabilities
    enough = ((expected >= 5) | (probabilities == 0)).all(-1)
    assert enough.any(), "too few samples to tell"
    counts, expected = counts[enough], expected[enough]
    possible = expected > 0
    statistic = ((counts - expected) ** 2 / expected)[possible].sum()
    freedom = int(possible.sum() - len(expected))
    return float(stats.chi2.sf(float(statistic), freedom)) if freedom else 1.0  # 1.0: all were certain
