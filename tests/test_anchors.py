"""Where blocks stand: end probabilities of a draft tree's nodes, and the nodes chosen by them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_kernels import choose_anchors, draft_tree, end_probabilities


def test_by_hand():
    """A root with children of 0.6 and 0.3; under the first one of 0.5, which is 0.3 from the root."""
    parents, scores = [-1, 0, 0, 1], [0.0, math.log(0.6), math.log(0.3), math.log(0.3)]
    assert end_probabilities(parents, scores) == pytest.approx([0.1, 0.3, 0.3, 0.3])
    assert choose_anchors([-1, 0, 0], [0.0, math.log(0.5), math.log(0.25)], 2) == [1, 0], (
        "the first of equals"
    )
    assert choose_anchors(parents, scores, 9)[-1] == 0 and choose_anchors(parents, scores, 0) == []
    assert end_probabilities([-1], [0.0]) == [1.0]


@given(p=st.integers(1, 6), k=st.integers(1, 6), nodes=st.integers(0, 40), seed=st.integers(0, 10**6))
def test_ends_of_a_grown_tree_are_a_distribution(p, k, nodes, seed):
    logits = torch.randn(p, k + 2, generator=torch.Generator().manual_seed(seed))
    scores, ids = logits.log_softmax(-1).topk(k, -1)
    tree = draft_tree(0, scores, ids, nodes)
    ends = end_probabilities(tree.parents, tree.scores)
    assert sum(ends) == pytest.approx(1.0) and min(ends) > -1e-6
    for count in (1, 3, len(tree)):
        chosen = choose_anchors(tree.parents, tree.scores, count)
        assert len(set(chosen)) == min(count, len(tree))
        left_out = [ends[i] for i in range(len(tree)) if i not in chosen]
        assert not left_out or min(ends[i] for i in chosen) >= max(left_out)
