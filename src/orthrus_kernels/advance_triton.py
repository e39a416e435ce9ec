"""The end of a cycle on the device: the walk along the target's choices, and where it stops.

A cycle keeps the choices along the walk up to an end token, or until no token is left, and moves the text's
state on (layout.State). After that the state says finished, and a further cycle keeps nothing and changes
nothing: the host may launch it before it knows.

The cycle's record, int32 [RECORD + 3 N], has a head (layout.Record), N tokens, the bits of their N
log-probabilities in fp32 and the N nodes they were chosen at. Of the head this kernel writes what was kept,
finished and damaged, and the time of the end. There is no twin of its own: `verify` and the cut at the limit
and at end tokens say what is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark
from .layout import (
    RECORD,
    RECORD_DAMAGED,
    RECORD_DONE_AT,
    RECORD_FINISHED,
    RECORD_HEAD,
    RECORD_KEPT,
    STATE_FINISHED,
    STATE_LEFT,
    STATE_ROOT,
    STATE_START,
    State,
)


@triton.jit
def _first_child(b_token, b_parent, node, choice, o_n, BLOCK: tl.constexpr):
    """The first node after `node` that is its child and carries `choice`; BLOCK if there is none."""
    return tl.min(tl.where((b_parent == node) & (b_token == choice) & (o_n > node), o_n, BLOCK))


@triton.jit(do_not_specialize=["N", "N_ENDS"])
def _advance_kernel(
    state, tokens, parents, choices, logits, log_sum_exp, ends, accepted, start, record,
    N, N_ENDS,
    BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """Nodes lie side by side; each step looks for the first child that carries the choice at its parent."""
    o_n, o_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_ENDS)
    m_n = o_n < N
    b_token = tl.load(tokens + o_n, mask=m_n, other=-1).to(tl.int32)
    b_parent = tl.load(parents + o_n, mask=m_n, other=-2)
    b_end = tl.load(ends + o_e, mask=o_e < N_ENDS, other=-1)
    first, root = tl.load(state + STATE_START), tl.load(state + STATE_ROOT)
    left, finished = tl.load(state + STATE_LEFT), tl.load(state + STATE_FINISHED)
    tl.store(accepted + o_n, tl.full((BLOCK,), -1, tl.int32), mask=m_n)
    tl.debug_barrier()  # the steps below store into what another thread has just cleared
    node, count, damaged = 0, 0, 0
    while (node < BLOCK) & (finished == 0):
        b_sum = tl.load(log_sum_exp + node)
        if (b_sum > float("-inf")) & (b_sum < float("inf")):
            root = tl.load(choices + node).to(tl.int32)
            tl.store(accepted + count, node)
            tl.store(record + RECORD_HEAD + count, root)
            b_log = tl.load(logits + node) - b_sum
            tl.store(record + RECORD_HEAD + N + count, b_log.to(tl.int32, bitcast=True))
            tl.store(record + RECORD_HEAD + 2 * N + count, node)
            count += 1
            ended = tl.max((b_end == root).to(tl.int32), axis=0)
            finished = tl.where((ended == 1) | (count >= left), 1, 0)
            node = _first_child(b_token, b_parent, node, root, o_n, BLOCK)
        else:
            damaged, finished = 1, 1
    tl.store(start, first)
    tl.store(state + STATE_START, first + count)
    tl.store(state + STATE_ROOT, root)
    tl.store(state + STATE_LEFT, left - count)
    tl.store(state + STATE_FINISHED, finished)
    tl.store(record + RECORD_KEPT, count)
    tl.store(record + RECORD_FINISHED, finished)
    tl.store(record + RECORD_DAMAGED, damaged)
    if CLOCK:
        mark(record, RECORD_DONE_AT)


def advance_triton(
    state: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor, logits: Tensor, log_sum_exp: Tensor,
    ends: Tensor, accepted: Tensor, start: Tensor, record: Tensor, timed: bool = False,
) -> None:  # fmt: skip
    """Walk a draft tree of N nodes, keep what the target agrees with, and move `state` on. One launch.

    tokens [N] int64, parents [N] int32: the tree, node 0 its root. choices [N] int64: the target's token
    after each node; logits, log_sum_exp [N] fp32: of that token and of its row, before any setting. ends:
    int32, end tokens. Written: accepted [N] int32, node indices in the order of the path, then -1, and start
    [1] int32, where they go: what `commit_triton` takes; record, as above, with the time of the end if it is
    timed. Up to 4096 nodes."""
    n = len(tokens)
    assert 0 < n <= 4096, n
    assert {len(t) for t in (parents, choices, logits, log_sum_exp, accepted)} == {n}, "one entry a node"
    assert {tokens.dtype, choices.dtype} == {torch.int64}, (tokens.dtype, choices.dtype)
    assert {logits.dtype, log_sum_exp.dtype} == {torch.float32}, (logits.dtype, log_sum_exp.dtype)
    whole = state, parents, ends, accepted, start, record
    assert {t.dtype for t in whole} == {torch.int32}, [t.dtype for t in whole]
    assert state.numel() == len(State) and record.numel() == RECORD + 3 * n, (state.shape, record.shape)
    every = *whole, tokens, choices, logits, log_sum_exp
    assert all(t.is_contiguous() for t in every), [t.stride() for t in every]
    _advance_kernel[(1,)](
        state=state, tokens=tokens, parents=parents, choices=choices, logits=logits, log_sum_exp=log_sum_exp,
        ends=ends, accepted=accepted, start=start, record=record, N=n, N_ENDS=len(ends),
        BLOCK=max(32, triton.next_power_of_2(n)), BLOCK_ENDS=triton.next_power_of_2(max(len(ends), 1)),
        CLOCK=timed, num_warps=1,
    )  # fmt: skip
