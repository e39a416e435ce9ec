"""Trees grown, put into the rows of a pass, and blocks placed beside them, on the device: the plan is the
twin's, and its pass sees what it should."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE
from plans import tables_for

from orthrus_kernels import PassPlan, PassShape, Rows, draft_tree, end_probabilities, unpack, visible
from orthrus_kernels.allot import allot, allot_triton
from orthrus_kernels.blocks import follow, follow_triton, place_blocks, place_blocks_triton
from orthrus_kernels.grow import Trees, grow, grow_triton
from orthrus_kernels.lay import lay
from orthrus_kernels.lay_triton import lay_triton
from orthrus_kernels.layout import RECORD, State

MASK = 96


def distributions(depth, width, seed, sharp=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(depth, width, generator=generator)
    scores = logits.sort(-1, descending=True).values.log_softmax(-1)
    return scores, torch.randint(0, 90, (depth, width), generator=generator)


def plan_of(rows, depth, state, slots, blocks=0, size=0):
    """A plan of AR rows for trees whose nodes are `depth` below their roots at most, and of blocks; filled
    with what nothing has."""
    blocks *= len(slots)
    nobody = Rows.tree_with_blocks([-7] * rows, [-1] + [0] * (rows - 1), 0, [0] * blocks, size, MASK)
    plan = PassPlan.of(nobody).on(state.device)
    shape = PassShape(len(nobody), rows, rows + blocks, depth + 1 + size, len(state))
    for column in (plan.positions, plan.parents, plan.sequences):
        column.fill_(-7)
    return replace(plan, shape=shape, start=state[:, State.START])


def grown(
    nodes, draws, states, tile_rows, device=DEVICE, run=grow_triton, blocks=0, size=0, slots=None, rows=None
):  # fmt: skip
    """(plan, trees, first, tables, anchors): twice in the same tensors, so that nothing of the pass before is
    left. draws: scores and ids of each seat. rows: AR rows of the pass; without them every tree has its.
    blocks: of each seat; anchors are theirs."""
    twin, seats = run is grow, len(draws)
    state = torch.tensor(states, dtype=torch.int32, device=device)
    slots = torch.tensor(slots or [*range(seats)], dtype=torch.int32, device=device)
    plan = plan_of(rows or seats * (nodes + 1), len(draws[0][0]), state, slots, blocks, size)
    trees, first = Trees.new(seats, nodes + 1, device), slots.new_zeros(seats + 1)
    tables = tables_for(plan.shape, tile_rows, device=device)
    anchors = torch.full((seats, blocks), -7, dtype=torch.int32, device=device)
    log_probabilities, ids = (torch.stack(parts) for parts in zip(*draws, strict=True))
    other = -log_probabilities.flip(1).sort(-1, descending=True).values
    other = other - other[..., :1]  # not above 0
    at = state[:, State.START].clone()
    for start, sharp in ((torch.full_like(at, 3), other), (at, log_probabilities)):
        state[:, State.START] = start
        run(trees, state, slots, sharp.contiguous().to(device), ids.to(device))
        (allot if twin else allot_triton)(plan, first, trees, state, slots)
        if blocks:
            place = place_blocks if twin else place_blocks_triton
            place(plan, first, trees, slots, anchors)
        (lay if twin else lay_triton)(plan, tables)
    return plan, trees, first.tolist(), tables, anchors.tolist()


def assert_same(got, want):
    """Plans or trees: every place of every tensor."""
    for f in fields(got):
        if isinstance(getattr(got, f.name), torch.Tensor):
            assert torch.equal(getattr(got, f.name).cpu(), getattr(want, f.name)), f.name


def assert_sees(plan, tables):
    """Every row of every view sees what the one definition says, and each of its keys in one item."""
    rows, seen = plan.rows(), unpack(tables).cpu()
    used = (plan.sequences >= 0).nonzero().flatten().tolist()
    assert torch.equal(seen[used][:, used], visible(rows)) and seen.sum() == visible(rows).sum()
    edges, items = tables.segments.tolist(), tables.items[: tables.count].tolist()
    keys: dict[int, list[int]] = {row: [] for row in used}
    for tile, segment in items:
        for row, limit in zip(tables.rows[tile].tolist(), tables.limits[tile].tolist(), strict=True):
            if row >= 0:
                keys[row] += range(edges[segment], min(edges[segment + 1], limit))
    below = visible(rows).sum(1).tolist()
    for i, (row, found) in enumerate(keys.items()):
        end = rows.contexts[rows.sequences[i]] + below[i]
        assert sorted(found) == list(range(end)), row
        assert tables.row_segments[row].tolist() == [0, sum(first < end for first in edges[:-1])]


@examples(20)
@given(
    depth=st.integers(1, 9), width=st.integers(2, 5), nodes=st.integers(1, 40), seed=st.integers(0, 10**6),
    starts=st.lists(st.integers(0, 140), min_size=1, max_size=3), tile_rows=st.sampled_from([4, 16]),
    sharp=st.sampled_from([0.3, 1.0, 5.0]), slots=st.permutations(range(4)), share=st.floats(0, 1),
    empty=st.sampled_from([0, 0, 1, 2, 3]), most=st.lists(st.integers(1, 50), min_size=3, max_size=3),
)  # fmt: skip
def test_the_twins_tree(depth, width, nodes, seed, starts, tile_rows, sharp, slots, share, empty, most):
    """Of every seat. In the rows of the pass, which all seats share, stand its first nodes: the tree of so
    many nodes. A seat may be empty, and a slot without a seat."""
    nodes = min(nodes, depth * width)  # at least so many paths
    draws = [distributions(depth, width, seed + b, sharp) for b in range(len(starts))]
    states, slots = [[5] * len(State) for _ in range(4)], slots[: len(starts)]
    for b, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        states[slot] = [start, 7 + b, 9, 0, 999, most[b]]
    if empty < len(slots):
        slots[empty], draws[empty] = -1, (torch.full((depth, width), float("nan")), draws[empty][1] * 0 - 1)
    rows = len(slots) + round(share * len(slots) * nodes)
    how = {"slots": slots, "rows": rows}
    plan, trees, first, tables, _ = grown(nodes, draws, states, tile_rows, **how)
    singles = []
    for b, (slot, draw) in enumerate(zip(slots, draws, strict=True)):
        if slot < 0:
            assert trees.scores[b].tolist() == [0.0] + [float("-inf")] * nodes, "as it was"
            continue
        tree = draft_tree(7 + b, *draw, nodes)
        assert trees.tokens[b].tolist() == tree.tokens and trees.parents[b].tolist() == tree.parents
        assert trees.depths[b].tolist() == tree.depths and trees.scores[b].tolist() == tree.scores
        smaller = draft_tree(7 + b, *draw, first[b + 1] - first[b] - 1)
        assert len(smaller) <= most[b]
        singles.append(Rows.tree(smaller.tokens, smaller.parents, starts[b], slot))
    possible = sum(min(nodes + 1, m) for m, slot in zip(most, slots, strict=False) if slot >= 0)
    assert first[-1] == min(possible, rows), "no row is left where a node could stand"
    if singles:
        assert plan.rows() == Rows.batch(singles)
        assert_sees(plan, tables)
    twin, twins_trees, twins_first, *_ = grown(nodes, draws, states, tile_rows, "cpu", grow, **how)
    assert_same(plan, twin)
    assert_same(trees, twins_trees)
    assert first == twins_first


@examples(15)
@given(
    depth=st.integers(1, 7), width=st.integers(2, 5), nodes=st.integers(1, 25), seed=st.integers(0, 10**6),
    starts=st.lists(st.integers(0, 140), min_size=1, max_size=3), tile_rows=st.sampled_from([4, 16]),
    share=st.floats(0, 1), size=st.integers(3, 9), sharp=st.sampled_from([0.3, 1.0, 5.0]),
    slots=st.permutations(range(4)), empty=st.sampled_from([0, 1, 2, 3, 3]),
    most=st.lists(st.integers(1, 30), min_size=3, max_size=3),
)  # fmt: skip
def test_blocks_at_the_likeliest_ends(
    depth, width, nodes, seed, starts, tile_rows, share, size, sharp, slots, empty, most
):  # fmt: skip
    """Of the tree of each seat, however small it is; beside an empty seat whose tree is not a number."""
    nodes = min(nodes, depth * width)
    draws = [distributions(depth, width, seed + b, sharp) for b in range(len(starts))]
    count, states, slots = 1 + int(share * nodes), [[5] * len(State) for _ in range(4)], slots[: len(starts)]
    for b, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        states[slot] = [start, 7 + b, 9, 0, 999, most[b]]
    if empty < len(slots):
        slots[empty], draws[empty] = -1, (torch.full((depth, width), float("nan")), draws[empty][1] * 0 - 1)
    plans = []
    for device, run in ((DEVICE, grow_triton), ("cpu", grow)):
        plan, *_, tables, anchors = grown(
            nodes, draws, states, tile_rows, device, run, count, size, slots=slots
        )
        singles = []
        for b, slot in enumerate(slots):
            if slot < 0:
                assert anchors[b] == [-1] * count
                continue
            tree = draft_tree(7 + b, *draws[b], min(nodes, most[b] - 1))
            ends = end_probabilities(tree.parents, tree.scores)
            best, found = sorted(ends, reverse=True)[:count], anchors[b][: len(tree)]
            assert len(set(found)) == len(found) and set(anchors[b][len(tree) :]) <= {-1}
            assert [ends[a] for a in found] == pytest.approx(best, abs=1e-6)
            tree = tree.tokens, tree.parents, starts[b], found, size, MASK, slot
            singles.append(Rows.tree_with_blocks(*tree))
        if singles:
            assert by_block(plan.rows()) == by_block(Rows.batch(singles))
            assert_sees(plan, tables)
        plans.append(plan)
    assert torch.equal(plans[0].sequences.cpu(), plans[1].sequences)


def by_block(rows):
    """Rows with their blocks numbered in their order."""
    numbers = {block: i for i, block in enumerate(dict.fromkeys(rows.blocks))}
    return replace(rows, blocks=[numbers[block] for block in rows.blocks])


@examples(30)
@given(depth=st.integers(1, 4), width=st.integers(1, 4), nodes=st.integers(1, 60), seed=st.integers(0, 10**6),
       ordered=st.booleans(), chain=st.booleans())  # fmt: skip
@example(depth=4, width=2, nodes=40, seed=0, ordered=False, chain=False)  # more than all 30 paths
@example(depth=4, width=2, nodes=40, seed=1, ordered=True, chain=False)
def test_equal_scores_and_more_nodes_than_paths(depth, width, nodes, seed, ordered, chain):
    """The first place of equals that became known is taken, siblings before children; and where nothing is
    left, the root's likeliest child comes again."""
    generator = torch.Generator().manual_seed(seed)
    shape = (depth, width, width) if ordered else (depth, width)
    scores = -torch.randint(0, 4, shape, generator=generator).float().sort(-1).values
    scores = torch.where(scores < -2, float("-inf"), scores)
    order = torch.rand(shape, generator=generator).argsort(-1).int()[None] if ordered else None
    ids = torch.arange(depth * width).view(1, depth, width)
    state, slots = (torch.tensor(of, dtype=torch.int32) for of in ([[30, 7, 9, 0, 999, 99]], [0]))
    ours, twins = (Trees.new(1, nodes + 1, device) for device in (DEVICE, "cpu"))
    grow(twins, state, slots, scores[None], ids, order, chain=chain)
    given_ = (None if of is None else of.to(DEVICE) for of in (state, slots, scores[None], ids, order))
    grow_triton(ours, *given_, chain=chain)
    assert_same(ours, twins)


@pytest.mark.parametrize("possible", [0, 1, 2])
@pytest.mark.parametrize("nothing", [float("-inf"), float("nan")])
def test_nodes_that_are_not_possible(possible, nothing):
    """Filtered or damaged candidates: the rows are of some tree all the same, the twin's too."""
    scores, ids = distributions(4, 4, 1)
    scores[:, possible:] = nothing
    drawn = 20, [(scores, ids)], [[30, 7, 9, 0, 999, 99]], 4
    plan, trees, _, tables, _ = grown(*drawn)
    assert_sees(plan, tables)
    twin, twins_trees, *_ = grown(*drawn, "cpu", grow)
    assert_same(plan, twin)
    assert_same(trees, twins_trees)
    assert plan.sequences.tolist() == [0] * 21 and not trees.scores.isnan().any()
    if possible:
        tree = draft_tree(7, scores[:, :possible], ids[:, :possible], 20)
        rows = plan.rows()
        assert rows.tokens[: len(tree)] == tree.tokens and rows.parents[: len(tree)] == tree.parents


def test_impossible_nodes_take_the_rows_that_nobody_wants():
    """A text that has no more than its root and one child leaves its rows to another."""
    scores, ids = distributions(4, 4, 1)
    few = torch.full_like(scores, float("nan"))
    few[0, 0] = 0.0
    states = [[30, 7, 9, 0, 999, 99], [90, 8, 9, 0, 999, 99]]
    for rows, counts in ((10, [2, 8]), (22, [6, 16])):
        plan, trees, first, tables, _ = grown(15, [(few, ids), (scores, ids)], states, 4, rows=rows)
        assert [b - a for a, b in pairwise(first)] == counts and trees.scores[0, 1] == 0.0
        assert_sees(plan, tables)


@pytest.mark.parametrize("run, device", [(grow_triton, DEVICE), (grow, "cpu")])
@pytest.mark.parametrize("depth, possible", [(1, 1), (7, 7), (255, 255), (7, 3)])
def test_a_chain(depth, possible, run, device):
    """The likeliest child of each node, down to where candidates are impossible; leaves behind."""
    scores, ids = distributions(depth, 4, 2)
    scores[possible:] = float("nan")
    state = torch.tensor([[30, 7, 9, 0, 999, 99]], dtype=torch.int32, device=device)
    trees, slots = Trees.new(1, depth + 1, device), torch.zeros(1, dtype=torch.int32, device=device)
    run(trees, state, slots, scores[None].to(device), ids[None].to(device), chain=True)
    again = depth - possible
    assert trees.tokens[0].tolist() == [7, *ids[:possible, 0].tolist(), *[int(ids[0, 0])] * again]
    assert trees.parents[0].tolist() == [*range(-1, possible), *[0] * again]
    assert trees.scores[0, possible].item() == pytest.approx(scores[:possible, 0].sum().item(), rel=1e-5)
    assert torch.isneginf(trees.scores[0, possible + 1 :]).all()


@pytest.mark.parametrize("depth, nodes, width", [(7, 7, 4), (31, 31, 16), (5, 9, 3), (6, 3, 5)])
def test_chains_of_ranked_candidates(depth, nodes, width):
    """Of several seats, one of them empty, as the twin grows them: where nothing is possible behind a node,
    where the chain has room for more positions than there are, and for fewer."""
    generator = torch.Generator().manual_seed(depth)
    scores = -torch.rand(3, depth, width, width, generator=generator)
    scores[2, depth // 2 :, 1:] = float("nan")  # unless the first candidate stands in front
    order = torch.rand(scores.shape, generator=generator).argsort(-1).int()
    ids = torch.arange(3 * depth * width).view(3, depth, width) + 100
    state = torch.tensor([[30, 7 + s, 9, 0, 999, 99] for s in range(4)], dtype=torch.int32)
    made = []
    for run, device in ((grow_triton, DEVICE), (grow, "cpu")):
        trees = Trees.new(3, nodes + 1, device)
        trees.tokens.fill_(5)
        slots = torch.tensor([3, -1, 0], dtype=torch.int32)
        given = (t.to(device) for t in (state, slots, scores, ids, order))
        run(trees, *given, chain=True)
        made.append(trees)
    assert_same(*made)
    assert made[0].tokens[1].tolist() == [5] * (nodes + 1) and made[0].tokens[:, 0].tolist() == [10, 5, 7]
    assert made[0].parents[0, : min(depth, nodes) + 1].tolist() == list(range(-1, min(depth, nodes)))


@pytest.mark.parametrize("nodes, depth, seats", [(5, 256, 1), (40000, 3, 1), (5, 3, 2)])
def test_what_is_not_grown(nodes, depth, seats):
    """Nodes too deep, too many nodes, candidates of fewer texts than seats."""
    scores, state = torch.zeros(1, depth, 2, device=DEVICE), torch.zeros(1, len(State), device=DEVICE).int()
    slots = torch.zeros(seats, dtype=torch.int32, device=DEVICE)
    with pytest.raises(AssertionError):
        grow_triton(Trees.new(seats, nodes + 1, DEVICE), state, slots, scores, scores.long())


@pytest.mark.parametrize("run, device", [(follow_triton, DEVICE), (follow, "cpu")])
def test_the_block_where_each_walk_ended(run, device):
    """Of five seats, the fourth one empty: no other text's draft is touched. The walks end at nodes 2, 4, at
    one without a block, and nowhere."""
    n, size, seats = 6, 5, 5
    record = torch.full((seats, RECORD + 3 * n), -9, dtype=torch.int32)
    record[:, 0] = torch.tensor([2, 3, 3, 1, 0])  # kept
    record[:, RECORD + 2 * n :][:, :3] = torch.tensor([0, 2, 4])
    state = [[40 + 10 * slot, 9, 9, 0, 99, 9] for slot in range(7)]
    anchors, drafted = [[4, 2], [4, -1], [1, 3], [0, 1], [0, 4]], [-3] * 8
    slots, kept = [5, 0, 3, -1, 2], [0, 1, 2, 4]  # seats with a text
    record, state, anchors, slots, drafted = (
        torch.tensor(t, dtype=torch.int32, device=device)
        for t in (record.tolist(), state, anchors, slots, drafted)
    )
    rows, positions = (torch.full((seats, 3), -7, dtype=torch.int64, device=device) for _ in "01")
    run(record, state, slots, anchors, size, rows, positions, drafted)
    assert drafted.tolist() == [40, -3, -1, -1, -3, 90, -3, -3]
    behind, block = [41, 42, 43], [30 + size * i for i in range(2 * seats)]
    assert positions[kept].tolist() == [[at - 40 + x for x in behind] for at in (90, 40, 70, 60)]
    assert rows[0].tolist() == [block[1] + x for x in (1, 2, 3)]
    assert rows[1].tolist() == [block[2] + x for x in (1, 2, 3)]
    assert rows.min() >= 0 and rows.max() < block[-1] + size
