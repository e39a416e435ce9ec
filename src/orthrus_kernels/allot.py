"""The rows of a verify pass, shared out among the draft trees of all texts by one threshold.

Every text has a row for its root. The other rows go to the likeliest nodes of all trees together: a node's
score is the log-probability that its text gets that far, so the pass as a whole keeps the most tokens. The
scores of a tree never rise from a node to the next (grow.py), so a text gets the first nodes of its tree,
which are a tree too. At equal scores the text in the lower seat comes first.

The kernel is one program: it finds the score of the last node that is taken by bisecting the bits of the
scores, which for numbers of one sign are in the order of the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .grow import Trees
from .lay_triton import larger
from .layout import STATE_COLUMNS, STATE_NODES, STATE_START, State
from .plan import PassPlan

_BARRED = 0x7FFFFFFF  # in place of the bits of a node that may not be taken: behind those of -inf


def allot(plan: PassPlan, first: Tensor, trees: Trees, state: Tensor, slots: Tensor) -> None:
    """Put the likeliest nodes of B trees into the AR rows of a plan, tree behind tree.

    trees: of B seats, N nodes each, B not above the plan's AR rows; a score above 0 counts as 0. slots [B]
    int32: whose text sits in each seat, -1: none. state [S, columns of layout.State] int32: a text's tree
    stands where the text has got to, and has State.NODES nodes at most. Written: first [B + 1] int32, rows
    [first[b], first[b + 1]) are those of tree b; tokens, positions and parents of these rows, and sequences
    of all AR rows: those behind the last tree are padding."""
    n_ar, owners = plan.shape.n_ar, slots.tolist()
    counts = [int(slot >= 0) for slot in owners]
    most = [min(int(state[slot, State.NODES]), trees.tokens.shape[1]) if slot >= 0 else 0 for slot in owners]
    scores = trees.scores.tolist()
    ranked = sorted((max(0.0, -scores[b][j]), b, j) for b, n in enumerate(most) for j in range(1, n))
    for _, b, _ in ranked[: n_ar - sum(counts)]:
        counts[b] += 1
    rows = [0]
    plan.sequences[:n_ar] = -1
    for b, (slot, count) in enumerate(zip(owners, counts, strict=True)):
        mine, parents = slice(rows[-1], rows[-1] + count), trees.parents[b, :count]
        plan.tokens[mine] = trees.tokens[b, :count]
        plan.positions[mine] = trees.depths[b, :count].long() + (state[slot, State.START] if count else 0)
        plan.parents[mine] = torch.where(parents < 0, parents, parents + rows[-1])
        plan.sequences[mine] = slot
        rows.append(rows[-1] + count)
    first.copy_(torch.tensor(rows, dtype=torch.int32))


@triton.jit(do_not_specialize=["B", "N", "T"])
def _allot_kernel(
    node_tokens, node_parents, node_depths, node_scores, state, slots,
    tokens, positions, parents, sequences, first,
    B, N, T,
    SEATS: tl.constexpr, NODES: tl.constexpr, ROWS: tl.constexpr, BARRED: tl.constexpr,
):  # fmt: skip
    """Powers of two: SEATS >= B, NODES >= N, ROWS >= T."""
    o_b, o_n, o_t = tl.arange(0, SEATS), tl.arange(0, NODES), tl.arange(0, ROWS)
    b_slot = tl.load(slots + o_b, mask=o_b < B, other=-1)
    b_most = tl.load(state + b_slot * STATE_COLUMNS + STATE_NODES, mask=b_slot >= 0, other=0)
    m_node = (b_slot >= 0)[:, None] & (o_n[None, :] < tl.minimum(tl.maximum(b_most, 1), N)[:, None])
    b_score = tl.load(node_scores + o_b[:, None] * N + o_n[None, :], mask=m_node, other=0.0)
    b_score = tl.where(b_score < 0, b_score, 0.0)  # or its bits would not be in order, and no limit hold
    b_key = tl.where(m_node, (0.0 - b_score).to(tl.int32, bitcast=True), BARRED)
    b_key = tl.where(m_node & (o_n == 0)[None, :], -1, b_key)
    # The least limit with T nodes or more up to it. BARRED - 1, past the bits of -inf, takes every node.
    low, high = tl.full((), -1, tl.int32), tl.full((), BARRED - 1, tl.int32)
    while low < high:
        middle = low + (high - low) // 2
        enough = tl.sum((b_key <= middle).to(tl.int32)) >= T
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    b_count = tl.sum((b_key < low).to(tl.int32), axis=1)
    b_equal = tl.sum((b_key == low).to(tl.int32), axis=1)
    left = T - tl.sum(b_count)
    b_count += tl.minimum(b_equal, tl.maximum(left - (tl.cumsum(b_equal) - b_equal), 0))
    b_first, total = tl.cumsum(b_count) - b_count, tl.sum(b_count)
    tl.store(first + o_b, b_first, mask=o_b < B)
    tl.store(first + B, total)
    # The seat of each row: the last one whose tree has begun. Until then it stands in the row of its root.
    m_row = o_t < total
    tl.store(sequences + o_t, tl.full((ROWS,), -1, tl.int32), mask=o_t < T)
    tl.debug_barrier()  # each line below reads or overwrites what other threads have just written
    tl.store(sequences + b_first, o_b, mask=b_count > 0)
    tl.debug_barrier()
    b_seat = tl.load(sequences + o_t, mask=m_row, other=0)
    b_seat = tl.associative_scan(b_seat, 0, larger)
    tl.debug_barrier()
    b_root = tl.load(first + b_seat, mask=m_row, other=0)
    b_text = tl.load(slots + b_seat, mask=m_row, other=-1)
    b_start = tl.load(state + b_text * STATE_COLUMNS + STATE_START, mask=m_row, other=0)
    o_node = b_seat * N + o_t - b_root
    b_parent = tl.load(node_parents + o_node, mask=m_row, other=-1)
    b_parent = tl.where(b_parent < 0, b_parent, b_parent + b_root)
    b_depth = tl.load(node_depths + o_node, mask=m_row, other=0)
    tl.store(tokens + o_t, tl.load(node_tokens + o_node, mask=m_row, other=0), mask=m_row)
    tl.store(positions + o_t, (b_start + b_depth).to(tl.int64), mask=m_row)
    tl.store(parents + o_t, b_parent, mask=m_row)
    tl.store(sequences + o_t, b_text, mask=m_row)


def allot_triton(plan: PassPlan, first: Tensor, trees: Trees, state: Tensor, slots: Tensor) -> None:
    """`allot` in one launch of one program."""
    (seats, n), n_ar = trees.tokens.shape, plan.shape.n_ar
    assert len(slots) == seats <= n_ar and len(first) == seats + 1, (len(slots), seats, n_ar, len(first))
    assert {t.dtype for t in (first, slots, state, trees.parents, trees.depths)} == {torch.int32}, "int32"
    every = slots, first, state, trees.tokens, trees.parents, trees.depths, trees.scores
    assert all(t.is_contiguous() for t in every), [t.stride() for t in every]
    block = triton.next_power_of_2(seats), triton.next_power_of_2(n)
    _allot_kernel[(1,)](
        node_tokens=trees.tokens, node_parents=trees.parents, node_depths=trees.depths,
        node_scores=trees.scores, state=state, slots=slots, tokens=plan.tokens, positions=plan.positions,
        parents=plan.parents, sequences=plan.sequences, first=first, B=seats, N=n, T=n_ar,
        SEATS=block[0], NODES=block[1], ROWS=triton.next_power_of_2(n_ar), BARRED=_BARRED,
        num_warps=min(max(block[0] * block[1] // 256, 1), 16),
    )  # fmt: skip
