"""The diffusion blocks of a one-pass cycle: placed before the pass, followed behind it.

`place_blocks` stands between the tree that `grow` has grown and the tables of the pass: it chooses the nodes
that get a block (anchors.py) and writes the rows of the blocks; a program a block, each of which ranks all
nodes for itself. `follow` stands behind the walk: which block's rows draft what comes next, if there is one
at the node where the walk has ended."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .anchors import choose_anchors
from .layout import RECORD, RECORD_HEAD, RECORD_KEPT, STATE_START, Record, State
from .plan import PassPlan


def place_blocks(plan: PassPlan, scores: Tensor, anchors: Tensor) -> None:
    """Put the blocks of a plan, rows behind its N AR rows, at the likeliest ends of the tree in those.

    scores [N] fp32: of `grow`, for one sequence. anchors [A] int32: takes the nodes, likeliest first.
    Written: positions and parents of the blocks' rows, all of one size, and their first rows' tokens."""
    n, size = len(scores), (plan.shape.n_rows - plan.shape.n_ar) // len(anchors)
    chosen = choose_anchors(plan.parents[:n].tolist(), scores.tolist(), len(anchors))
    anchors.copy_(torch.tensor(chosen, dtype=torch.int32))
    positions, parents = (t[n:].view(-1, size) for t in (plan.positions, plan.parents))
    at = anchors.long()
    plan.tokens[n::size] = plan.tokens[at]
    positions.copy_(plan.positions[at][:, None] + torch.arange(size, device=at.device))
    parents.copy_(plan.parents[at][:, None])


@triton.jit(do_not_specialize=["N", "SIZE"])
def _place_kernel(
    tokens, positions, parents, scores, anchors,
    N, SIZE,
    NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block. Powers of two: NODES >= N, BLOCK >= SIZE."""
    i_block = tl.program_id(0)
    o_n, o_r = tl.arange(0, NODES), tl.arange(0, BLOCK)
    b_end = tl.exp(tl.load(scores + o_n, mask=o_n < N, other=float("-inf")))
    for node in range(1, N):
        b_end -= tl.where(o_n == tl.load(parents + node), tl.exp(tl.load(scores + node)), 0.0)
    b_end = tl.where(b_end > 0, b_end, 0.0)
    # Ranked as numbers of one tensor, as in rerank.py: bits of numbers not below 0 are in their order.
    b_key = ((0x7F800000 - b_end.to(tl.int32, bitcast=True)).to(tl.int64) << 16) | o_n
    b_key = tl.sort(tl.where(o_n < N, b_key, 0x7FFFFFFFFFFFFFFF))
    anchor = (tl.sum(tl.where(o_n == i_block, b_key, 0), axis=0) & 0xFFFF).to(tl.int32)
    tl.store(anchors + i_block, anchor)
    first = N + i_block * SIZE
    tl.store(tokens + first, tl.load(tokens + anchor))
    tl.store(positions + first + o_r, tl.load(positions + anchor) + o_r, mask=o_r < SIZE)
    b_parent = tl.zeros((BLOCK,), tl.int32) + tl.load(parents + anchor)
    tl.store(parents + first + o_r, b_parent, mask=o_r < SIZE)


def place_blocks_triton(plan: PassPlan, scores: Tensor, anchors: Tensor) -> None:
    """`place_blocks` as one launch."""
    n, count = plan.shape.n_ar, len(anchors)
    size, rest = divmod(plan.shape.n_rows - n, count)
    assert rest == 0 and 0 < count <= n < 2**16 and len(scores) == n, (plan.shape, len(scores), count)
    assert anchors.dtype == torch.int32 and scores.dtype == torch.float32, (anchors.dtype, scores.dtype)
    _place_kernel[(count,)](
        tokens=plan.tokens, positions=plan.positions, parents=plan.parents, scores=scores, anchors=anchors,
        N=n, SIZE=size, NODES=triton.next_power_of_2(n), BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip


def follow(
    record: Tensor, state: Tensor, anchors: Tensor, size: int, rows: Tensor, positions: Tensor,
    drafted: Tensor,
) -> None:  # fmt: skip
    """Which rows of the pass draft the tree behind the walk that `walk` has recorded, for one sequence.

    record int32 [RECORD + 3 N], state int32: one row of those of `walk`. anchors [A] int32: nodes with a
    block of `size` rows, in their order behind the N nodes. Written: rows [P] int64, those rows, and
    positions [P] int64, what their proposals take; drafted [1] int32: where the root of that tree stands, -1
    without a block there, when any rows are written."""
    n, kept, start = (len(record) - RECORD) // 3, int(record[Record.KEPT]), int(state[State.START])
    end = int(record[RECORD + 2 * n + max(kept - 1, 0)])
    found = kept > 0 and end in anchors.tolist()
    block = anchors.tolist().index(end) if found else 0
    # row 0's proposal stands in the bonus token's place
    behind = 1 + torch.arange(len(rows), device=rows.device)
    rows.copy_(n + block * size + behind)
    positions.copy_(start + behind)
    drafted.fill_(start if found else -1)


@triton.jit(do_not_specialize=["N", "SIZE", "ANCHORS", "ROWS"])
def _follow_kernel(
    record, state, anchors, rows, positions, drafted,
    N, SIZE, ANCHORS, ROWS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK >= ANCHORS and ROWS, a power of two."""
    o = tl.arange(0, BLOCK)
    kept, start = tl.load(record + RECORD_KEPT), tl.load(state + STATE_START)
    end = tl.load(record + RECORD_HEAD + 2 * N + tl.maximum(kept - 1, 0))
    b_anchor = tl.load(anchors + o, mask=o < ANCHORS, other=-1)
    block = tl.min(tl.where(b_anchor == end, o, BLOCK))
    found = (block < BLOCK) & (kept > 0)
    # row 0's proposal stands in the bonus token's place
    first = N + tl.where(found, block, 0) * SIZE + 1
    tl.store(rows + o, (first + o).to(tl.int64), mask=o < ROWS)
    tl.store(positions + o, (start + 1 + o).to(tl.int64), mask=o < ROWS)
    tl.store(drafted, tl.where(found, start, -1))


def follow_triton(
    record: Tensor, state: Tensor, anchors: Tensor, size: int, rows: Tensor, positions: Tensor,
    drafted: Tensor,
) -> None:  # fmt: skip
    """`follow` as one launch."""
    n = (len(record) - RECORD) // 3
    assert len(rows) == len(positions) <= size - 2, (len(rows), len(positions), size)
    assert {t.dtype for t in (record, state, anchors, drafted)} == {torch.int32}, "int32 tables"
    assert {rows.dtype, positions.dtype} == {torch.int64}, (rows.dtype, positions.dtype)
    _follow_kernel[(1,)](
        record=record, state=state, anchors=anchors, rows=rows, positions=positions, drafted=drafted,
        N=n, SIZE=size, ANCHORS=len(anchors), ROWS=len(rows),
        BLOCK=triton.next_power_of_2(max(len(anchors), len(rows))), num_warps=1,
    )  # fmt: skip
