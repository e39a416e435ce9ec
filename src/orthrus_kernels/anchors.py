"""Where the blocks of a one-pass cycle stand: at the nodes at which the walk is likeliest to end.

The drafter says how likely the target walks to a node: the exponential of its score (draft_tree.py). The walk
ends there unless it goes on to a child, so a node's **end probability** is its own less its children's."""

from __future__ import annotations

import math
from collections.abc import Sequence


def end_probabilities(parents: Sequence[int], scores: Sequence[float]) -> list[float]:
    """For each node of a draft tree, root first, the probability that the walk ends there, by the drafter.

    parents, scores: as in `DraftTree`; scores are logs of probabilities from the root down."""
    ends = [math.exp(score) for score in scores]
    for parent, score in zip(parents, scores, strict=True):
        if parent >= 0:
            ends[parent] -= math.exp(score)
    return ends


def choose_anchors(parents: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    """The `count` nodes of highest end probability, likeliest first, at equal ones the first; fewer in a
    smaller tree."""
    ends = end_probabilities(parents, scores)
    return sorted(range(len(ends)), key=lambda node: (-ends[node], node))[:count]
