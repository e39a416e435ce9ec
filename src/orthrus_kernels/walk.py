"""The end of a cycle: the walk along the target's choices, and where the text stops.

The walk starts at the root of a draft tree. It steps into the child that carries the target's choice and
stops where there is none; that last choice is the **bonus token**. Of siblings that carry the same token it
takes the first. Proposals never enter a choice, so the text is the target's whatever was proposed.

The walk keeps choices up to an end token, or until the text has all the tokens that it may have, and moves
the text's state on (layout.State). After that the state says finished, and a further cycle keeps nothing and
changes nothing: the host may launch a cycle before it knows that the text has ended. A walk also stops where
the text's pages end: what it has kept until there stands, and the text goes on when it has more pages. What
is kept is also written behind the text's tokens on the device, where `lookup` finds drafts.

A cycle has **seats**: seat b holds the tree of the text in slot `slots[b]`, or nothing. What a cycle kept
lies in its record, int32 [B, RECORD + 3 N]: a head (layout.Record), N tokens, the bits of their N
log-probabilities in fp32 and the N nodes at which they were chosen."""

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
    RECORD_NODES,
    STATE_COLUMNS,
    STATE_FINISHED,
    STATE_LEFT,
    STATE_ROOM,
    STATE_ROOT,
    STATE_START,
    Record,
    State,
)


def walk(
    state: Tensor, slots: Tensor, first: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor,
    logits: Tensor, log_sum_exp: Tensor, ends: Tensor, history: Tensor, accepted: Tensor, start: Tensor,
    record: Tensor, timed: bool = False,
) -> None:  # fmt: skip
    """Walk the draft trees of B seats, keep what the target agrees with, and move the texts on.

    state [S, len(State)] int32, changed. slots [B] int32: whose tree each is; -1: none. first [B + 1] int32:
    rows [first[b], first[b + 1]) of the pass are tree b, N of them at most. tokens [T] int64, parents [T]
    int32 (row of the pass, below 0 at a root): the trees. choices [T] int64: the target's token after each
    node; logits, log_sum_exp [T] fp32: of that token and of its row, before any setting. ends [S, E] int32:
    end tokens of each text, then -1. Written: history [S, C] int32, the tokens of each text by position, as
    far as it goes; accepted [B, N] int32, rows of the pass in the order of the path, then -1, and start [B]
    int32, the position of the first of them: what `commit` takes; record [B, RECORD + 3 N], with the time of
    the end if it is timed. A log-sum-exp that is not a number ends a text as damaged."""
    n = accepted.shape[1]
    names, above, chosen = tokens.tolist(), parents.tolist(), choices.tolist()
    log_probabilities = logits - log_sum_exp
    sound, ends_of = log_sum_exp.isfinite().tolist(), ends.tolist()
    accepted.fill_(-1)
    record[:, Record.KEPT] = 0
    for b, (slot, node, end) in enumerate(zip(slots.tolist(), *_bounds(first), strict=True)):
        if slot < 0:
            continue
        columns, root = state[slot].tolist(), node
        most = min(columns[State.LEFT], columns[State.ROOM] - columns[State.START])
        finished, damaged, path = columns[State.FINISHED], 0, list[int]()
        while node < end and not finished and len(path) < most:
            if not sound[node]:
                damaged = finished = 1
                break
            path.append(node)
            choice = chosen[node]
            finished = int(choice in ends_of[slot] or len(path) >= columns[State.LEFT])
            node = next((i for i in range(node + 1, end) if above[i] == node and names[i] == choice), end)
        kept, nodes = len(path), torch.tensor(path, dtype=torch.int32)
        start[b] = columns[State.START]
        behind = history[slot, columns[State.START] + 1 :][:kept]
        behind[:] = choices[nodes][: len(behind)].int()
        accepted[b, :kept] = nodes
        parts = record[b, RECORD:].view(3, n)
        parts[0, :kept], parts[2, :kept] = choices[nodes].int(), nodes - root
        parts[1, :kept] = log_probabilities[nodes].view(torch.int32)
        for place, value in (
            (Record.KEPT, kept), (Record.FINISHED, finished), (Record.DAMAGED, damaged),
            (Record.NODES, end - root),
        ):  # fmt: skip
            record[b, place] = value
        state[slot, State.START] += kept
        state[slot, State.LEFT] -= kept
        state[slot, State.FINISHED] = finished
        if kept:
            state[slot, State.ROOT] = chosen[path[-1]]
    if timed:
        mark_here(record[0, Record.DONE_AT])


def _bounds(first: Tensor) -> tuple[list[int], list[int]]:
    """Where each tree begins and ends."""
    rows = first.tolist()
    return rows[:-1], rows[1:]


@triton.jit
def first_child(b_token, b_parent, node, choice, o_n, BLOCK: tl.constexpr):
    """The first node after `node` that is its child and carries `choice`; BLOCK if there is none."""
    return tl.min(tl.where((b_parent == node) & (b_token == choice) & (o_n > node), o_n, BLOCK))


@triton.jit(do_not_specialize=["N", "N_ENDS", "C"])
def _walk_kernel(
    state, slots, first, tokens, parents, choices, logits, log_sum_exp, ends, history, accepted, start,
    record, N, N_ENDS, C,
    BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One seat. Its nodes lie side by side; each step looks for the first child that carries the choice at
    its parent."""
    i_b = tl.program_id(0)
    accepted, record = accepted + i_b * N, record + i_b * (RECORD_HEAD + 3 * N)
    o_n, o_e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_ENDS)
    tl.store(accepted + o_n, tl.full((BLOCK,), -1, tl.int32), mask=o_n < N)
    tl.debug_barrier()  # the steps below store into what another thread has just cleared
    slot, row = tl.load(slots + i_b), tl.load(first + i_b)  # row: of its root
    count, finished, damaged = 0, 1, 0
    if slot >= 0:
        state += slot * STATE_COLUMNS
        history += slot.to(tl.int64) * C
        m_n = o_n < tl.load(first + i_b + 1) - row
        tokens, parents, choices, logits, log_sum_exp = (
            tokens + row, parents + row, choices + row, logits + row, log_sum_exp + row
        )  # fmt: skip
        b_token = tl.load(tokens + o_n, mask=m_n, other=-1).to(tl.int32)
        b_parent = tl.load(parents + o_n, mask=m_n, other=-2)
        b_parent = tl.where(b_parent < 0, b_parent, b_parent - row)
        b_end = tl.load(ends + slot * N_ENDS + o_e, mask=o_e < N_ENDS, other=-1)
        begin, root = tl.load(state + STATE_START), tl.load(state + STATE_ROOT)
        left, finished = tl.load(state + STATE_LEFT), tl.load(state + STATE_FINISHED)
        most = tl.minimum(left, tl.load(state + STATE_ROOM) - begin)
        node = tl.where(tl.sum(m_n.to(tl.int32)) > 0, 0, BLOCK)
        while (node < BLOCK) & (finished == 0) & (count < most):
            b_sum = tl.load(log_sum_exp + node)
            if (b_sum > float("-inf")) & (b_sum < float("inf")):
                root = tl.load(choices + node).to(tl.int32)
                tl.store(accepted + count, row + node)
                tl.store(record + RECORD_HEAD + count, root)
                b_log = tl.load(logits + node) - b_sum
                tl.store(record + RECORD_HEAD + N + count, b_log.to(tl.int32, bitcast=True))
                tl.store(record + RECORD_HEAD + 2 * N + count, node)
                count += 1
                tl.store(history + begin + count, root, mask=begin + count < C)
                ended = tl.max((b_end == root).to(tl.int32), axis=0)
                finished = tl.where((ended == 1) | (count >= left), 1, 0)
                node = first_child(b_token, b_parent, node, root, o_n, BLOCK)
            else:
                damaged, finished = 1, 1
        tl.store(start + i_b, begin)
        tl.store(state + STATE_START, begin + count)
        tl.store(state + STATE_ROOT, root)
        tl.store(state + STATE_LEFT, left - count)
        tl.store(state + STATE_FINISHED, finished)
        tl.store(record + RECORD_FINISHED, finished)
        tl.store(record + RECORD_DAMAGED, damaged)
        tl.store(record + RECORD_NODES, tl.load(first + i_b + 1) - row)
    tl.store(record + RECORD_KEPT, count)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(record, RECORD_DONE_AT)


def walk_triton(
    state: Tensor, slots: Tensor, first: Tensor, tokens: Tensor, parents: Tensor, choices: Tensor,
    logits: Tensor, log_sum_exp: Tensor, ends: Tensor, history: Tensor, accepted: Tensor, start: Tensor,
    record: Tensor, timed: bool = False,
) -> None:  # fmt: skip
    """`walk` in one launch, a program a seat. Up to 4096 nodes."""
    seats, n = accepted.shape
    assert 0 < n <= 4096, n
    assert len({len(t) for t in (tokens, parents, choices, logits, log_sum_exp)}) == 1, "one entry a row"
    assert (len(slots), len(first), len(start)) == (seats, seats + 1, seats), (slots, first, start)
    assert len(ends) == len(state) and ends.shape[1] > 0, (ends.shape, state.shape)
    assert state.shape[1] == len(State) and record.shape == (seats, RECORD + 3 * n), (state, record.shape)
    assert len(history) == len(state), (history.shape, state.shape)
    whole = state, slots, first, parents, ends, history, accepted, start, record
    assert {t.dtype for t in whole} == {torch.int32}, [t.dtype for t in whole]
    assert {tokens.dtype, choices.dtype} == {torch.int64}, (tokens.dtype, choices.dtype)
    assert {logits.dtype, log_sum_exp.dtype} == {torch.float32}, (logits.dtype, log_sum_exp.dtype)
    every = *whole, tokens, choices, logits, log_sum_exp
    assert all(t.is_contiguous() for t in every), [t.stride() for t in every]
    _walk_kernel[(seats,)](
        state=state, slots=slots, first=first, tokens=tokens, parents=parents, choices=choices,
        logits=logits, log_sum_exp=log_sum_exp, ends=ends, history=history, accepted=accepted, start=start,
        record=record, N=n, N_ENDS=ends.shape[1], C=history.shape[1],
        BLOCK=max(32, triton.next_power_of_2(n)), BLOCK_ENDS=triton.next_power_of_2(ends.shape[1]),
        CLOCK=timed, num_warps=1,
    )  # fmt: skip
