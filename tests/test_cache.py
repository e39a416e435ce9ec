"""Commit writes exactly the accepted places, and a cache refuses what it has no room for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_config

from orthrus_kernels import commit
from qwen3_model.kv_cache import KVCache

ROWS = st.lists(st.integers(0, 4), max_size=4, unique=True)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=2), st.lists(ROWS, min_size=2, max_size=2))
def test_commit_leaves_every_other_place_alone(starts, accepted):
    """Behind the last position nothing is written, wherever memory goes on."""
    caches = [torch.randn(3, 2, 2, 10, 4) for _ in range(2)]
    rows = [torch.randn(3, 5, 2, 4) for _ in range(2)]
    before = [c.clone() for c in caches]
    table = torch.tensor(
        [[start, *mine, -1, -1, -1, -1][:5] for start, mine in zip(starts, accepted, strict=True)]
    )
    commit(*caches, *rows, table[:, 1:], table[:, 0])
    for cache, old, new in zip(caches, before, rows, strict=True):
        for s, (start, mine) in enumerate(zip(starts, accepted, strict=True)):
            for i, row in enumerate(mine[: 10 - start]):
                assert torch.equal(cache[:, s, :, start + i], new[:, row])
                cache[:, s, :, start + i] = old[:, s, :, start + i]
        assert torch.equal(cache, old)


def test_a_cache_refuses_what_does_not_fit():
    cache = KVCache(small_config(), 4, torch.device("cpu"), torch.float32)
    rows = torch.zeros(2, 3, 2, 16)
    cache.commit(rows, rows, [0, 2])
    assert cache.lengths == [2]
    with pytest.raises(ValueError, match="do not fit"):
        cache.commit(rows, rows, [0, 1, 2])
