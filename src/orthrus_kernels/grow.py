"""Draft trees grown into the rows of a pass: which nodes they have, and nothing else. One tree a sequence.

`draft_tree` says which nodes a tree has (draft_tree.py). Here it has exactly N of them, the root one, so that
a captured graph takes any tree: where there are fewer possible paths, the root's likeliest child comes again
and again, as a leaf of score -inf; the walk takes the first of equal siblings.

The frontier of the kernel's search lies in registers, an entry a place that is known and not taken, by the
order in which places became known; a step takes the best entry, the first of equals, and offers two more."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark, mark_here
from .draft_tree import draft_tree
from .layout import STATE_ROOT, STATE_START, State
from .plan import PassPlan

MOST_DEPTH = 64  # of a node, not reached: a tree takes so many rows of a block at most


def grow(
    plan: PassPlan, scores: Tensor, state: Tensor, log_probabilities: Tensor, ids: Tensor,
    order: Tensor | None = None, clock: Tensor | None = None,
) -> None:  # fmt: skip
    """Grow the tree of sequence s into rows s N, s N + 1, ... of a plan, its root where the text has got to.

    Written: tokens, positions and parents of those rows, and scores [S N] fp32: log-probability of the path
    to each node, 0 at the root. state [S, columns of layout.State] int32. log_probabilities [S, P, K] fp32,
    likeliest first, of candidates ids [S, P, K] int64 at the positions behind the root; with order: both it
    and log_probabilities [S, P, K, K], int32, of `rerank`; without S for one sequence. clock [2] int32:
    takes the times of begin and end (clock.py)."""
    if clock is not None:
        mark_here(clock[:1])
    sequences, (depth, k) = len(state), ids.shape[-2:]
    n = len(scores) // sequences
    ids, of = ids.view(-1, depth, k), (depth, k) if order is None else (depth, k, k)
    log_probabilities = log_probabilities.view(-1, *of)
    for s in range(sequences):
        start, root = state[s, State.START].item(), int(state[s, State.ROOT])
        ranked = None if order is None else order.view(-1, *of)[s]
        tree = draft_tree(root, log_probabilities[s], ids[s], n - 1, order=ranked)
        again = n - len(tree)
        likeliest = int(ids[s, 0, 0 if ranked is None else ranked[0, 0, 0]])
        rows = slice(s * n, (s + 1) * n)
        plan.tokens[rows] = torch.tensor(tree.tokens + [likeliest] * again)
        plan.positions[rows] = start + torch.tensor(tree.depths + [1] * again)
        parents = [parent if parent < 0 else s * n + parent for parent in tree.parents + [0] * again]
        plan.parents[rows] = torch.tensor(parents, dtype=torch.int32)
        scores[rows] = torch.tensor(tree.scores + [float("-inf")] * again)
    if clock is not None:
        mark_here(clock[1:2])


@triton.jit
def _score(p):
    """A log-probability; of damaged logits none is possible."""
    score = tl.load(p)
    return tl.where(score == score, score, float("-inf"))


@triton.jit(do_not_specialize=["N", "DEPTH", "K", "STATE"])
def _grow_kernel(
    state, log_probabilities, order, candidates, tokens, positions, parents, scores, clock,
    N, DEPTH, K, STATE,
    FRONTIER: tl.constexpr, ORDERED: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """N nodes of one sequence, the root one of them. FRONTIER >= 2 N, a power of two. ORDERED: scores behind
    each candidate before, and their order."""
    i_s = tl.program_id(0)
    if CLOCK:
        mark(clock, 0)
    start, root = tl.load(state + i_s * STATE + STATE_START), tl.load(state + i_s * STATE + STATE_ROOT)
    first = i_s * N
    candidates += i_s * DEPTH * K
    log_probabilities += i_s * DEPTH * K * (K if ORDERED else 1)
    if ORDERED:
        order += i_s * DEPTH * K * K
    o_f = tl.arange(0, FRONTIER)
    # An entry: scores of its node and of its parent; (parent, rank, parent's depth) packed; which candidate
    # the parent is.
    b_score = tl.full((FRONTIER,), float("-inf"), tl.float32)
    b_base = tl.zeros((FRONTIER,), tl.float32)
    b_node = tl.zeros((FRONTIER,), tl.int32)
    b_which = tl.zeros((FRONTIER,), tl.int32)
    known = 0
    tl.store(tokens + first, root.to(tl.int64))
    tl.store(positions + first, start.to(tl.int64))
    tl.store(parents + first, -1)
    tl.store(scores + first, 0.0)
    score, depth, which = 0.0, 0, 0
    for node in range(1, N):
        # the first child of the node taken last
        if depth < DEPTH:
            is_new = o_f == known
            row = (depth * K + which) * K if ORDERED else depth * K
            b_score = tl.where(is_new, score + _score(log_probabilities + row), b_score)
            b_base = tl.where(is_new, score, b_base)
            b_node = tl.where(is_new, ((node - 1) << 16) | depth, b_node)
            b_which = tl.where(is_new, which, b_which)
            known += 1
        best = tl.max(b_score, axis=0)
        at = tl.min(tl.where(b_score == best, o_f, FRONTIER), axis=0)
        is_best = o_f == at
        base = tl.sum(tl.where(is_best, b_base, 0.0), axis=0)
        packed_node = tl.sum(tl.where(is_best, b_node, 0), axis=0)
        behind = tl.sum(tl.where(is_best, b_which, 0), axis=0)
        parent, rank, above = packed_node >> 16, (packed_node >> 8) & 255, packed_node & 255
        row = (above * K + behind) * K if ORDERED else above * K
        b_score = tl.where(is_best, float("-inf"), b_score)
        # Its next sibling. Where nothing is left that is possible, the first entry is taken again.
        if (rank + 1 < K) & (best > float("-inf")):
            is_new = o_f == known
            b_score = tl.where(is_new, base + _score(log_probabilities + row + rank + 1), b_score)
            b_base = tl.where(is_new, base, b_base)
            b_node = tl.where(is_new, (parent << 16) | ((rank + 1) << 8) | above, b_node)
            b_which = tl.where(is_new, behind, b_which)
            known += 1
        score, depth, which = best, above + 1, rank
        if ORDERED:
            which = tl.load(order + row + rank)
        tl.store(tokens + first + node, tl.load(candidates + above * K + which))
        tl.store(positions + first + node, (start + depth).to(tl.int64))
        tl.store(parents + first + node, first + parent)
        tl.store(scores + first + node, score)
    if CLOCK:
        mark(clock, 1)


def grow_triton(
    plan: PassPlan, scores: Tensor, state: Tensor, log_probabilities: Tensor, ids: Tensor,
    order: Tensor | None = None, clock: Tensor | None = None,
) -> None:  # fmt: skip
    """`grow` as one launch, a program a sequence."""
    sequences, (depth, k) = len(state), ids.shape[-2:]
    n, rest = divmod(len(scores), sequences)
    scored = (depth, k) if order is None else (depth, k, k)
    assert rest == 0 and 1 <= n < 2**15 and len(scores) <= plan.shape.n_ar, (len(scores), plan.shape)
    assert depth < MOST_DEPTH and k < 256 and ids.numel() == sequences * depth * k, (ids.shape, sequences)
    assert log_probabilities.shape[-len(scored) :] == scored, (log_probabilities.shape, scored)
    assert order is None or (order.shape == log_probabilities.shape and order.dtype == torch.int32)
    assert (log_probabilities.dtype, ids.dtype) == (torch.float32, torch.int64), ids.dtype
    tensors = (state, log_probabilities, ids, scores, *(() if order is None else (order,)))
    assert all(t.is_contiguous() for t in tensors), [t.stride() for t in tensors]
    _grow_kernel[(sequences,)](
        state=state, log_probabilities=log_probabilities, order=order, candidates=ids,
        tokens=plan.tokens, positions=plan.positions, parents=plan.parents, scores=scores, clock=clock,
        N=n, DEPTH=depth, K=k, STATE=state.stride(0), FRONTIER=triton.next_power_of_2(2 * n),
        ORDERED=order is not None, CLOCK=clock is not None, num_warps=1,
    )  # fmt: skip
