"""The end of a cycle on the twins: the walk against an exhaustive one, and a commit that writes exactly the
accepted places."""

import pytest
import torch
from exact import walk_by_definition
from hypothesis import given
from hypothesis import strategies as st
from small import small_config
from strategies import parent_lists

from orthrus_kernels import commit, walk
from orthrus_kernels.layout import RECORD, Record
from qwen3_model.kv_cache import KVCache

NAN, INF = float("nan"), float("inf")


def table(values, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def walked(state, trees, ends=(), sums=None):
    """(states, accepted, starts, records) behind the walks of trees (tokens, parents, choices), all of N
    nodes; the logit of row i of the pass is i, its log-sum-exp 2 i."""
    n, count = len(trees[0][0]), len(trees)
    tokens, choices = (table([x for tree in trees for x in tree[i]], torch.int64) for i in (0, 2))
    parents = table([p if p < 0 else s * n + p for s, tree in enumerate(trees) for p in tree[1]])
    rows = torch.arange(count * n, dtype=torch.float32)
    sums = 2 * rows if sums is None else table(sums, torch.float32)
    state, accepted, start = table(state), torch.full((count, n), 9), torch.full((count,), -5)
    record = torch.full((count, RECORD + 3 * n), 77, dtype=torch.int32)
    walk(state, tokens, parents, choices, rows, sums, table(list(ends)), accepted, start, record)
    return state.tolist(), accepted.tolist(), start.tolist(), record


@given(parents=parent_lists(), other=parent_lists(), data=st.data())
def test_the_walk_follows_the_targets_choices(parents, other, data):
    """Of two texts side by side, one of which may have ended. Three tokens only, so that walks are long, and
    0 or 1 may end a text."""
    n = min(len(parents), len(other))
    few = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    trees = [(data.draw(few), of[:n], data.draw(few)) for of in (parents, other)]
    lefts, ends = [data.draw(st.integers(1, 6)) for _ in trees], data.draw(st.lists(st.integers(0, 1)))
    over = data.draw(st.integers(0, 1))
    before = [[10, 5, lefts[0], 0], [30, 6, lefts[1], over]]
    states, accepted, starts, records = walked(before, trees, ends)
    assert starts == [10, 30]
    for s, (tree, left, record) in enumerate(zip(trees, lefts, records, strict=True)):
        path = walk_by_definition(*tree)
        text = [tree[2][node] for node in path]
        kept = min(next((i + 1 for i, token in enumerate(text) if token in ends), len(text)), left)
        finished = int(text[kept - 1] in ends or kept == left)
        if before[s][3]:
            kept, finished = 0, 1
        root = text[kept - 1] if kept else before[s][1]
        assert states[s] == [starts[s] + kept, root, left - kept, finished]
        assert accepted[s] == [s * n + node for node in path[:kept]] + [-1] * (n - kept)
        assert record[: Record.DAMAGED + 1].tolist() == [kept, finished, 0]
        kept_tokens, logs, nodes = record[RECORD:].view(3, n)[:, :kept]
        assert kept_tokens.tolist() == text[:kept] and nodes.tolist() == path[:kept]
        assert logs.view(torch.float32).tolist() == [-float(s * n + node) for node in path[:kept]]


@given(st.lists(st.integers(0, 3), max_size=10), st.lists(st.integers(0, 3), min_size=11, max_size=11))
def test_a_chain_accepts_its_longest_agreeing_prefix(proposals, choices):
    n = len(proposals) + 1
    chain = [9, *proposals], list(range(-1, n - 1)), choices[:n]
    _, (accepted,), _, _ = walked([[0, 9, 99, 0]], [chain])
    agreed = next((i for i, p in enumerate(proposals) if p != choices[i]), len(proposals))
    assert accepted == list(range(agreed + 1)) + [-1] * (n - agreed - 1)


def test_damaged_logits_end_a_text_where_the_path_meets_them():
    for bad in (NAN, INF, -INF):
        chain = [4, 5, 6], [-1, 0, 1], [5, 6, 7]
        states, accepted, _, (record,) = walked([[10, 4, 9, 0]], [chain], sums=[0, bad, 0])
        assert (states, accepted) == ([[11, 5, 8, 1]], [[0, -1, -1]]) and record[:3].tolist() == [1, 1, 1]
    tree = [4, 5, 6], [-1, 0, 0], [5, 9, 7]
    *_, (record,) = walked([[10, 4, 9, 0]], [tree], sums=[0, 0, NAN])
    assert record[:3].tolist() == [2, 0, 0], "a node off the path"


ROWS = st.lists(st.integers(0, 4), max_size=4, unique=True)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=2), st.lists(ROWS, min_size=2, max_size=2))
def test_commit_leaves_every_other_place_alone(starts, accepted):
    """Behind the last position nothing is written, wherever memory goes on."""
    caches = [torch.randn(3, 2, 2, 10, 4) for _ in range(2)]
    rows = [torch.randn(3, 5, 2, 4) for _ in range(2)]
    before = [c.clone() for c in caches]
    commit(*caches, *rows, table([[*mine, *[-1] * (4 - len(mine))] for mine in accepted]), table(starts))
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
