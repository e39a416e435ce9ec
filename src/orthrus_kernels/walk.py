"""The end of a cycle: the walk along the target's choices, and where the text stops.

The walk starts at the root of a draft tree. It steps into the child that carries the target's choice and
stops where there is none; that last choice is the **bonus token**. Of siblings that carry the same token it
takes the first. Proposals never enter a choice, so the text is the target's whatever was proposed.

The walk keeps choices up to an end token, or until the text has all the tokens that it may have, and moves
the text's state on (layout.State). After that the state says finished, and a further cycle keeps nothing and
changes nothing: the host may launch a cycle before it knows that the text has ended.

What a cycle kept lies in its record, int32 [S, RECORD + 3 N]: a head (layout.Record), N tokens, the bits of
their N log-probabilities in fp32 and the N nodes at which they were chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark, mark_here
from .layout import (
    RECORD,
    RECORD_DAMAGED,
    RECORD_DONE_AT,
    RECORD_FINISHED,
    RECORD_HEAD,
    RECORD_KEPT,
    STATE_COLUMNS,
    STATE_FINISHED,
    STATE_LEFT,
    STATE_ROOT,
    STATE_START,
    Record,
    State,
)


def walk(
    state: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor, logits: Tensor, log_sum_exp: Tensor,
    ends: Tensor, accepted: Tensor, start: Tensor, record: Tensor, timed: bool = False,
) -> None:  # fmt: skip
    """Walk the draft trees of S sequences, N nodes each, keep what the target agrees with, and move the texts
    on.

    state [S, len(State)] int32, changed. tokens [S N] int64, parents [S N] int32 (row of the pass, -1 at a
    root): the trees, side by side. choices [S N] int64: the target's token after each node; logits,
    log_sum_exp [S N] fp32: of that token and of its row, before any setting. ends int32: end tokens. Written:
    accepted [S, N] int32, rows of the pass in the order of the path, then -1, and start [S] int32, the
    position of the first of them: what `commit` takes; record [S, RECORD + 3 N], with the time of the end if
    it is timed. A log-sum-exp that is not a number ends a text as damaged."""
    n = accepted.shape[1]
    names, above, chosen = tokens.tolist(), parents.tolist(), choices.tolist()
    log_probabilities = logits - log_sum_exp
    sound, stops = log_sum_exp.isfinite().tolist(), set(ends.tolist())
    for s, columns in enumerate(state.tolist()):
        left, finished, damaged = columns[State.LEFT], columns[State.FINISHED], 0
        node, path = s * n, list[int]()
        while node < (s + 1) * n and not finished:
            if not sound[node]:
                damaged = finished = 1
                break
            path.append(node)
            choice = chosen[node]
            finished = int(choice in stops or len(path) >= left)
            children = range(node + 1, (s + 1) * n)
            node = next((i for i in children if above[i] == node and names[i] == choice), (s + 1) * n)
        kept, nodes = len(path), torch.tensor(path, dtype=torch.int32)
        accepted[s], start[s] = -1, columns[State.START]
        accepted[s, :kept] = nodes
        parts = record[s, RECORD:].view(3, n)
        parts[0, :kept], parts[2, :kept] = choices[nodes].int(), nodes - s * n
        parts[1, :kept] = log_probabilities[nodes].view(torch.int32)
        for place, value in ((Record.KEPT, kept), (Record.FINISHED, finished), (Record.DAMAGED, damaged)):
            record[s, place] = value
        state[s, State.START] += kept
        state[s, State.LEFT] -= kept
        state[s, State.FINISHED] = finished
        if kept:
            state[s, State.ROOT] = chosen[path[-1]]
        if timed:
            mark_here(record[s, Record.DONE_AT])


@triton.jit
def first_child(b_token, b_parent, node, choice, o_n, BLOCK: tl.constexpr):
    """The first node after `node` that is its child and carries `choice`; BLOCK if there is none."""
    return tl.min(tl.where((b_parent == node) & (b_token == choice) & (o_n > node), o_n, BLOCK))


@triton.jit(do_not_specialize=["N", "N_ENDS"])
def _walk_kernel(
    state, tokens, parents, choices, logits, log_sum_exp, ends, accepted, start, record,
    N, N_ENDS,
    BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence. Its nodes lie side by side; each step looks for the first child that carries the choice
    at its parent."""
    i_s = tl.program_id(0)
    row = i_s * N  # of its root
    state += i_s * STATE_COLUMNS
    tokens, parents, choices, logits, log_sum_exp = (
        tokens + row, parents + row, choices + row, logits + row, log_sum_exp + row
    )  # fmt: skip
    accepted, record = accepted + row, record + i_s * (RECORD_HEAD + 3 * N)
    o_n, o_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_ENDS)
    m_n = o_n < N
    b_token = tl.load(tokens + o_n, mask=m_n, other=-1).to(tl.int32)
    b_parent = tl.load(parents + o_n, mask=m_n, other=-2)
    b_parent = tl.where(b_parent < 0, b_parent, b_parent - row)
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
            tl.store(accepted + count, row + node)
            tl.store(record + RECORD_HEAD + count, root)
            b_log = tl.load(logits + node) - b_sum
            tl.store(record + RECORD_HEAD + N + count, b_log.to(tl.int32, bitcast=True))
            tl.store(record + RECORD_HEAD + 2 * N + count, node)
            count += 1
            ended = tl.max((b_end == root).to(tl.int32), axis=0)
            finished = tl.where((ended == 1) | (count >= left), 1, 0)
            node = first_child(b_token, b_parent, node, root, o_n, BLOCK)
        else:
            damaged, finished = 1, 1
    tl.store(start + i_s, first)
    tl.store(state + STATE_START, first + count)
    tl.store(state + STATE_ROOT, root)
    tl.store(state + STATE_LEFT, left - count)
    tl.store(state + STATE_FINISHED, finished)
    tl.store(record + RECORD_KEPT, count)
    tl.store(record + RECORD_FINISHED, finished)
    tl.store(record + RECORD_DAMAGED, damaged)
    if CLOCK:
        mark(record, RECORD_DONE_AT)


def walk_triton(
    state: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor, logits: Tensor, log_sum_exp: Tensor,
    ends: Tensor, accepted: Tensor, start: Tensor, record: Tensor, timed: bool = False,
) -> None:  # fmt: skip
    """`walk` in one launch, a program a sequence. Up to 4096 nodes."""
    sequences, n = accepted.shape
    assert 0 < n <= 4096, n
    assert {len(t) for t in (tokens, parents, choices, logits, log_sum_exp)} == {sequences * n}, (
        "a row a node"
    )
    assert {tokens.dtype, choices.dtype} == {torch.int64}, (tokens.dtype, choices.dtype)
    assert {logits.dtype, log_sum_exp.dtype} == {torch.float32}, (logits.dtype, log_sum_exp.dtype)
    whole = state, parents, ends, accepted, start, record
    assert {t.dtype for t in whole} == {torch.int32}, [t.dtype for t in whole]
    assert state.shape == (sequences, len(State)) and record.shape == (sequences, RECORD + 3 * n), (
        record.shape
    )
    every = *whole, tokens, choices, logits, log_sum_exp
    assert all(t.is_contiguous() for t in every), [t.stride() for t in every]
    _walk_kernel[(sequences,)](
        state=state, tokens=tokens, parents=parents, choices=choices, logits=logits, log_sum_exp=log_sum_exp,
        ends=ends, accepted=accepted, start=start, record=record, N=n, N_ENDS=len(ends),
        BLOCK=max(32, triton.next_power_of_2(n)), BLOCK_ENDS=triton.next_power_of_2(max(len(ends), 1)),
        CLOCK=timed, num_warps=1,
    )  # fmt: skip
