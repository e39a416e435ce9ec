"""The rows of a pass go to the likeliest nodes of all trees, as one would hand them out who gives a row at a
time; the kernel's plan is the twin's, place by place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import examples
from interpreter import DEVICE

from orthrus_kernels.allot import allot, allot_triton
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import State
from orthrus_kernels.plan import PassPlan, PassShape

SLOTS, NAN, OUTSIDE = 8, float("nan"), 3  # rows of a pass behind its AR rows
WRITTEN = ("tokens", "positions", "parents", "sequences")
# What is above 0 counts as 0. Ties, both zeros, numbers without leading ones, neighbours, what is impossible.
SCORES = (1e-7, 0.0, -0.0, -1e-42, -0.5, -0.5, -1.0, -1.0000001, -2.0, -88.5, -3e38, float("-inf"))


def shared(scores, most, rows):
    """Nodes of each tree: one after another to the tree whose next node is the likeliest, of equal ones to
    the first. most: of each tree; 0 for an empty seat, which has no root either."""
    counts = [min(n, 1) for n in most]
    while sum(counts) < rows:
        following = [(min(scores[b][n], 0.0), -b) for b, n in enumerate(counts) if 0 < n < most[b]]
        if not following:
            break
        counts[-max(following)[1]] += 1
    return counts


def allotted(how, device, rows, trees, state, slots):
    """(first, columns of the plan by name) as lists; what is not written is -7."""
    columns = [torch.full((rows + OUTSIDE,), -7, dtype=dtype, device=device)
               for dtype in (torch.int64, torch.int64, torch.int32, torch.int32, torch.int32)]  # fmt: skip
    state, slots = (torch.tensor(t, dtype=torch.int32, device=device) for t in (state, slots))
    plan = PassPlan(PassShape(rows + OUTSIDE, rows, rows, 9, SLOTS), *columns, state[:, State.START])
    first = torch.full((len(slots) + 1,), -7, dtype=torch.int32, device=device)
    how(plan, first, Trees(*(t.to(device) for t in trees)), state, slots)
    return first.tolist(), {name: getattr(plan, name).tolist() for name in WRITTEN}


def random_trees(scores, seed):
    """Tensors of `Trees` of any structure with these scores [B][N]."""
    of, g = torch.tensor(scores), torch.Generator().manual_seed(seed)
    parents, depths = torch.full(of.shape, -1), torch.zeros(of.shape, dtype=torch.int64)
    for node in range(1, of.shape[1]):
        parents[:, node] = torch.randint(0, node, (len(of),), generator=g)
        depths[:, node] = 1 + depths.gather(1, parents[:, node : node + 1])[:, 0]
    return torch.randint(0, 90, of.shape, generator=g), parents.int(), depths.int(), of


@st.composite
def cases(draw):
    """(rows, trees, state, slots): trees of seats, some of them empty, in any order over more slots; texts
    may take some nodes alone. What belongs to nobody, and what a text may not take, is NaN."""
    seats, n = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    slots = draw(st.permutations(range(SLOTS)))[:seats]
    slots = [slot if draw(st.integers(0, 3)) else -1 for slot in slots]
    below = st.lists(
        st.one_of(st.sampled_from(SCORES), st.floats(-9, 0, width=32)), min_size=n - 1, max_size=n - 1
    )
    state = [[-5] * len(State)] * SLOTS
    scores = [[NAN] * n] * seats
    for b, slot in enumerate(slots):
        if slot >= 0:
            most = draw(st.sampled_from([0, 1, 2, n - 1, n, n + 1, 1 << 15]))
            state[slot] = [draw(st.integers(0, 90)), 7, 9, 0, 99, most]
            of = [0.0, *sorted(draw(below), reverse=True)]
            scores[b] = [score if j < max(most, 1) else NAN for j, score in enumerate(of)]
    rows = draw(st.one_of(st.just(seats), st.integers(seats, seats * n + 3)))
    return rows, random_trees(scores, draw(st.integers(0, 99))), state, slots


def check(case):
    """Twin and kernel against the definition; returns the nodes of each tree."""
    rows, (tokens, parents, depths, scores), state, slots = case
    most = [min(max(state[s][State.NODES], 1), tokens.shape[1]) if s >= 0 else 0 for s in slots]
    counts = shared(scores.tolist(), most, rows)
    first, plan = allotted(allot_triton, DEVICE, *case)
    assert (first, plan) == allotted(allot, "cpu", *case), "the twin"
    assert first == [sum(counts[:b]) for b in range(len(slots) + 1)]
    wanted = {name: [] for name in WRITTEN}
    for b, (slot, n) in enumerate(zip(slots, counts, strict=True)):
        wanted["tokens"] += tokens[b, :n].tolist()
        wanted["positions"] += [state[slot][State.START] + d for d in depths[b, :n].tolist()]
        wanted["parents"] += [p if p < 0 else first[b] + p for p in parents[b, :n].tolist()]
        wanted["sequences"] += [slot] * n
    assert {name: column[: first[-1]] for name, column in plan.items()} == wanted
    behind = {name: column[first[-1] :] for name, column in plan.items()}
    padding = [-1] * (rows - first[-1]) + [-7] * OUTSIDE
    assert behind == {name: [-7] * len(padding) for name in WRITTEN} | {"sequences": padding}
    return counts


@examples(100)
@given(case=cases())
def test_the_likeliest_nodes_of_all_texts(case):
    check(case)


@pytest.mark.parametrize("seats, n, rows", [(64, 64, 512), (256, 16, 512), (256, 64, 512), (1, 128, 128)])
def test_many_texts(seats, n, rows):
    """Every text has its root, and likely texts have the rows of unlikely ones."""
    steps = torch.randn(seats, n, generator=torch.Generator().manual_seed(seats)).abs()
    steps = steps * torch.linspace(0.01, 2, seats)[:, None]
    steps[:, 0] = 0.0
    state = [[s, 7, 9, 0, 999, 1 << 15] for s in range(seats)]
    counts = check((rows, random_trees((-steps.cumsum(1)).tolist(), 1), state, [*reversed(range(seats))]))
    assert sum(counts) == rows and min(counts) >= 1
    assert seats == 1 or counts[0] > 4 * counts[-1]


def test_equal_texts():
    """Rows that do not suffice for another node of every text go to the first seats."""
    state = [[0, 7, 9, 0, 99, 99]] * SLOTS
    trees = random_trees([[0.0, -1.0, -1.0, -2.0]] * 3, 1)
    for rows, counts in ((3, [1, 1, 1]), (4, [2, 1, 1]), (7, [3, 3, 1]), (10, [4, 3, 3]), (13, [4, 4, 4])):
        assert check((rows, trees, state, [4, 2, 6])) == counts


def test_more_texts_than_rows_are_refused():
    state = [[0, 7, 9, 0, 99, 99]] * SLOTS
    with pytest.raises(AssertionError):
        allotted(allot_triton, DEVICE, 2, random_trees([[0.0, -1.0]] * 3, 1), state, [0, 1, 2])
