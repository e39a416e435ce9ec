"""Trees grown and blocks placed on the device: the plan is the twin's, and its pass sees what it should."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from plans import tables_for

from orthrus_kernels import PassPlan, PassShape, Rows, draft_tree, end_probabilities, unpack, visible
from orthrus_kernels.blocks import follow, follow_triton, place_blocks, place_blocks_triton
from orthrus_kernels.grow import grow, grow_triton
from orthrus_kernels.lay import lay
from orthrus_kernels.lay_triton import lay_triton
from orthrus_kernels.layout import RECORD, State

MASK = 96


def distributions(depth, width, seed, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(depth, width, generator=generator)
    scores = logits.sort(-1, descending=True).values.log_softmax(-1)
    return scores, torch.randint(0, 90, (depth, width), generator=generator)


def plan_of(nodes, depth, states, device, blocks=0, size=0):
    """The plan of a tree of `nodes` nodes and its root for each sequence, filled with what nothing has."""
    rows = Rows.batch([
        Rows.tree_with_blocks([-7] * (nodes + 1), [-1] + [0] * nodes, 0, range(blocks), size, MASK, s)
        for s in range(len(states))
    ])  # fmt: skip
    n = (nodes + 1) * len(states)
    shape = PassShape(len(rows), n, n + blocks, depth + 1 + size, len(states))
    plan = replace(PassPlan.of(rows).on(device), shape=shape)
    plan.positions.fill_(-7)
    plan.parents.fill_(-7)
    state = torch.tensor(states, dtype=torch.int32, device=device)
    return replace(plan, start=state[:, State.START]), state


def grown(nodes, draws, states, tile_rows, device=DEVICE, run=grow_triton, blocks=0, size=0):
    """(plan, scores, tables, anchors): twice in the same tensors, so that nothing of the pass before is
    left. draws: scores and ids of each sequence."""
    plan, state = plan_of(nodes, len(draws[0][0]), states, device, blocks, size)
    scores = torch.zeros((nodes + 1) * len(states), device=device)
    tables = tables_for(plan.shape, tile_rows, device=device)
    anchors = torch.full((blocks,), -1, dtype=torch.int32, device=device)
    log_probabilities, ids = (torch.stack(parts) for parts in zip(*draws, strict=True))
    other = -log_probabilities.flip(1).sort(-1, descending=True).values
    at = state[:, State.START].clone()
    for start, sharp in ((torch.full_like(at, 3), other), (at, log_probabilities)):
        state[:, State.START] = start
        run(plan, scores, state, sharp.contiguous().to(device), ids.to(device))
        if blocks:
            (place_blocks_triton if run is grow_triton else place_blocks)(plan, scores, anchors)
        (lay_triton if run is grow_triton else lay)(plan, tables)
    return plan, scores, tables, anchors.tolist()


def assert_sees(plan, tables):
    """Every row of every view sees what the one definition says, and each of its keys in one item."""
    rows = plan.rows()
    assert torch.equal(unpack(tables), visible(rows))
    edges, items = tables.segments.tolist(), tables.items[: tables.count].tolist()
    keys: dict[int, list[int]] = {row: [] for row in range(len(rows))}
    for tile, segment in items:
        for row, limit in zip(tables.rows[tile].tolist(), tables.limits[tile].tolist(), strict=True):
            if row >= 0:
                keys[row] += range(edges[segment], min(edges[segment + 1], limit))
    seen = visible(rows).sum(1).tolist()
    for row, found in keys.items():
        end = rows.contexts[rows.sequences[row]] + seen[row]
        assert sorted(found) == list(range(end)), row
        assert tables.row_segments[row].tolist() == [0, sum(first < end for first in edges[:-1])]


@examples(15)
@given(
    depth=st.integers(1, 9), width=st.integers(2, 5), nodes=st.integers(1, 40), seed=st.integers(0, 10**6),
    starts=st.lists(st.integers(0, 140), min_size=1, max_size=3), tile_rows=st.sampled_from([4, 16]),
    sharp=st.sampled_from([0.3, 1.0, 5.0]),
)  # fmt: skip
def test_the_twins_tree(depth, width, nodes, seed, starts, tile_rows, sharp):
    """Of each sequence, in places of its own."""
    nodes = min(nodes, depth * width)  # at least so many paths
    draws = [distributions(depth, width, seed + s, sharp) for s in range(len(starts))]
    states = [[start, 7 + s, 9, 0] for s, start in enumerate(starts)]
    plan, scores, tables, _ = grown(nodes, draws, states, tile_rows)
    trees = [draft_tree(7 + s, *draw, nodes) for s, draw in enumerate(draws)]
    singles = [
        Rows.tree(t.tokens, t.parents, at, s) for s, (t, at) in enumerate(zip(trees, starts, strict=True))
    ]
    assert plan.rows() == Rows.batch(singles)
    assert scores.tolist() == [score for tree in trees for score in tree.scores]
    assert_sees(plan, tables)
    twin, twins_scores, *_ = grown(nodes, draws, states, tile_rows, "cpu", grow)
    assert twin.rows() == plan.rows() and torch.equal(twins_scores, scores.cpu())


@examples(15)
@given(
    depth=st.integers(1, 7), width=st.integers(2, 5), nodes=st.integers(1, 25), seed=st.integers(0, 10**6),
    start=st.integers(0, 140), tile_rows=st.sampled_from([4, 16]), share=st.floats(0, 1),
    size=st.integers(3, 9), sharp=st.sampled_from([0.3, 1.0, 5.0]),
)  # fmt: skip
def test_blocks_at_the_likeliest_ends(depth, width, nodes, seed, start, tile_rows, share, size, sharp):
    nodes = min(nodes, depth * width)
    draw, count = distributions(depth, width, seed, sharp), 1 + int(share * nodes)
    tree = draft_tree(7, *draw, nodes)
    ends = end_probabilities(tree.parents, tree.scores)
    best = sorted(ends, reverse=True)[:count]
    for device, run in ((DEVICE, grow_triton), ("cpu", grow)):
        plan, _, tables, anchors = grown(
            nodes, [draw], [[start, 7, 9, 0]], tile_rows, device, run, count, size
        )
        assert plan.rows() == Rows.tree_with_blocks(tree.tokens, tree.parents, start, anchors, size, MASK)
        assert len(set(anchors)) == count and [ends[a] for a in anchors] == pytest.approx(best, abs=1e-6)
        assert_sees(plan, tables)


@pytest.mark.parametrize("possible", [0, 1, 2])
@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_nodes_that_are_not_possible(possible, nothing):
    """Filtered or damaged candidates: the rows are of some tree all the same, the twin's too."""
    scores, ids = distributions(4, 4, 1)
    scores[:, possible:] = nothing
    plan, of, tables, _ = grown(20, [(scores, ids)], [[30, 7, 9, 0]], 4)
    assert_sees(plan, tables)
    twin, twins_scores, *_ = grown(20, [(scores, ids)], [[30, 7, 9, 0]], 4, "cpu", grow)
    assert twin.rows() == plan.rows() and torch.equal(twins_scores, of.cpu())
    if possible:
        tree = draft_tree(7, scores[:, :possible], ids[:, :possible], 20)
        rows = plan.rows()
        assert rows.tokens[: len(tree)] == tree.tokens and rows.parents[: len(tree)] == tree.parents


def test_what_is_not_grown():
    for nodes, depth in ((5, 64), (40000, 3)):
        plan, state = plan_of(nodes, depth, [[0, 1, 9, 0]], DEVICE)
        scores, ids = (
            torch.zeros(depth, 2, device=DEVICE),
            torch.zeros(depth, 2, dtype=torch.int64, device=DEVICE),
        )
        with pytest.raises(AssertionError):
            grow_triton(plan, torch.zeros(nodes + 1, device=DEVICE), state, scores, ids)


@pytest.mark.parametrize("run, device", [(follow_triton, DEVICE), (follow, "cpu")])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_block_where_the_walk_ended(kept, run, device):
    n, size, start = 6, 5, 40
    record = torch.zeros(RECORD + 3 * n, dtype=torch.int32)
    record[0] = kept
    record[RECORD + 2 * n :][:3] = torch.tensor([0, 2, 4])
    for anchors, block in (([4, 0], {1: 1, 3: 0}), ([1, 3], {})):
        table = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([start, 9, 9, 0], anchors, [7])]
        rows, positions = (torch.zeros(3, dtype=torch.int64, device=device) for _ in "01")
        run(record.to(device), table[0], table[1], size, rows, positions, table[2])
        assert positions.tolist() == [41, 42, 43], "behind the root, whose place the first proposal had"
        if kept in block:
            first = n + block[kept] * size + 1
            assert rows.tolist() == [first, first + 1, first + 2] and table[2].tolist() == [start]
        else:
            assert table[2].tolist() == [-1] and all(n <= row < n + 2 * size for row in rows.tolist())
