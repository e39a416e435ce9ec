"""A chain that something else proposes becomes a branch of a draft tree, where its nodes are likelier.

The chain shares the tree's nodes as far as its tokens are theirs; such a node has the higher of both scores.
Of all nodes of both the N likeliest stay, in the order of their scores, those of the chain first of equals.
Scores do not rise along a path, so no child stands in front of its parent, and the first n nodes are a tree
too (grow.py). A chain that is less likely than every node changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .grow import Trees
from .walk import first_child


def branch(trees: Trees, slots: Tensor, drafts: Tensor, scores: Tensor) -> None:
    """Add to the tree of every seat its chain; a seat without a text keeps its tree.

    trees: of B seats, N nodes each, changed. slots [B] int32, -1: an empty seat. drafts [B, P] int64: tokens
    behind the root; scores [B, P] fp32, not above 0 and not rising: the log of how likely the target gets
    that far."""
    n, p = trees.tokens.shape[1], drafts.shape[1]
    for b in (b for b, slot in enumerate(slots.tolist()) if slot >= 0):
        tokens, parents = trees.tokens[b].tolist(), trees.parents[b].tolist()
        depths, likely = trees.depths[b].tolist(), trees.scores[b].tolist()
        names, chain = [tokens[0], *drafts[b].tolist()], [0.0, *scores[b].tolist()]
        shared, node = {0: 0}, 0  # depths in the chain of the tree's nodes that are its own too
        for depth in range(1, p + 1):
            below = (i for i in range(node + 1, n) if parents[i] == node and tokens[i] == names[depth])
            node = next(below, n)
            if node == n:
                break
            shared[node], chain[depth] = depth, max(chain[depth], likely[node])
        # (score, whether of the tree, number) of every node, then its token, depth and parent
        found = [((-chain[j], 0, j), names[j], j, (0, j - 1)) for j in range(p + 1)]
        for i in (i for i in range(n) if i not in shared):
            parent = (0, shared[parents[i]]) if parents[i] in shared else (1, parents[i])
            found.append(((-likely[i], 1, i), tokens[i], depths[i], parent))
        found = sorted(found)[:n]
        place = {key[1:]: at for at, (key, *_) in enumerate(found)}
        for kept, new in (
            (trees.tokens, [token for _, token, _, _ in found]), (trees.depths, [d for _, _, d, _ in found]),
            (trees.parents, [place.get(parent, -1) for *_, parent in found]),
            (trees.scores, [-key[0] for key, *_ in found]),
        ):  # fmt: skip
            kept[b] = torch.tensor(new, dtype=kept.dtype)


@triton.jit(do_not_specialize=["N", "P"])
def _branch_kernel(
    slots, tokens, parents, depths, scores, places, drafts, chain_scores, N, P,
    NODES: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One seat. Powers of two: NODES >= N, CHAIN > P."""
    i_b = tl.program_id(0)
    if tl.load(slots + i_b) >= 0:
        tokens, parents, depths, scores, places = (
            tokens + i_b * N, parents + i_b * N, depths + i_b * N, scores + i_b * N, places + i_b * N
        )  # fmt: skip
        drafts, chain_scores = drafts + i_b * P, chain_scores + i_b * P
        o_n, o_c = tl.arange(0, NODES), tl.arange(0, CHAIN)
        m_n, m_c = o_n < N, o_c <= P
        b_token = tl.load(tokens + o_n, mask=m_n, other=-1)
        b_parent = tl.load(parents + o_n, mask=m_n, other=-2)
        b_depth = tl.load(depths + o_n, mask=m_n, other=0)
        b_score = tl.load(scores + o_n, mask=m_n, other=float("-inf"))
        b_name = tl.load(drafts + o_c - 1, mask=m_c & (o_c > 0), other=0)
        b_name = tl.where(o_c == 0, tl.load(tokens), b_name)
        b_chain = tl.load(chain_scores + o_c - 1, mask=m_c & (o_c > 0), other=0.0)
        b_shared = tl.where(o_n == 0, 0, -1)  # depth in the chain
        node, depth = 0, 0
        while (node < NODES) & (depth < P):
            node = first_child(b_token, b_parent, node, tl.load(drafts + depth), o_n, NODES)
            depth += 1
            score = tl.load(scores + node, mask=node < N, other=float("-inf"))
            b_shared = tl.where(o_n == node, depth, b_shared)
            b_chain = tl.where((o_c == depth) & (b_chain < score), score, b_chain)
        m_own = m_n & (b_shared < 0)
        m_first = m_c[None, :] & (b_chain[None, :] >= b_score[:, None])
        b_at = tl.cumsum(m_own.to(tl.int32)) - 1 + tl.sum(m_first.to(tl.int32), axis=1)
        m_first = m_own[:, None] & (b_score[:, None] > b_chain[None, :])
        b_chain_at = o_c + tl.sum(m_first.to(tl.int32), axis=0)
        m_same = b_shared[:, None] == o_c[None, :]
        b_at = tl.where(m_own, b_at, tl.sum(tl.where(m_same, b_chain_at[None, :], 0), axis=1))
        m_above = o_c[:, None] == o_c[None, :] + 1
        b_above = tl.sum(tl.where(m_above, b_chain_at[None, :], 0), axis=1)
        tl.store(places + o_n, b_at, mask=m_n)
        tl.debug_barrier()  # all is read, and places are written, before a node is
        b_parent = tl.load(places + b_parent, mask=m_own, other=-1)
        m_own, m_c = m_own & (b_at < N), m_c & (b_chain_at < N)
        tl.store(tokens + b_at, b_token, mask=m_own)
        tl.store(parents + b_at, b_parent, mask=m_own)
        tl.store(depths + b_at, b_depth, mask=m_own)
        tl.store(scores + b_at, b_score, mask=m_own)
        tl.store(tokens + b_chain_at, b_name, mask=m_c)
        tl.store(parents + b_chain_at, tl.where(o_c == 0, -1, b_above), mask=m_c)
        tl.store(depths + b_chain_at, o_c, mask=m_c)
        tl.store(scores + b_chain_at, b_chain, mask=m_c)


def branch_triton(trees: Trees, slots: Tensor, drafts: Tensor, scores: Tensor) -> None:
    """`branch` as one launch, a program a seat."""
    (seats, n), p = trees.tokens.shape, drafts.shape[1]
    assert len(slots) == len(drafts) == seats and drafts.shape == scores.shape, (slots.shape, scores.shape)
    tables = slots, trees.parents, trees.depths
    assert {t.dtype for t in tables} == {torch.int32}, [t.dtype for t in tables]
    assert (drafts.dtype, scores.dtype) == (torch.int64, torch.float32), (drafts.dtype, scores.dtype)
    every = *tables, trees.tokens, trees.scores, drafts, scores
    assert all(t.is_contiguous() for t in every), [t.stride() for t in every]
    _branch_kernel[(seats,)](
        slots=slots, tokens=trees.tokens, parents=trees.parents, depths=trees.depths, scores=trees.scores,
        places=torch.empty_like(trees.parents), drafts=drafts, chain_scores=scores, N=n, P=p,
        NODES=triton.next_power_of_2(n), CHAIN=triton.next_power_of_2(p + 1), num_warps=4,
    )  # fmt: skip
