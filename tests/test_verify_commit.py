"""Verify against an exhaustive walk; commit writes exactly the accepted slots."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import parent_lists

from orthrus_kernels import commit, verify


@given(parent_lists(), st.data())
def test_verify_walks_the_targets_choices(parents, data):
    n = len(parents)
    tokens, choices = (data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)) for _ in range(2))
    path, bonus = verify(tokens, parents, choices)
    want = [0]
    while True:
        matching = [i for i in range(n) if parents[i] == want[-1] and tokens[i] == choices[want[-1]]]
        if not matching:
            break
        want.append(min(matching))
    assert path == want and bonus == choices[path[-1]]


@given(st.lists(st.integers(0, 3), max_size=10), st.lists(st.integers(0, 3), min_size=11, max_size=11))
def test_a_chain_accepts_its_longest_agreeing_prefix(proposals, choices):
    path, bonus = verify([9, *proposals], range(-1, len(proposals)), choices)
    agreed = next((i for i, p in enumerate(proposals) if p != choices[i]), len(proposals))
    assert path == list(range(agreed + 1)) and bonus == choices[agreed]


@given(st.integers(0, 6), st.lists(st.integers(0, 4), max_size=4, unique=True), st.integers(0, 1))
def test_commit_leaves_every_other_slot_alone(start, accepted, sequence):
    caches = [torch.randn(3, 2, 2, 10, 4) for _ in range(2)]
    rows = [torch.randn(3, 5, 2, 4) for _ in range(2)]
    before = [c.clone() for c in caches]
    commit(*caches, *rows, accepted, start, sequence)
    for cache, old, new in zip(caches, before, rows, strict=True):
        for i, row in enumerate(accepted):
            assert torch.equal(cache[:, sequence, :, start + i], new[:, row])
            cache[:, sequence, :, start + i] = old[:, sequence, :, start + i]
        assert torch.equal(cache, old)


def test_commit_refuses_what_does_not_fit():
    cache, rows = torch.zeros(1, 1, 1, 4, 2), torch.zeros(1, 3, 1, 2)
    with pytest.raises(ValueError, match="do not fit"):
        commit(cache, cache.clone(), rows, rows, [0, 1, 2], 2)
