"""Commit writes exactly the accepted places, and a cache refuses what it has no room for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import small_config

from orthrus_kernels import PAGE, commit, in_order
from qwen3_model.kv_cache import KVCache

ROWS = st.lists(st.integers(0, 4), max_size=4, unique=True)
STARTS = st.sampled_from([0, 1, PAGE - 2, PAGE, 2 * PAGE - 2, 2 * PAGE])


@given(st.lists(STARTS, min_size=2, max_size=2), st.lists(ROWS, min_size=2, max_size=2))
def test_commit_leaves_every_other_place_alone(starts, accepted):
    """Behind the last position nothing is written, nor in a page of nobody."""
    pools, pages = [torch.randn(3, 5, 2, PAGE, 4) for _ in range(2)], torch.tensor([[3, 0], [1, 4]])
    rows = [torch.randn(3, 5, 2, 4) for _ in range(2)]
    before = [p.clone() for p in pools]
    table = torch.tensor(
        [[start, *mine, -1, -1, -1, -1][:5] for start, mine in zip(starts, accepted, strict=True)]
    )
    commit(*pools, pages, torch.arange(len(table)), *rows, table[:, 1:], table[:, 0])
    for pool, old, new in zip(pools, before, rows, strict=True):
        for s, (start, mine) in enumerate(zip(starts, accepted, strict=True)):
            for i, row in enumerate(mine[: 2 * PAGE - start]):
                page, place = pages[s, (start + i) // PAGE], (start + i) % PAGE
                assert torch.equal(pool[:, page, :, place], new[:, row])
                pool[:, page, :, place] = old[:, page, :, place]
        assert torch.equal(pool, old)


@given(st.integers(0, 3 * PAGE), st.integers(0, 3 * PAGE))
def test_positions_in_order(a, b):
    """Whatever pages the others have: they are not looked up."""
    first, last = sorted((a, b))
    whole, pages = torch.randn(2, 3 * PAGE, 4), torch.tensor([4, 0, 2])
    pool = torch.full((5, 2, PAGE, 4), float("nan"))
    pool[pages] = whole.unflatten(1, (3, PAGE)).transpose(0, 1)
    pages[: first // PAGE], pages[-(-last // PAGE) :] = 1 << 30, -1
    assert torch.equal(in_order(pool, pages, first, last), whole[:, first:last])


def test_a_cache_refuses_what_does_not_fit():
    cache = KVCache(small_config(), 4, torch.device("cpu"), torch.float32)
    rows = torch.zeros(2, 3, 2, 16)
    cache.commit(rows, rows, [0, 2])
    assert cache.lengths == [2] and cache.capacity == 4
    with pytest.raises(ValueError, match="do not fit"):
        cache.commit(rows, rows, [0, 1, 2])


def test_each_sequence_owns_the_pages_of_its_capacity():
    cache = KVCache(small_config(), PAGE + 1, torch.device("cpu"), torch.float32, sequences=2)
    assert cache.pages.tolist() == [[0, 1], [2, 3]]
    for s in range(2):
        keys, values = torch.randn(2, 2, PAGE + 1, 2, 16)
        cache.commit(keys, values, range(PAGE + 1), s)
        assert all(
            map(torch.equal, cache.read(s, PAGE), (t[:, :PAGE].transpose(1, 2) for t in (keys, values)))
        )


def test_a_pool_whose_pages_nobody_owns_yet():
    """Fewer than two sequences could take; a row without a page is lost, one behind it is not."""
    cache = KVCache(small_config(), 2 * PAGE, torch.device("cpu"), torch.float32, sequences=2, pool=3)
    assert cache.keys.shape[1] == 3 and (cache.pages == -1).all() and cache.pages.shape == (2, 2)
    cache.keys.zero_()
    cache.pages[1, 1], cache.lengths[1] = 2, PAGE - 1
    rows = torch.ones(2, 2, 2, 16)
    cache.commit(rows, rows, [0, 1], sequence=1)
    assert cache.keys.sum() == cache.keys[:, 2, :, 0].sum() == 2 * 2 * 16
