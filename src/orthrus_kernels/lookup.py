"""Prompt lookup: a draft without a drafter, what followed the last tokens of a text where they came before.

A place of the text **matches n tokens** if the n tokens up to it are the last n of the text; n is counted up
to MOST. The draft begins behind the place that matches most tokens, at the last one of equals. Where the
draft reaches the end of the text it goes round again from where it began, so a text that repeats itself is
drafted as far as there are rows. Where no place matches the last token, the draft repeats that token.

Bytes moved: 4 of each known token; a program reads them MOST times, but for the first time from L1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark, mark_here
from .layout import STATE_COLUMNS, STATE_START, State

# Tokens of a match that count. With 8 greedy texts of the embedded checkpoint would keep 0.5 % more tokens a
# pass (simulated, bench/LOG.md, 135).
MOST = 4
# How likely the target's token is the one that followed, by how many tokens match: of the embedded checkpoint
# on its dev prompts (bench/LOG.md, 135). Behind each token that it agrees with, one more matches.
AGREES = (0.001, 0.3, 0.45, 0.45, 0.8)
_PLACES = 1 << 27  # a match is packed as its length and its place, which is below this
_TILE = 8192  # places a step: those of a whole text of 32k take four
_MOST, _PLACE_BITS = tl.constexpr(MOST), tl.constexpr(_PLACES)
_LOGS = tuple(math.log(share) for share in AGREES)
_SCORES = tl.constexpr(_LOGS)


def lookup(
    history: Tensor, state: Tensor, slots: Tensor, drafts: Tensor, scores: Tensor,
    clock: Tensor | None = None,
) -> None:  # fmt: skip
    """Draft for the text of every seat; a seat without a text keeps what it had.

    history [S, C] int32: the tokens of each slot's text by position, its root the last one that is read.
    state [S, columns of layout.State] int32; slots [B] int32: whose text sits in each seat, -1: none.
    Written, both of lines any distance apart: drafts [B, P] int64, the tokens behind the root; scores [B, P]
    fp32, the log of how likely the target gets that far. clock [3] int32: takes the time of the begin, twice,
    and of the end (clock.py)."""
    if clock is not None:
        mark_here(clock[:2])
    for b, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        start = min(int(state[slot, State.START]), history.shape[1] - 1)
        text = history[slot, : start + 1].cpu().long()
        lengths, equal = torch.zeros_like(text[:start]), torch.ones_like(text[:start], dtype=torch.bool)
        for n in range(min(MOST, start)):  # the nth token before each place, and before the root
            equal[:n] = False
            equal[n:] &= text[: start - n] == text[start - n]
            lengths += equal
        length = max(lengths.tolist(), default=0)
        at = int((lengths * _PLACES + torch.arange(start)).argmax()) if length else start - 1
        drafts[b] = text[at + 1 + torch.arange(drafts.shape[1]) % (start - at)]
        logs = torch.tensor([_LOGS[min(length + i, MOST)] for i in range(drafts.shape[1])])
        scores[b] = logs.cumsum(0)
    if clock is not None:
        mark_here(clock[2:3])


@triton.jit(do_not_specialize=["C", "P"])
def _lookup_kernel(
    history, state, slots, drafts, stride_d, scores, stride_s, clock, C, P,
    TILE: tl.constexpr, DRAFT: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """One seat. DRAFT >= P, a power of two."""
    i_b = tl.program_id(0).to(tl.int64)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(clock, 0)
            mark(clock, 1)
    slot = tl.load(slots + i_b).to(tl.int64)
    if slot >= 0:
        history += slot * C
        start = tl.minimum(tl.load(state + slot * STATE_COLUMNS + STATE_START), C - 1)
        o_p = tl.arange(0, TILE)
        b_best = tl.zeros((TILE,), tl.int32)
        for first in range(0, start, TILE):
            o_at = first + o_p
            b_equal = o_at < start
            b_length = tl.zeros((TILE,), tl.int32)
            for n in tl.static_range(_MOST):
                last = tl.load(history + start - n, mask=start >= n, other=-1)
                b_token = tl.load(history + o_at - n, mask=(o_at >= n) & (o_at < start), other=-2)
                b_equal = b_equal & (b_token == last)
                b_length += b_equal.to(tl.int32)
            b_best = tl.maximum(b_best, tl.where(b_length > 0, b_length * _PLACE_BITS + o_at, 0))
        best = tl.max(b_best, axis=0)
        at = tl.where(best > 0, best % _PLACE_BITS, start - 1)
        o_d = tl.arange(0, DRAFT)
        b_draft = tl.load(history + at + 1 + o_d % (start - at))
        tl.store(drafts + i_b * stride_d + o_d, b_draft.to(tl.int64), mask=o_d < P)
        b_score = tl.maximum(o_d + 1 - _MOST, 0) * _SCORES[_MOST]
        for i in tl.static_range(_MOST):
            log = tl.full((), _SCORES[_MOST], tl.float32)
            for n in tl.static_range(_MOST):
                log = tl.where(best // _PLACE_BITS + i == n, _SCORES[n], log)
            b_score += tl.where(o_d >= i, log, 0.0)
        tl.store(scores + i_b * stride_s + o_d, b_score, mask=o_d < P)
    if CLOCK:  # noqa: SIM102  at compile time, the next at run time
        if i_b == 0:
            mark(clock, 2)


def lookup_triton(
    history: Tensor, state: Tensor, slots: Tensor, drafts: Tensor, scores: Tensor,
    clock: Tensor | None = None,
) -> None:  # fmt: skip
    """`lookup` as one launch, a program a seat."""
    seats, p = drafts.shape
    assert len(slots) == seats and p > 0 and scores.shape == drafts.shape, (slots.shape, scores.shape)
    assert len(history) == len(state) and state.shape[1] == len(State), (history.shape, state.shape)
    assert 0 < history.shape[1] < _PLACES, history.shape
    tables = history, state, slots
    assert {t.dtype for t in tables} == {torch.int32}, [t.dtype for t in tables]
    assert (drafts.dtype, scores.dtype) == (torch.int64, torch.float32), (drafts.dtype, scores.dtype)
    assert all(t.is_contiguous() for t in tables), [t.stride() for t in tables]
    assert drafts.stride(1) == scores.stride(1) == 1, (drafts.stride(), scores.stride())
    tile = min(_TILE, max(triton.next_power_of_2(history.shape[1]), 32))
    _lookup_kernel[(seats,)](
        history=history, state=state, slots=slots, drafts=drafts, stride_d=drafts.stride(0), scores=scores,
        stride_s=scores.stride(0), clock=clock, C=history.shape[1], P=p, TILE=tile,
        DRAFT=triton.next_power_of_2(p), CLOCK=clock is not None, num_warps=max(tile // 512, 1),
    )  # fmt: skip
