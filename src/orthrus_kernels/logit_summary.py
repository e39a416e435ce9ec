"""Summary of a row of logits: its `top` likeliest tokens and its log-sum-exp, tile by tile, then merged.

A tile of the vocabulary leaves its likeliest tokens, and of every GROUP of 64 tokens the largest logit and
the sum of exponentials below it. The merge, one program a row, takes them together. `head` makes tiles from
accumulators that never reach memory, `summary_of_logits` from written logits: the same bits.

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
MOST = 128  # likeliest tokens at most: each one is another pass over the tile's registers
_LOGITS_TILE = 4096  # tokens a program of summary_of_logits
_LEAST = tl.constexpr(-(1 << 31))  # below the image of every number: out of range, or taken
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
def summarise_tile(
    b_x, i_n, o_t, T, V, candidates, maxima, sums,
    TOP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write what the merge needs of logits b_x [BLOCK_N, BLOCK_T] fp32: tokens i_n BLOCK_N + [0, BLOCK_N) of
    rows o_t [BLOCK_T].

    candidates [T, tiles, TOP] int64: image of the logit above, 2^31 - 1 - id below. maxima fp32 and sums
    int32 [T, groups], groups counted in whole tiles."""
    o_local = tl.arange(0, BLOCK_N)
    first = i_n * BLOCK_N
    tiles = tl.cdiv(V, BLOCK_N)
    o_row = o_t.to(tl.int64)
    m_t = o_t < T
    in_range = (first + o_local < V)[:, None]

    # Groups: reshaped, a group is an axis whatever the tile.
    GROUPS: tl.constexpr = BLOCK_N // GROUP
    b_g = tl.reshape(tl.where(in_range & (b_x == b_x), b_x, float("-inf")), (GROUPS, GROUP, BLOCK_T))
    b_max = tl.max(b_g, axis=1)
    b_e = tl.minimum(tl.exp(b_g - finite_or_zero(b_max)[:, None, :]), 1.0)
    b_sum = tl.sum((b_e * 16777216.0 + 0.5).to(tl.int32), axis=1)
    o_g = i_n * GROUPS + tl.arange(0, GROUPS)
    p_g = o_row[None, :] * (tiles * GROUPS) + o_g[:, None]
    tl.store(maxima + p_g, b_max, mask=m_t[None, :])
    tl.store(sums + p_g, b_sum, mask=m_t[None, :])

    b_key = tl.where(in_range, ordered(b_x), _LEAST)
    p_c = candidates + (o_row * tiles + i_n) * TOP
    for j in range(TOP):
        b_top, b_at = tl.max(b_key, axis=0, return_indices=True, return_indices_tie_break_left=True)
        packed = (b_top.to(tl.int64) << 32) | (0x7FFFFFFF - (first + b_at)).to(tl.int64)
        tl.store(p_c + j, packed, mask=m_t)
        b_key = tl.where(o_local[:, None] == b_at[None, :], _LEAST, b_key)


@triton.jit
def _merge_kernel(
    candidates, maxima, sums, values, ids, log_sum_exp,
    tiles, groups, tile_width,
    TOP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_TOP: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Program r: row r."""
    if PDL:
        wait()
        launch_dependents()
    i_r = tl.program_id(0).to(tl.int64)
    o_tile, o_top = tl.arange(0, BLOCK_TILES), tl.arange(0, BLOCK_TOP)
    p_c = candidates + i_r * tiles * TOP
    NOTHING: tl.constexpr = -(1 << 63)
    # A tile's candidates fall in order, so the best of all is among the tiles' first ones that are left.
    b_first = tl.load(p_c + o_tile * TOP, mask=o_tile < tiles, other=NOTHING)
    likeliest = tl.max(b_first, axis=0)
    for j in range(TOP):
        best = tl.max(b_first, axis=0)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        tl.store(values + i_r * TOP + j, unordered((best >> 32).to(tl.int32)))
        tl.store(ids + i_r * TOP + j, token.to(tl.int64))
        i_tile = token // tile_width
        b_c = tl.load(p_c + i_tile * TOP + o_top, mask=o_top < TOP, other=NOTHING)
        after = tl.max(tl.where(b_c < best, b_c, NOTHING), axis=0)
        b_first = tl.where(o_tile == i_tile, after, b_first)

    o_g = tl.arange(0, BLOCK_GROUPS)
    b_max = tl.load(maxima + i_r * groups + o_g, mask=o_g < groups, other=float("-inf"))
    b_sum = tl.load(sums + i_r * groups + o_g, mask=o_g < groups, other=0)
    largest = tl.max(b_max, axis=0)
    b_share = tl.minimum(tl.exp(b_max - finite_or_zero(largest)), 1.0)
    total = tl.sum((b_sum.to(tl.float32) * b_share * 65536.0).to(tl.int64), axis=0)
    # A total of 0 is a row of -inf alone; log(1) leaves it -inf.
    total = tl.where(total > 0, total.to(tl.float32) * 9.094947017729282e-13, 1.0)
    answer = largest + tl.log(total)
    top = unordered((likeliest >> 32).to(tl.int32))
    tl.store(log_sum_exp + i_r, tl.where(top != top, top, answer))


@triton.jit(do_not_specialize=["T"])
def _logits_kernel(
    logits, s_t, candidates, maxima, sums, T, V,
    TOP: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (tile, row)."""
    i_n, i_r = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_x = tl.load(logits + i_r.to(tl.int64) * s_t + o_n, mask=o_n < V, other=float("-inf"))
    summarise_tile(tl.reshape(b_x, (BLOCK_N, 1)), i_n, i_r + tl.arange(0, 1), T, V, candidates, maxima, sums,
                   TOP, BLOCK_N, 1, GROUP)  # fmt: skip


Summary = tuple[Tensor, Tensor, Tensor]  # logits [T, top] fp32, ids [T, top] int64, log-sum-exp [T] fp32


@dataclass(frozen=True)
class Tiles:
    """What tiles of `width` tokens leave of `rows` rows for the merge. Nothing to fill: every launch writes
    all of it."""

    width: int
    candidates: Tensor
    maxima: Tensor
    sums: Tensor

    @staticmethod
    def new(rows: int, vocabulary: int, width: int, top: int, device: torch.device) -> Tiles:
        tiles = triton.cdiv(vocabulary, width)
        return Tiles(
            width,
            torch.empty(rows, tiles, top, dtype=torch.int64, device=device),
            torch.empty(rows, tiles * (width // GROUP), dtype=torch.float32, device=device),
            torch.empty(rows, tiles * (width // GROUP), dtype=torch.int32, device=device),
        )

    def merge(self, out: Summary, pdl: bool = False) -> None:
        """Write the summary of every row to `out`. pdl: as a dependent launch (pdl.py)."""
        rows, tiles, top = self.candidates.shape
        groups = self.maxima.shape[1]
        _merge_kernel[(rows,)](
            candidates=self.candidates, maxima=self.maxima, sums=self.sums, values=out[0], ids=out[1],
            log_sum_exp=out[2], tiles=tiles, groups=groups, tile_width=self.width, TOP=top, PDL=pdl,
            BLOCK_TOP=triton.next_power_of_2(top), BLOCK_TILES=triton.next_power_of_2(tiles),
            BLOCK_GROUPS=triton.next_power_of_2(groups), num_warps=8, **NO_CONTRACTION,
            **launch_options(pdl),
        )  # fmt: skip


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
        logit_tiles(logits, top).merge(out)
    return out


def logit_tiles(logits: Tensor, top: int) -> Tiles:
    """Every tile of written logits, not yet merged."""
    rows, v = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    width = min(_LOGITS_TILE, max(triton.next_power_of_2(v), GROUP))
    tiles = Tiles.new(rows, v, width, top, logits.device)
    _logits_kernel[(triton.cdiv(v, width), rows)](
        logits=logits, s_t=logits.stride(0) if rows > 1 else v, candidates=tiles.candidates,
        maxima=tiles.maxima, sums=tiles.sums, T=rows, V=v, TOP=top, BLOCK_N=width, GROUP=GROUP, num_warps=4,
        **NO_CONTRACTION,
    )  # fmt: skip
    return tiles
