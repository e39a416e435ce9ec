"""Summary of a row of logits: its `top` likeliest tokens and its log-sum-exp, group by group, then merged.

Every GROUP of 64 tokens leaves its likeliest one and the sum of exponentials below it. The merge, one program
a row, takes them together: the `top` likeliest tokens lie in the `top` groups whose likeliest ones are the
likeliest, and are found there, in the logits. For one token no logits are needed: `head` makes groups from
accumulators that never reach memory then. `summary_of_logits` takes written logits: the same bits.

A row's bits. Every reduction here has no order: a maximum, or a sum of integers. Exponentials are rounded to
multiples of 2^-24 of their group's largest, then to multiples of 2^-40 of the row's. So tile, warps and
register layout, which choose the order of a floating-point sum, may change with the number of rows. What is
elementwise holds no a * b + c with a rounded product, so that multiply-add contraction changes nothing.

Accuracy: 64 roundings of 2^-25 against a group's sum of at least 1, so 2^-19 of log-sum-exp at most, 2^-22
as a rule. Logits are ordered as torch.sort orders them: -0 equals 0, NaN is above all; ties go to the lowest
id. A row with a NaN has log-sum-exp NaN, one with +inf has +inf."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import tl, triton
from .pdl import launch_dependents, launch_options, wait
from .rows import NO_CONTRACTION

GROUP = 64  # tokens; 64 terms of at most 2^24 fit an int32
MOST = 128  # likeliest tokens at most: each one is two steps of the merge
_FEW = 32  # likeliest tokens up to which a merge has 4 warps, the fastest for 16; more lie in more registers
_LOGITS_TILE = 4096  # tokens a program of summary_of_logits
LEAST = tl.constexpr(-(1 << 31))  # below the image of every number: out of range
MINUS_INFINITY = tl.constexpr(-2139095041)  # images of the infinities
INFINITY = tl.constexpr(2139095040)
_NAN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def ordered(x):
    """int32 in the order of fp32 x: -0 equals 0, NaN is above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def unordered(key):
    """The fp32 number of an int32 of `ordered`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def finite_or_zero(x):
    """x, or 0 where it is infinite: what may be subtracted without making a NaN."""
    return tl.where((x > float("-inf")) & (x < float("inf")), x, 0.0)


@triton.jit
def in_order(key, id):
    """int64 in the order of (key rising, id falling), ids from 0 to 2^31 - 1."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)


@triton.jit
def summarise_tile(
    b_x, i_n, o_t, T, V, best, sums,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write what the merge needs of logits b_x [BLOCK_N, BLOCK_T] fp32: tokens i_n BLOCK_N + [0, BLOCK_N) of
    rows o_t [BLOCK_T].

    best int64, image and token of the likeliest as `in_order`, and sums int32 [T, groups], groups counted in
    whole tiles."""
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    o_g = i_n * GROUPS + tl.arange(0, GROUPS)
    o_v = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = (o_v < V)[:, None]
    # Reshaped, a group is an axis whatever the tile.
    b_key = tl.reshape(tl.where(in_range, ordered(b_x), LEAST), (GROUPS, GROUP, BLOCK_T))
    b_best, b_at = tl.max(b_key, axis=1, return_indices=True, return_indices_tie_break_left=True)
    # 0 for a group with a NaN, whose sum nobody asks for, and for one with no token, whose sum is 0
    b_max = finite_or_zero(unordered(b_best))
    b_g = tl.reshape(tl.where(in_range & (b_x == b_x), b_x, float("-inf")), (GROUPS, GROUP, BLOCK_T))
    b_e = tl.minimum(tl.exp(b_g - b_max[:, None, :]), 1.0)
    b_sum = tl.sum((b_e * 16777216.0 + 0.5).to(tl.int32), axis=1)
    p_g = o_t.to(tl.int64)[None, :] * (tl.cdiv(V, BLOCK_N) * GROUPS) + o_g[:, None]
    m_g = (o_t < T)[None, :]
    tl.store(best + p_g, in_order(b_best, o_g[:, None] * GROUP + b_at), mask=m_g)
    tl.store(sums + p_g, b_sum, mask=m_g)


@triton.jit
def best_of(b_key, b_id):
    """(image, id) of the best, the lowest id where images are equal: numbers of 32 bits, which a GPU reduces
    in one instruction."""
    key = tl.max(b_key, axis=0)
    return key, tl.min(tl.where(b_key == key, b_id, 0x7FFFFFFF), axis=0)


@triton.jit
def _merge_kernel(
    logits, s_t, best, sums, values, ids, log_sum_exp,
    V, groups,
    TOP: tl.constexpr, PDL: tl.constexpr, BLOCK_TOP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Program r: row r. logits: not read if TOP is 1."""
    if PDL:
        wait()
        launch_dependents()
    i_r = tl.program_id(0).to(tl.int64)
    o_g, o_top = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_TOP)
    NOTHING: tl.constexpr = -(1 << 63)
    b_best = tl.load(best + i_r * groups + o_g, mask=o_g < groups, other=NOTHING)
    b_sum = tl.load(sums + i_r * groups + o_g, mask=o_g < groups, other=0)
    likeliest = tl.max(b_best, axis=0)
    top = unordered((likeliest >> 32).to(tl.int32))
    if TOP == 1:
        tl.store(values + i_r, top)
        tl.store(ids + i_r, 0x7FFFFFFF - (likeliest & 0x7FFFFFFF))
    else:
        b_key, b_group = (b_best >> 32).to(tl.int32), tl.zeros((BLOCK_TOP,), tl.int32)
        for j in range(TOP):
            _, group = best_of(b_key, o_g)
            b_group = tl.where(o_top == j, group, b_group)
            b_key = tl.where(o_g == group, LEAST, b_key)
        # Where groups are fewer, one stands here several times. Its tokens, by their ids, are taken once.
        o_v = tl.reshape(b_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (BLOCK_TOP * GROUP,))
        m_v = (tl.arange(0, BLOCK_TOP * GROUP) < TOP * GROUP) & (o_v < V)
        b_x = tl.load(logits + i_r * s_t + o_v, mask=m_v, other=0.0)
        b_key = tl.where(m_v, ordered(b_x), LEAST)
        for j in range(TOP):
            first, token = best_of(b_key, o_v)
            tl.store(values + i_r * TOP + j, unordered(first))
            tl.store(ids + i_r * TOP + j, token.to(tl.int64))
            b_key = tl.where(o_v == token, LEAST, b_key)

    b_max = unordered((b_best >> 32).to(tl.int32))
    b_max = tl.where(b_max == b_max, b_max, float("-inf"))  # of no token, or of a NaN, which top is then
    b_share = tl.minimum(tl.exp(b_max - finite_or_zero(top)), 1.0)
    total = tl.sum((b_sum.to(tl.float32) * b_share * 65536.0).to(tl.int64), axis=0)
    # A total of 0 is a row of -inf alone; log(1) leaves it -inf.
    total = tl.where(total > 0, total.to(tl.float32) * 9.094947017729282e-13, 1.0)
    tl.store(log_sum_exp + i_r, top + tl.log(total))


@triton.jit(do_not_specialize=["T"])
def _logits_kernel(
    logits, s_t, best, sums, T, V,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (tile, row)."""
    i_n, i_r = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_x = tl.load(logits + i_r.to(tl.int64) * s_t + o_n, mask=o_n < V, other=float("-inf"))
    summarise_tile(tl.reshape(b_x, (BLOCK_N, 1)), i_n, i_r + tl.arange(0, 1), T, V, best, sums,
                   BLOCK_N, 1, GROUP)  # fmt: skip


Summary = tuple[Tensor, Tensor, Tensor]  # logits [T, top] fp32, ids [T, top] int64, log-sum-exp [T] fp32


@dataclass(frozen=True)
class Groups:
    """What the groups of `rows` rows leave for the merge. Nothing to fill: every launch writes all of it."""

    best: Tensor
    sums: Tensor

    @staticmethod
    def new(rows: int, vocabulary: int, width: int, device: torch.device) -> Groups:
        """Of tiles of `width` tokens."""
        groups = triton.cdiv(vocabulary, width) * (width // GROUP)
        best = torch.empty(rows, groups, dtype=torch.int64, device=device)
        return Groups(best, torch.empty(rows, groups, dtype=torch.int32, device=device))

    def merge(self, logits: Tensor | None, vocabulary: int, out: Summary, pdl: bool = False) -> None:
        """Write the summary of every row to `out`. logits [T, V] fp32; may be None where `out` holds one
        token a row. pdl: as a dependent launch (pdl.py)."""
        rows, groups = self.best.shape
        top = out[0].shape[1]
        assert top == 1 or logits is not None
        _merge_kernel[(rows,)](
            logits=logits, s_t=_row_stride(logits), best=self.best, sums=self.sums, values=out[0], ids=out[1],
            log_sum_exp=out[2], V=vocabulary, groups=groups, TOP=top, PDL=pdl,
            BLOCK_TOP=triton.next_power_of_2(top), BLOCK_GROUPS=triton.next_power_of_2(groups), GROUP=GROUP,
            num_warps=4 if 1 < top <= _FEW else 8, **NO_CONTRACTION, **launch_options(pdl),
        )  # fmt: skip


def _row_stride(logits: Tensor | None) -> int:
    """Always the same where there is no next row: one compilation."""
    if logits is None:
        return 0
    return logits.stride(0) if len(logits) > 1 else logits.shape[1]


def empty_summary(rows: int, vocabulary: int, top: int, device: torch.device, out: Summary | None) -> Summary:
    """`out`, checked, or a new one. Raises ValueError when `top` is not in 1..min(V, 128)."""
    if not 1 <= top <= min(vocabulary, MOST):
        raise ValueError(f"{top} likeliest tokens: must be in 1..{MOST}, the vocabulary has {vocabulary}")
    if out is None:
        values = torch.empty(rows, top, dtype=torch.float32, device=device)
        return values, values.new_empty(rows, top, dtype=torch.int64), values.new_empty(rows)
    assert [t.shape for t in out] == [(rows, top), (rows, top), (rows,)], [t.shape for t in out]
    assert [t.dtype for t in out] == [torch.float32, torch.int64, torch.float32], [t.dtype for t in out]
    assert all(t.is_contiguous() for t in out), [t.stride() for t in out]
    return out


def summary_of_logits(logits: Tensor, top: int, out: Summary | None = None) -> Summary:
    """(logits [T, top] fp32, ids [T, top] int64, likeliest first, log-sum-exp [T] fp32) of logits [T, V].

    Logits are fp32, their columns contiguous. Raises ValueError when `top` is not in 1..min(V, 128)."""
    rows, v = logits.shape
    out = empty_summary(rows, v, top, logits.device, out)
    if len(logits):
        groups_of(logits).merge(logits, v, out)
    return out


def groups_of(logits: Tensor) -> Groups:
    """Every group of written logits, not yet merged."""
    rows, v = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    width = min(_LOGITS_TILE, max(triton.next_power_of_2(v), GROUP))
    groups = Groups.new(rows, v, width, logits.device)
    _logits_kernel[(triton.cdiv(v, width), rows)](
        logits=logits, s_t=_row_stride(logits), best=groups.best, sums=groups.sums, T=rows, V=v,
        BLOCK_N=width, GROUP=GROUP, num_warps=4, **NO_CONTRACTION,
    )  # fmt: skip
    return groups
