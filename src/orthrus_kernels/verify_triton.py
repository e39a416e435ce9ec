"""Verification in Triton: the walk along the target's choices in one program, without the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton


@triton.jit
def first_child(b_token, b_parent, node, choice, o_n, BLOCK: tl.constexpr):
    """The first node after `node` that is its child and carries `choice`; BLOCK if there is none."""
    return tl.min(tl.where((b_parent == node) & (b_token == choice) & (o_n > node), o_n, BLOCK))


@triton.jit(do_not_specialize=["N"])
def _verify_kernel(tokens, parents, choices, path, length, bonus, N, BLOCK: tl.constexpr):
    """Nodes lie side by side; each step looks for the first child that carries the choice at its parent."""
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    b_token = tl.load(tokens + o_n, mask=m_n, other=-1)
    b_parent = tl.load(parents + o_n, mask=m_n, other=-2)
    tl.store(path + o_n, tl.full((BLOCK,), -1, tl.int32), mask=m_n & (o_n > 0))
    tl.store(path, 0)
    tl.debug_barrier()  # the steps below store into what another thread has just cleared
    node, count = 0, 1
    choice = tl.load(choices)
    child = first_child(b_token, b_parent, node, choice, o_n, BLOCK)
    while child < BLOCK:
        tl.store(path + count, child)
        node, count = child, count + 1
        choice = tl.load(choices + node)
        child = first_child(b_token, b_parent, node, choice, o_n, BLOCK)
    tl.store(length, count)
    tl.store(bonus, choice)


def verify_triton(tokens: Tensor, parents: Tensor, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the accepted path [N] (node indices, the root first, then -1), its length [1] and the bonus
    token [1], all int32 on the device.

    tokens, parents, choices: int32 [N], as for the twin `verify`; the path with its -1s is what
    `commit_triton` takes. Up to 4096 nodes."""
    n = len(tokens)
    assert 0 < n <= 4096 and tokens.shape == parents.shape == choices.shape, (tokens.shape, parents.shape)
    assert {tokens.dtype, parents.dtype, choices.dtype} == {torch.int32}, (tokens.dtype, choices.dtype)
    assert tokens.stride(0) == parents.stride(0) == choices.stride(0) == 1, "contiguous"
    path, length, bonus = tokens.new_empty(n), tokens.new_empty(1), tokens.new_empty(1)
    _verify_kernel[(1,)](
        tokens=tokens, parents=parents, choices=choices, path=path, length=length, bonus=bonus, N=n,
        BLOCK=max(32, triton.next_power_of_2(n)), num_warps=1,
    )  # fmt: skip
    return path, length, bonus
