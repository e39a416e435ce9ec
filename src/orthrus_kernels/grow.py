"""Draft trees grown on the device, best nodes first: one a seat of a cycle.

`draft_tree` says which nodes a tree has (draft_tree.py). Here it has exactly N of them, the root one, so that
a captured graph takes any tree: where there are fewer possible paths, the root's likeliest child comes again
and again, as a leaf of score -inf; the walk takes the first of equal siblings. Scores never rise from a node
to the next, so the first n nodes are the tree of n nodes: how many of them stand in a pass, allot.py says.

The frontier of the kernel's search lies in registers, an entry a place that is known and not taken, by the
order in which places became known. A step adds what the node taken last offers, its next sibling and its
first child, and takes the best entry, the first of equals. A chain, one child a node, has a kernel of its
own, as it has nothing to search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark, mark_here
from .draft_tree import draft_tree
from .layout import STATE_COLUMNS, STATE_ROOT, State
from .logit_summary import MINUS_INFINITY, ordered, unordered

MOST_DEPTH = 256  # of a node, not reached: the kernel packs a node's depth into 8 bits


@dataclass(frozen=True)
class Trees:
    """Draft trees of B seats, N nodes each, the root the first, parents before their children."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int32: node of the same tree, -1 at the root
    depths: Tensor  # [B, N] int32
    scores: Tensor  # [B, N] fp32: log-probability of the path to the node, 0 at the root

    @staticmethod
    def new(seats: int, nodes: int, device: torch.device | str, tokens: Tensor | None = None) -> Trees:
        """Trees to be filled by `grow`; until then roots alone with leaves that are impossible. tokens: their
        memory, [B, N] int64, which stays as it is until then."""
        scores = torch.full((seats, nodes), float("-inf"), device=device)
        scores[:, 0] = 0.0
        parents = torch.zeros(seats, nodes, dtype=torch.int32, device=device)
        parents[:, 0] = -1
        if tokens is None:
            tokens = torch.zeros(seats, nodes, dtype=torch.int64, device=device)
        return Trees(tokens, parents, parents + 1, scores)


def grow(
    trees: Trees, state: Tensor, slots: Tensor, log_probabilities: Tensor, ids: Tensor,
    order: Tensor | None = None, clock: Tensor | None = None, chain: bool = False,
) -> None:  # fmt: skip
    """Grow the tree of every seat below the root of its text; a seat without a text keeps its old one.

    state [S, columns of layout.State] int32; slots [B] int32: whose text sits in each seat, -1: none.
    log_probabilities [B, P, K] fp32, likeliest first, of candidates ids [B, P, K] int64 at the positions
    behind the root; with order: both it and log_probabilities [B, P, K, K], int32, of `rerank`. clock [2]
    int32: takes the times of begin and end (clock.py). chain: of one child a node, the likeliest."""
    if clock is not None:
        mark_here(clock[:1])
    n = trees.tokens.shape[1]
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        ranked = None if order is None else order[b]
        root = int(state[slot, State.ROOT])
        tree = draft_tree(root, log_probabilities[b], ids[b], n - 1, ranked, 1 if chain else None)
        again = n - len(tree)
        likeliest = int(ids[b, 0, 0 if ranked is None else ranked[0, 0, 0]])
        for kept, grown in (
            (trees.tokens, tree.tokens + [likeliest] * again), (trees.parents, tree.parents + [0] * again),
            (trees.depths, tree.depths + [1] * again), (trees.scores, tree.scores + [float("-inf")] * again),
        ):  # fmt: skip
            kept[b] = torch.tensor(grown, dtype=kept.dtype)
    if clock is not None:
        mark_here(clock[1:2])


@triton.jit
def _key(score):
    """int32 in the order of scores: a GPU finds the largest of such numbers in one instruction. Of damaged
    logits none is possible."""
    return ordered(tl.where(score == score, score, float("-inf")))


@triton.jit
def _one_of(chosen, b):
    """The number b, int32, of the one place that is chosen, or 0."""
    return tl.sum(tl.where(chosen, b, 0))


@triton.jit
def _score_of(chosen, b):
    """The same of fp32."""
    return _one_of(chosen, b.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N", "DEPTH", "K"])
def _grow_kernel(
    state, slots, log_probabilities, order, candidates, tokens, parents, depths, scores, clock,
    N, DEPTH, K,
    FRONTIER: tl.constexpr, ORDERED: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """N nodes of one seat's tree, the root one of them. FRONTIER >= 2 N, a power of two. ORDERED: scores
    behind each candidate before, and their order."""
    i_b = tl.program_id(0)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(clock, 0)
    slot = tl.load(slots + i_b)
    first = i_b * N
    candidates += i_b * DEPTH * K
    log_probabilities += i_b * DEPTH * K * (K if ORDERED else 1)
    if ORDERED:
        order += i_b * DEPTH * K * K
    o_f = tl.arange(0, FRONTIER)
    # An entry: the image of its node's score; its parent's score; (parent, rank, parent's depth) packed, and
    # (parent's candidate, its own).
    b_key = tl.full((FRONTIER,), MINUS_INFINITY, tl.int32)
    b_base = tl.zeros((FRONTIER,), tl.float32)
    b_node = tl.zeros((FRONTIER,), tl.int32)
    b_which = tl.zeros((FRONTIER,), tl.int32)
    known = 0
    # The tree, in registers until it is whole: a store would wait for what it stores.
    o_n = tl.arange(0, FRONTIER // 2)
    b_parent, b_depth = tl.full((FRONTIER // 2,), -1, tl.int32), tl.zeros((FRONTIER // 2,), tl.int32)
    b_score, b_candidate = tl.zeros((FRONTIER // 2,), tl.float32), tl.zeros((FRONTIER // 2,), tl.int32)
    # The node taken last: which candidates its parent and it are, and its parent's score. The root has no
    # sibling.
    score, base, depth, parent, rank, behind, which = 0.0, 0.0, 0, 0, K, 0, 0
    for node in range(1, tl.where(slot >= 0, N, 1)):
        # It offers its next sibling and its first child. All that is said of them is loaded at once, which
        # waits for memory once.
        above = tl.maximum(depth - 1, 0)
        sibling = (above * K + behind) * K + rank + 1 if ORDERED else above * K + rank + 1
        child = (depth * K + which) * K if ORDERED else depth * K
        has_sibling, has_child = rank + 1 < K, depth < DEPTH
        sibling_score = tl.load(log_probabilities + sibling, mask=has_sibling, other=0.0)
        child_score = tl.load(log_probabilities + child, mask=has_child, other=0.0)
        sibling_which, child_which = rank + 1, 0
        if ORDERED:
            sibling_which = tl.load(order + sibling, mask=has_sibling, other=0)
            child_which = tl.load(order + child, mask=has_child, other=0)
        is_sibling = (o_f == known) & has_sibling
        known += tl.where(has_sibling, 1, 0)
        is_child = (o_f == known) & has_child
        known += tl.where(has_child, 1, 0)
        b_key = tl.where(is_sibling, _key(base + sibling_score), b_key)
        b_key = tl.where(is_child, _key(score + child_score), b_key)
        b_base = tl.where(is_sibling, base, tl.where(is_child, score, b_base))
        b_node = tl.where(is_sibling, (parent << 16) | ((rank + 1) << 8) | above, b_node)
        b_node = tl.where(is_child, ((node - 1) << 16) | depth, b_node)
        b_which = tl.where(is_sibling, (behind << 8) | sibling_which, b_which)
        b_which = tl.where(is_child, (which << 8) | child_which, b_which)
        best = tl.max(b_key, axis=0)
        at = tl.min(tl.where(b_key == best, o_f, FRONTIER), axis=0)
        is_best = o_f == at
        packed_node, packed_which = _one_of(is_best, b_node), _one_of(is_best, b_which)
        base, score = _score_of(is_best, b_base), unordered(best)
        b_key = tl.where(is_best, MINUS_INFINITY, b_key)
        parent, rank, depth = packed_node >> 16, (packed_node >> 8) & 255, (packed_node & 255) + 1
        behind, which = packed_which >> 8, packed_which & 255
        is_node = o_n == node
        b_parent, b_depth = tl.where(is_node, parent, b_parent), tl.where(is_node, depth, b_depth)
        b_score = tl.where(is_node, score, b_score)
        b_candidate = tl.where(is_node, (depth - 1) * K + which, b_candidate)
        if best == MINUS_INFINITY:  # nothing is left that is possible, the first entry is taken again
            rank, depth = K, DEPTH  # and offers nothing
    is_root, m_n = o_n == 0, (o_n < N) & (slot >= 0)
    root = tl.load(state + slot * STATE_COLUMNS + STATE_ROOT, mask=slot >= 0, other=0).to(tl.int64)
    b_token = tl.load(candidates + b_candidate, mask=m_n & (o_n > 0), other=0)
    tl.store(tokens + first + o_n, tl.where(is_root, root, b_token), mask=m_n)
    tl.store(parents + first + o_n, b_parent, mask=m_n)
    tl.store(depths + first + o_n, b_depth, mask=m_n)
    tl.store(scores + first + o_n, b_score, mask=m_n)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(clock, 1)


@triton.jit(do_not_specialize=["N", "DEPTH", "K"])
def _chain_kernel(
    state, slots, log_probabilities, order, candidates, tokens, parents, depths, scores, clock,
    N, DEPTH, K,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, ORDERED: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """`_grow_kernel` of one child a node, BLOCK_P >= N nodes. The likeliest candidate behind each one of a
    position is loaded at once for all positions, and the walk through them is in registers: a load a node,
    whose address the node before says, would take longer than all else."""
    i_b = tl.program_id(0)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(clock, 0)
    slot = tl.load(slots + i_b)
    o_p, o_k = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    steps = tl.minimum(N - 1, DEPTH)
    row = (i_b * DEPTH + o_p[:, None]) * K
    row = (row + o_k[None, :]) * K if ORDERED else row + 0 * o_k[None, :]
    m = (o_p[:, None] < steps) & (o_k[None, :] < K)
    b_score = tl.load(log_probabilities + row, mask=m, other=float("-inf"))
    b_score = tl.where(b_score == b_score, b_score, float("-inf"))  # of damaged logits none is possible
    b_which = tl.load(order + row, mask=m, other=0) if ORDERED else tl.zeros((BLOCK_P, BLOCK_K), tl.int32)
    b_path, b_total = tl.zeros((BLOCK_P,), tl.int32), tl.full((BLOCK_P,), float("-inf"), tl.float32)
    score, which = 0.0, 0
    for p in range(steps):
        behind = (o_p[:, None] == p) & (o_k[None, :] == which)
        score += _score_of(behind, b_score)
        which = _one_of(behind, b_which)
        b_path = tl.where(o_p == p, which, b_path)
        b_total = tl.where(o_p == p, score, b_total)
    # Behind the last possible node the root's likeliest child comes again and again.
    possible = b_total > float("-inf")
    likeliest = tl.sum(tl.where(o_p == 0, b_path, 0))
    b_above = tl.where(possible, o_p, 0)
    p_token = candidates + (i_b * DEPTH + b_above) * K + tl.where(possible, b_path, likeliest)
    first, m_p = i_b * N, (o_p < N - 1) & (slot >= 0)
    if slot >= 0:
        tl.store(tokens + first, tl.load(state + slot * STATE_COLUMNS + STATE_ROOT).to(tl.int64))
        tl.store(parents + first, -1)
        tl.store(depths + first, 0)
        tl.store(scores + first, 0.0)
    tl.store(tokens + first + 1 + o_p, tl.load(p_token, mask=m_p), mask=m_p)
    tl.store(parents + first + 1 + o_p, b_above, mask=m_p)
    tl.store(depths + first + 1 + o_p, b_above + 1, mask=m_p)
    tl.store(scores + first + 1 + o_p, b_total, mask=m_p)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(clock, 1)


def grow_triton(
    trees: Trees, state: Tensor, slots: Tensor, log_probabilities: Tensor, ids: Tensor,
    order: Tensor | None = None, clock: Tensor | None = None, chain: bool = False,
) -> None:  # fmt: skip
    """`grow` as one launch, a program a seat."""
    seats, depth, k = ids.shape
    n = trees.tokens.shape[1]
    scored = (seats, depth, k) if order is None else (seats, depth, k, k)
    assert 1 <= n < 2**15 and trees.tokens.shape[0] == len(slots) == seats, (trees.tokens.shape, ids.shape)
    assert depth < MOST_DEPTH and k < 256 and log_probabilities.shape == scored, (ids.shape, scored)
    assert order is None or (order.shape == log_probabilities.shape and order.dtype == torch.int32)
    assert (log_probabilities.dtype, ids.dtype) == (torch.float32, torch.int64), ids.dtype
    assert state.dtype == slots.dtype == torch.int32 and state.shape[1] == len(State), state.shape
    tensors = (state, slots, log_probabilities, ids, *(() if order is None else (order,)))
    assert all(t.is_contiguous() for t in tensors), [t.stride() for t in tensors]
    how = {
        "state": state, "slots": slots, "log_probabilities": log_probabilities, "order": order,
        "candidates": ids, "tokens": trees.tokens, "parents": trees.parents, "depths": trees.depths,
        "scores": trees.scores, "clock": clock, "N": n, "DEPTH": depth, "K": k,
        "ORDERED": order is not None, "CLOCK": clock is not None,
    }  # fmt: skip
    if chain:
        block_p, block_k = triton.next_power_of_2(n), triton.next_power_of_2(k) if order is not None else 1
        warps = min(max(block_p * block_k // 1024, 1), 8)
        _chain_kernel[(seats,)](**how, BLOCK_P=block_p, BLOCK_K=block_k, num_warps=warps)
        return
    frontier = triton.next_power_of_2(2 * n)
    _grow_kernel[(seats,)](**how, FRONTIER=frontier, num_warps=1)
