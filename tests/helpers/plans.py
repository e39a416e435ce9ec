"""Plans of passes as hypothesis draws them, and tables for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import mixed_passes

from orthrus_kernels import PAGE, MaskedRows, Ops, Rows
from orthrus_kernels.backends import REFERENCE
from orthrus_kernels.pass_tables import PassTables
from orthrus_kernels.plan import PassPlan, PassShape

# Whole pages. A context ends in the first page of a segment or in a later one, at its edges more often.
CUTS = ((0, 64), (128, 128), (384, 256))
CAPACITY = 900


@st.composite
def passes(draw, max_start: int = 600) -> Rows:
    """A tree with blocks, or several in as many sequences, or a chain or block at the root."""
    count = draw(st.integers(1, 3))
    slots = draw(st.permutations(range(4)))[:count]
    return Rows.batch([draw(one_sequence(s, max_start)) for s in slots])


@st.composite
def one_sequence(draw, sequence: int, max_start: int) -> Rows:
    kind, start = draw(st.sampled_from(["mixed", "chain", "block"])), draw(starts(max_start))
    if kind == "chain":
        return Rows.chain([1] * draw(st.integers(1, 30) | st.integers(60, 200)), start, sequence)
    if kind == "block":
        return Rows.block(1, draw(st.integers(2, 20)), start, 96, sequence)
    return moved(draw(mixed_passes(sequence)), start)


def starts(most: int) -> st.SearchStrategy[int]:
    """Where a context may end: anywhere, and more often within 5 positions of a page's edge."""
    near = st.tuples(st.integers(0, most // PAGE), st.integers(-5, 5))
    return st.integers(0, most) | near.map(lambda at: min(max(at[0] * PAGE + at[1], 0), most))


def moved(rows: Rows, start: int) -> Rows:
    """The rows of one sequence on another context."""
    ((sequence, before),) = rows.contexts.items()
    return replace(rows, positions=[at - before + start for at in rows.positions], contexts={sequence: start})


@st.composite
def plans(draw, max_start: int = 600) -> PassPlan:
    """The plan of a pass, with rows of padding anywhere."""
    plan = PassPlan.of(draw(passes(max_start)))
    return padded(plan, draw(st.lists(st.integers(0, plan.shape.n_rows + 2), max_size=3)))


def padded(plan: PassPlan, places: list[int]) -> PassPlan:
    """With a row of padding before each of these rows, one by one, or behind the block that the row goes on
    with; it looks like the row before it."""
    for place in places:
        n = plan.shape.n_rows
        at, blocks = min(place, n), plan.blocks.tolist()
        while 0 < at < n and blocks[at] >= 0 and blocks[at] == blocks[at - 1]:
            at += 1
        order = torch.tensor([*range(at), max(at - 1, 0), *range(at, n)])
        moved = torch.tensor([i + (i >= at) for i in range(n)] + [-1], dtype=torch.int32)
        columns = {
            name: getattr(plan, name)[order] for name in ("tokens", "positions", "blocks", "sequences")
        }
        columns["sequences"][at] = -1
        n_ar = plan.shape.n_ar + (at <= plan.shape.n_ar)
        shape = replace(plan.shape, n_rows=n + 1, n_ar=n_ar)
        plan = replace(plan, shape=shape, parents=moved[plan.parents.long()][order], **columns)
    return plan


def tables_for(
    shape: PassShape,
    height: int,
    whole: bool = False,
    device: torch.device | str = "cpu",
    **how: Any,
) -> PassTables:
    """Tables of the toy cuts, every place filled with a number that no table holds. how: of
    `PassTables.new`."""
    tables = PassTables.new(shape, CAPACITY, height, whole, device, CUTS, **how)
    for name in ("rows", "limits", "tiles", "slots", "items", "count", "row_segments", "scratch"):
        getattr(tables, name).fill_(-77)
    return tables


def laid(
    rows: Rows, q: torch.Tensor, k: torch.Tensor, ops: Ops = REFERENCE, **how: Any
) -> PassTables | MaskedRows:
    """A backend's tables of a pass of queries q [T, H, D] and keys k [T, G, D], on their device. how: of
    `PassTables.new`, in place of what the backend takes."""
    plan = PassPlan.of(rows, q.device)
    heads, groups, d = q.shape[1], k.shape[1], q.shape[2]
    tables = ops.new_tables(plan.shape, max(rows.positions) + 1, heads, groups, d, q.dtype, q.device)
    if how:
        how = {"capacity": max(rows.positions) + 1, "device": q.device} | how
        tables = PassTables.new(plan.shape, **how)
    ops.lay(plan, tables)
    return tables
