"""The diffusion blocks of one-pass cycles: placed before the pass, followed behind it.

`place_blocks` stands between the trees that have got their rows (allot.py) and the tables of the pass: it
chooses the nodes of each tree that get a block (anchors.py) and writes the rows of the blocks; a program a
block, each of which ranks all nodes of its tree for itself. `follow` stands behind the walk: for each seat,
which block's rows draft what comes next, if there is one at the node where the walk has ended; a program a
seat.

A pass has rows of N nodes and A blocks for each of B seats. Behind the B N AR rows the A blocks of each seat
follow, seat behind seat."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .anchors import choose_anchors
from .grow import Trees
from .layout import (
    RECORD,
    RECORD_HEAD,
    RECORD_KEPT,
    STATE_COLUMNS,
    STATE_START,
    Record,
    State,
)
from .plan import PassPlan


def place_blocks(plan: PassPlan, first: Tensor, trees: Trees, slots: Tensor, anchors: Tensor) -> None:
    """Put the blocks of a plan, rows behind its AR rows, at the likeliest ends of the trees in those.

    first [B + 1] int32: rows [first[b], first[b + 1]) are the first nodes of tree b, as of `allot`. slots [B]
    int32: whose tree each is, -1: none. anchors [B, A] int32: takes the nodes of each tree, likeliest first,
    -1 where it has no more. Written of the blocks' rows, all of one size: positions, parents and sequences,
    and the first ones' tokens; a block without a node is padding."""
    n_ar, count = plan.shape.n_ar, anchors.shape[1]
    size = (plan.shape.n_rows - n_ar) // anchors.numel()
    rows = first.tolist()
    anchors.fill_(-1)
    plan.sequences[n_ar:] = -1
    for b, slot in enumerate(slots.tolist()):
        n = rows[b + 1] - rows[b]
        chosen = choose_anchors(trees.parents[b, :n].tolist(), trees.scores[b, :n].tolist(), count)
        begin, end = n_ar + b * count * size, n_ar + (b * count + len(chosen)) * size
        anchors[b, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        at = rows[b] + anchors[b, : len(chosen)].long()
        plan.tokens[begin:end:size] = plan.tokens[at]
        positions, parents = (t[begin:end].view(-1, size) for t in (plan.positions, plan.parents))
        positions.copy_(plan.positions[at][:, None] + torch.arange(size, device=at.device))
        parents.copy_(plan.parents[at][:, None])
        plan.sequences[begin:end] = slot


@triton.jit(do_not_specialize=["N", "N_AR", "SIZE"])
def _place_kernel(
    tokens, positions, parents, sequences, first, node_parents, node_scores, slots, anchors,
    N, N_AR, SIZE,
    NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a seat. Powers of two: NODES >= N, BLOCK >= SIZE."""
    i_b, i_a = tl.program_id(0), tl.program_id(1)
    i_block = i_b * tl.num_programs(1) + i_a
    o_n, o_r = tl.arange(0, NODES), tl.arange(0, BLOCK)
    slot, root = tl.load(slots + i_b), tl.load(first + i_b)
    n = tl.load(first + i_b + 1) - root
    node_parents, node_scores = node_parents + i_b * N, node_scores + i_b * N
    b_end = tl.exp(tl.load(node_scores + o_n, mask=o_n < n, other=float("-inf")))
    for node in range(1, n):
        b_end -= tl.where(o_n == tl.load(node_parents + node), tl.exp(tl.load(node_scores + node)), 0.0)
    b_end = tl.where(b_end > 0, b_end, 0.0)
    # Ranked as numbers of one tensor, as in rerank.py: bits of numbers not below 0 are in their order.
    b_key = ((0x7F800000 - b_end.to(tl.int32, bitcast=True)).to(tl.int64) << 16) | o_n
    b_key = tl.sort(tl.where(o_n < n, b_key, 0x7FFFFFFFFFFFFFFF))
    anchor = (tl.sum(tl.where(o_n == i_a, b_key, 0), axis=0) & 0xFFFF).to(tl.int32)
    begin = N_AR + i_block * SIZE
    is_there = i_a < n
    tl.store(anchors + i_block, tl.where(is_there, anchor, -1))
    tl.store(sequences + begin + o_r, tl.zeros((BLOCK,), tl.int32) + tl.where(is_there, slot, -1),
             mask=o_r < SIZE)  # fmt: skip
    if is_there:
        row = root + anchor
        tl.store(tokens + begin, tl.load(tokens + row))
        tl.store(positions + begin + o_r, tl.load(positions + row) + o_r, mask=o_r < SIZE)
        b_parent = tl.zeros((BLOCK,), tl.int32) + tl.load(parents + row)
        tl.store(parents + begin + o_r, b_parent, mask=o_r < SIZE)


def place_blocks_triton(plan: PassPlan, first: Tensor, trees: Trees, slots: Tensor, anchors: Tensor) -> None:
    """`place_blocks` as one launch."""
    n_ar, n = plan.shape.n_ar, trees.scores.shape[1]
    (seats, count), (size, rest) = anchors.shape, divmod(plan.shape.n_rows - n_ar, anchors.numel())
    assert rest == 0 and 0 < count <= n < 2**16 and n_ar == seats * n, (plan.shape, trees.scores.shape, count)
    assert len(slots) == seats == len(first) - 1 == len(trees.scores), (
        slots.shape,
        first.shape,
        anchors.shape,
    )
    whole = first, slots, anchors, trees.parents
    assert {t.dtype for t in whole} == {torch.int32}, [t.dtype for t in whole]
    assert all(t.is_contiguous() for t in (*whole, trees.scores)), [t.stride() for t in whole]
    _place_kernel[(seats, count)](
        tokens=plan.tokens, positions=plan.positions, parents=plan.parents, sequences=plan.sequences,
        first=first, node_parents=trees.parents, node_scores=trees.scores, slots=slots, anchors=anchors,
        N=n, N_AR=n_ar, SIZE=size, NODES=triton.next_power_of_2(n), BLOCK=triton.next_power_of_2(size),
        num_warps=1,
    )  # fmt: skip


def follow(
    record: Tensor, state: Tensor, slots: Tensor, anchors: Tensor, size: int, rows: Tensor,
    positions: Tensor, drafted: Tensor,
) -> None:  # fmt: skip
    """Which rows of the pass draft the tree behind each walk that `walk` has recorded.

    record int32 [B, RECORD + 3 N], state int32 [S, columns of layout.State], slots [B] int32: those of
    `walk`. anchors [B, A] int32: of `place_blocks`, blocks of `size` rows. Written: rows [B, P] int64, those
    rows, and positions [B, P] int64, what their proposals take; of an empty seat any rows. drafted [S + 1]
    int32: for each text where the root of that tree stands, -1 without a block there, when any rows are
    written."""
    (seats, count), n = anchors.shape, (record.shape[1] - RECORD) // 3
    behind = 1 + torch.arange(rows.shape[1], device=rows.device)  # row 0's proposal is the bonus token's
    for b, slot in enumerate(slots.tolist()):
        kept, start = int(record[b, Record.KEPT]), 0 if slot < 0 else int(state[slot, State.START])
        end = int(record[b, RECORD + 2 * n + max(kept - 1, 0)])
        found = slot >= 0 and kept > 0 and end in anchors[b].tolist()
        block = anchors[b].tolist().index(end) if found else 0
        rows[b] = seats * n + (b * count + block) * size + behind
        positions[b] = start + behind
        if slot >= 0:
            drafted[slot] = start if found else -1


@triton.jit(do_not_specialize=["N", "SIZE", "ANCHORS", "ROWS"])
def _follow_kernel(
    record, state, slots, anchors, rows, positions, drafted,
    N, SIZE, ANCHORS, ROWS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One seat. BLOCK >= ANCHORS and ROWS, a power of two."""
    i_b, o = tl.program_id(0), tl.arange(0, BLOCK)
    record += i_b * (RECORD_HEAD + 3 * N)
    slot, kept = tl.load(slots + i_b), tl.load(record + RECORD_KEPT)
    start = tl.load(state + slot * STATE_COLUMNS + STATE_START, mask=slot >= 0, other=0)
    end = tl.load(record + RECORD_HEAD + 2 * N + tl.maximum(kept - 1, 0))
    b_anchor = tl.load(anchors + i_b * ANCHORS + o, mask=o < ANCHORS, other=-1)
    block = tl.min(tl.where(b_anchor == end, o, BLOCK))
    found = (block < BLOCK) & (kept > 0) & (slot >= 0)
    # row 0's proposal stands in the bonus token's place
    begin = tl.num_programs(0) * N + (i_b * ANCHORS + tl.where(found, block, 0)) * SIZE + 1
    tl.store(rows + i_b * ROWS + o, (begin + o).to(tl.int64), mask=o < ROWS)
    tl.store(positions + i_b * ROWS + o, (start + 1 + o).to(tl.int64), mask=o < ROWS)
    tl.store(drafted + slot, tl.where(found, start, -1), mask=slot >= 0)


def follow_triton(
    record: Tensor, state: Tensor, slots: Tensor, anchors: Tensor, size: int, rows: Tensor,
    positions: Tensor, drafted: Tensor,
) -> None:  # fmt: skip
    """`follow` as one launch."""
    (seats, count), n = anchors.shape, (record.shape[1] - RECORD) // 3
    assert rows.shape == positions.shape and rows.shape[1] <= size - 2, (rows.shape, positions.shape, size)
    assert len(record) == len(slots) == len(rows) == seats, (record.shape, slots.shape, rows.shape)
    assert state.shape[1] == len(State) and len(drafted) == len(state) + 1, (state.shape, drafted.shape)
    numbers = record, state, slots, anchors, drafted
    assert {t.dtype for t in numbers} == {torch.int32}, "int32 tables"
    assert {rows.dtype, positions.dtype} == {torch.int64}, (rows.dtype, positions.dtype)
    assert all(t.is_contiguous() for t in (*numbers, rows, positions)), [t.stride() for t in numbers]
    _follow_kernel[(seats,)](
        record=record, state=state, slots=slots, anchors=anchors, rows=rows, positions=positions,
        drafted=drafted, N=n, SIZE=size, ANCHORS=count, ROWS=rows.shape[1],
        BLOCK=triton.next_power_of_2(max(count, rows.shape[1])), num_warps=1,
    )  # fmt: skip
