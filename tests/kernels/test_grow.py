"""The tree grown on the device, and the tables of its pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels import Rows, draft_tree, unpack, visible
from orthrus_kernels.grow_triton import grow_triton, plant, tree_tables

CUTS = ((0, 16), (64, 32))


def distributions(depth, width, seed, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(depth, width, generator=generator)
    scores = logits.sort(-1, descending=True).values.log_softmax(-1)
    return scores, torch.randint(0, 90, (depth, width), generator=generator)


def grown(nodes, scores, ids, start, root, tile_rows, room=160):
    """Twice from the same tables: nothing of the tree before is left."""
    tables = tree_tables(nodes, len(scores), tile_rows, room, torch.device(DEVICE), CUTS)
    for at, sharp in ((3, -scores.flip(0).sort(-1, descending=True).values), (start, scores)):
        state = torch.tensor([at, root, 9, 0], dtype=torch.int32, device=DEVICE)
        grow_triton(tables, state, sharp.contiguous().to(DEVICE), ids.to(DEVICE))
    return tables


@examples(15)
@given(
    depth=st.integers(1, 9), width=st.integers(2, 5), nodes=st.integers(1, 40), seed=st.integers(0, 10**6),
    start=st.integers(0, 140), tile_rows=st.sampled_from([4, 16]), sharp=st.sampled_from([0.3, 1.0, 5.0]),
)  # fmt: skip
def test_the_twins_tree_and_tables(depth, width, nodes, seed, start, tile_rows, sharp):
    nodes = min(nodes, depth * width)  # at least so many paths
    scores, ids = distributions(depth, width, seed, sharp)
    tables = grown(nodes, scores, ids, start, 7, tile_rows)
    tree = draft_tree(7, scores, ids, nodes)
    rows = Rows.tree(tree.tokens, tree.parents, start)
    assert tables.ids.tolist() == [rows.tokens, rows.positions] and tables.parents.tolist() == tree.parents
    twin = tree_tables(nodes, depth, tile_rows, 160, torch.device("cpu"), CUTS)
    plant(twin, tree, start)
    used = int((twin.packed.rows[: nodes + 1, 0] >= 0).sum())
    for name in ("rows", "limits", "items", "row_segments"):
        assert torch.equal(getattr(tables.packed, name).cpu(), getattr(twin.packed, name)), name
    for part in (slice(0, used), slice(nodes + 1, None)):
        assert torch.equal(tables.packed.tiles[part].cpu(), twin.packed.tiles[part])
    there = tables.packed.on(torch.device("cpu"))
    assert torch.equal(unpack(there), visible(rows))
    listed = [(t, s) for t, s in there.items.tolist() if t >= 0]
    assert len(set(listed)) == len(listed)
    for tile in range(len(there.tiles)):  # every key of every tile, once
        context, end = there.tiles[tile, 1:3].tolist()
        mine = sorted(s for t, s in listed if t == tile)
        covers = [p for s in mine for p in range(*there.segments[s : s + 2].tolist())]
        whole = [p for p in covers if p < context] if tile > nodes else covers
        if tile > nodes:
            assert whole == covers
        elif tile < used:
            inside = there.segments[mine[0]].item()
            assert (
                inside <= context and covers == list(range(inside, covers[-1] + 1)) and covers[-1] >= end - 1
            )
        else:
            assert not mine


@pytest.mark.parametrize("possible", [0, 1, 2])
@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_nodes_that_are_not_possible(possible, nothing):
    """Filtered or damaged candidates: the tables are of some tree all the same, each row in one place."""
    scores, ids = distributions(4, 4, 1)
    scores[:, possible:] = nothing
    tables = grown(20, scores, ids, 30, 7, 4)
    tokens, parents = tables.ids[0].tolist(), tables.parents.tolist()
    rows = Rows.tree(tokens, parents, 30)
    assert tables.ids[1].tolist() == rows.positions
    assert torch.equal(unpack(tables.packed.on(torch.device("cpu"))), visible(rows))
    if possible and nothing < 0:
        tree = draft_tree(7, scores[:, :possible], ids[:, :possible], 20)
        assert tokens[: len(tree)] == tree.tokens and parents[: len(tree)] == tree.parents


def test_what_has_no_tables():
    for nodes, depth in ((0, 3), (5000, 3), (4, 0), (4, 64)):
        with pytest.raises(ValueError, match="nodes and"):
            tree_tables(nodes, depth, 16, 100, torch.device("cpu"))
