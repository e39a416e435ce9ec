"""Blocks of a one-pass cycle, placed and followed on the device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from test_grow import CUTS, distributions

from orthrus_kernels import Rows, draft_tree, end_probabilities, unpack, visible
from orthrus_kernels.blocks_triton import follow_triton, place_blocks_triton
from orthrus_kernels.grow_triton import grow_triton, tree_tables
from orthrus_kernels.layout import RECORD

MASK = 96


def placed(nodes, scores, ids, start, tile_rows, count, size, room=200):
    """Twice in the same tables: nothing of the pass before is left."""
    device = torch.device(DEVICE)
    tables = tree_tables(nodes, len(scores), tile_rows, room, device, CUTS, count, size, MASK)
    anchors = torch.full((count,), -1, dtype=torch.int32, device=device)
    for at, sharp in ((3, -scores.flip(0).sort(-1, descending=True).values), (start, scores)):
        state = torch.tensor([at, 7, 9, 0], dtype=torch.int32, device=device)
        grow_triton(tables, state, sharp.contiguous().to(device), ids.to(device))
        place_blocks_triton(tables, state, anchors)
    return tables, anchors.tolist()


@examples(15)
@given(
    depth=st.integers(1, 7), width=st.integers(2, 5), nodes=st.integers(1, 25), seed=st.integers(0, 10**6),
    start=st.integers(0, 140), tile_rows=st.sampled_from([4, 16]), share=st.floats(0, 1),
    size=st.integers(3, 9), sharp=st.sampled_from([0.3, 1.0, 5.0]),
)  # fmt: skip
def test_the_pass_of_the_twins(depth, width, nodes, seed, start, tile_rows, share, size, sharp):
    """Every row of every view sees what the one definition says, and each of its keys once."""
    nodes = min(nodes, depth * width)
    scores, ids = distributions(depth, width, seed, sharp)
    count = 1 + int(share * nodes)
    tables, anchors = placed(nodes, scores, ids, start, tile_rows, count, size)
    tree = draft_tree(7, scores, ids, nodes)
    assert tables.scores.cpu() == pytest.approx(tree.scores, abs=1e-6)
    rows = Rows.tree_with_blocks(tree.tokens, tree.parents, start, anchors, size, MASK)
    assert tables.ids.tolist() == [rows.tokens, rows.positions] and tables.parents.tolist() == tree.parents
    ends = end_probabilities(tree.parents, tree.scores)
    best = sorted(ends, reverse=True)[:count]
    assert len(set(anchors)) == count and [ends[a] for a in anchors] == pytest.approx(best, abs=1e-6)

    packed = tables.packed.on(torch.device("cpu"))
    assert torch.equal(unpack(packed), visible(rows))
    listed = [(t, s) for t, s in packed.items.tolist() if t >= 0]
    assert len(set(listed)) == len(listed)
    bounds = packed.segments.tolist()
    keys: dict[int, list[int]] = {row: [] for row in range(len(rows))}
    for tile, segment in listed:
        assert tile < packed.path_tiles or bounds[segment + 1] <= start, "context tiles end with the context"
        for row, limit in zip(packed.rows[tile].tolist(), packed.limits[tile].tolist(), strict=True):
            if row >= 0:
                reach = limit if tile < packed.path_tiles else start
                keys[row] += range(bounds[segment], min(bounds[segment + 1], reach))
    for row, (found, parent, block) in enumerate(zip(keys.values(), rows.parents, rows.blocks, strict=True)):
        behind = len(rows.ancestors(row)) + (1 if block < 0 else size)
        assert sorted(found) == list(range(start + behind)), (row, parent)
        assert packed.row_segments[row] == sum(first < start + behind for first in bounds[:-1])


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_block_where_the_walk_ended(kept):
    n, size, start = 6, 5, 40
    record = torch.zeros(RECORD + 3 * n, dtype=torch.int32)
    record[0] = kept
    record[RECORD + 2 * n :][:3] = torch.tensor([0, 2, 4])
    for anchors, block in (([4, 0], {1: 1, 3: 0}), ([1, 3], {})):
        table = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([start, 9, 9, 0], anchors, [7])]
        rows, positions = (torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in "01")
        follow_triton(record.to(DEVICE), table[0], table[1], size, rows, positions, table[2])
        assert positions.tolist() == [41, 42, 43], "behind the root, whose place the first proposal had"
        if kept in block:
            first = n + block[kept] * size + 1
            assert rows.tolist() == [first, first + 1, first + 2] and table[2].tolist() == [start]
        else:
            assert table[2].tolist() == [-1] and all(n <= row < n + 2 * size for row in rows.tolist())
