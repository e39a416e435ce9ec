"""Linear layer over the rows of both views: y = x W^T, AR rows by W, diffusion rows by W_diff. One launch.

Shapes: x [T, K], W and W_diff [N, K], y [T, N]. Products and sums in fp32, rounded once to
`out_dtype`. Moves the weight once (both when both views have rows), T K of x for every N tile (from L2) and
T N of y.

A row's bits. K is cut into `segments` runs of `block_k` columns; each is summed from zero, and the sums are
added in index order. Both numbers depend on (N, K, dtype, device) alone. With few rows one CTA takes one
segment of a tile, and the CTA that arrives last adds the partials; with many rows one CTA runs the segments
one after another. Weights are the M side of every dot, so that one row of x is a column of the accumulator,
whatever is beside it. A row tile is of one view only: tiles are cut at n_ar.

Tiles reach shared memory by pointers (cp.async, every GPU) or by descriptors (TMA: registers of the
accumulators alone). Which of them changes no bits.

With PDL (pdl.py) a launch starts while the kernel before it ends, and asks L2 for the first columns of its
weight tile, which no earlier kernel computes; x, partials and y are touched after the wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import tables
from ._triton import tl, triton
from .coded_rows import Rows
from .descriptors import describable, described
from .pdl import launch_dependents, launch_options, wait
from .quantised_triton import check_rows, check_together, compiled_for, row_operands, sum_by_groups
from .tiles import by_row_tile
from .weight import (
    AnyWeight,
    Weight,
    add_product,
    by_view,
    load_weight,
    load_weight_by_tma,
    prefetch_weight,
    product_of,
)  # fmt: skip
from .workspace import Workspace, workspace

# Row tiles that walk down the weight together: their weight tiles are read from DRAM once and shared in L2.
GROUP_T = 8
# Partials a thread of the adding CTA loads before it needs the first: their registers, of at most 255 a
# thread with 4 warps (two CTAs on a multiprocessor) and 128 with 8.
_LOADS_IN_FLIGHT = {4: 128, 8: 64}


def _launch_metadata(grid, kernel, args):
    """Name, flops and bytes for Triton's profiler."""
    t, n, k = args["T"], args["N"], args["K"]
    x = args["x"].base if args["TMA"] else args["x"]
    views = 2 if 0 < args["n_ar"] < t else 1
    weight = sum(args[part].nbytes for part in ("p_w", "factors") if args[part] is not None)
    return {
        "name": f"linear_{t}x{n}x{k}",
        "flops": 2 * t * n * k,
        "bytes": views * weight + x.element_size() * t * k + args["y"].element_size() * t * n,
    }


@triton.jit
def sum_by_pointers(w, sw_n, x, sx_t, o_n, o_t, end_row, first, last, N, K, BLOCK_N: tl.constexpr,
                     BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                     EVEN_K: tl.constexpr):  # fmt: skip
    """Sum of columns [first, last) * BLOCK_K from zero: [BLOCK_N, BLOCK_T] fp32."""
    o_k = tl.arange(0, BLOCK_K)
    m_n = (o_n < N)[:, None]
    m_t = (o_t < end_row)[None, :]
    p_w = w + o_n.to(tl.int64)[:, None] * sw_n + first * BLOCK_K + o_k[None, :]
    p_x = x + o_t.to(tl.int64)[None, :] * sx_t + first * BLOCK_K + o_k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i_k in tl.range(first, last, num_stages=STAGES):
        if EVEN_K:
            b_w = load_weight(p_w, m_n)
            b_x = tl.load(p_x, mask=m_t, other=0.0)
        else:
            m_k = i_k * BLOCK_K + o_k < K
            b_w = load_weight(p_w, m_n & m_k[None, :])
            b_x = tl.load(p_x, mask=m_t & m_k[:, None], other=0.0)
        acc = add_product(acc, b_w, b_x)
        p_w += BLOCK_K
        p_x += BLOCK_K
    return acc


@triton.jit
def _sum_by_tma(w, x, x_tail, first_n, first_row, first, last, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
                TAIL_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The same sum through descriptors, and that of the TAIL_T rows that follow (if none, the first again).

    Rows of the other view, what memory holds behind x, and zeros behind that may be read: they are columns of
    the accumulator that nobody stores."""
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if TAIL_T:
        tail = tl.zeros((BLOCK_N, TAIL_T), tl.float32)
        for i_k in tl.range(first, last, num_stages=STAGES):
            b_w = load_weight_by_tma(w, first_n, i_k * BLOCK_K)
            acc = add_product(acc, b_w, x.load([first_row, i_k * BLOCK_K]).T)
            b_tail = x_tail.load([first_row + BLOCK_T, i_k * BLOCK_K])
            tail = add_product(tail, b_w, b_tail.T)
        return acc, tail
    else:
        for i_k in tl.range(first, last, num_stages=STAGES):
            b_w = load_weight_by_tma(w, first_n, i_k * BLOCK_K)
            acc = add_product(acc, b_w, x.load([first_row, i_k * BLOCK_K]).T)
        return acc, acc


@triton.jit
def _segment(
    x, x_tail, sx_t, x_scale, ss_g, w, w_diff, sw_n, factors, is_ar, i_n, first_row, end_row, i_s, N, K,
    SEGMENTS: tl.constexpr, TMA: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr,
    FACTOR_ROWS: tl.constexpr, ASM: tl.constexpr, CODES_A_WORD: tl.constexpr, AT_ONCE: tl.constexpr,
    VIEWS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    TAIL_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum of segment i_s: [BLOCK_N, BLOCK_T] and [BLOCK_N, TAIL_T] fp32."""
    blocks = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(blocks, SEGMENTS)
    first, last = i_s * each, tl.minimum((i_s + 1) * each, blocks)
    first_n = i_n * BLOCK_N
    if TMA:
        w_view = w
        if VIEWS == 2:  # noqa: SIM102  at compile time, the next at run time
            if not is_ar:  # neither tl.where nor a conditional expression takes descriptors
                w_view = w_diff
        acc, tail = _sum_by_tma(w_view, x, x_tail, first_n, first_row, first, last,
                                BLOCK_N, BLOCK_T, TAIL_T, BLOCK_K, STAGES)  # fmt: skip
        return acc, tail
    else:
        o_n, o_t = first_n + tl.arange(0, BLOCK_N), first_row + tl.arange(0, BLOCK_T)
        w_view = tl.where(is_ar, w, w_diff)
        if FORMAT is None:
            acc = sum_by_pointers(w_view, sw_n, x, sx_t, o_n, o_t, end_row, first, last, N, K,
                                  BLOCK_N, BLOCK_T, BLOCK_K, STAGES, EVEN_K)  # fmt: skip
        else:
            acc = sum_by_groups(w_view, sw_n, factors, x, sx_t, x_scale, ss_g, o_n, o_t, end_row, first, last,
                                N, FORMAT, ZEROS, FACTOR_ROWS, ASM, CODES_A_WORD, AT_ONCE, BLOCK_N, BLOCK_T,
                                BLOCK_K, STAGES)  # fmt: skip
        return acc, acc


@triton.jit
def _store_rows(y, sy_t, acc, i_n, first_row, end_row, N, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Store an accumulator [BLOCK_N, BLOCK_T] as rows of y."""
    o_n, o_t = i_n * BLOCK_N + tl.arange(0, BLOCK_N), first_row + tl.arange(0, BLOCK_T)
    p_y = y + o_t.to(tl.int64)[None, :] * sy_t + o_n[:, None]
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=(o_t < end_row)[None, :] & (o_n < N)[:, None])


@triton.jit
def _store_partial(p, acc, rows, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Store an accumulator [BLOCK_N, BLOCK_T] as `rows` rows of BLOCK_N: the order in which y is written."""
    o_n, o_t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    tl.store(p + o_t[None, :] * BLOCK_N + o_n[:, None], acc, mask=(o_t < rows)[None, :])


@triton.jit(do_not_specialize=["T", "n_ar", "prefetch"], launch_metadata=_launch_metadata)
def _linear_kernel(
    x, x_tail, sx_t, x_scale, ss_g, w, w_diff, p_w, p_w_diff, sw_n, factors, factors_diff, y, sy_t, partials,
    counters, T, n_ar, N, K, prefetch,
    SEGMENTS: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, FORMAT: tl.constexpr,
    ZEROS: tl.constexpr, FACTOR_ROWS: tl.constexpr, ASM: tl.constexpr, CODES_A_WORD: tl.constexpr,
    AT_ONCE: tl.constexpr, VIEWS: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, TAIL_T: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, segment) if SPLIT, else (tile, 0). TMA: x, x_tail, w and w_diff are descriptors,
    w_diff None if VIEWS is 1; else they are pointers. p_w, p_w_diff: pointers always. FORMAT: of quantised
    weights, with their factors. PDL: `prefetch` numbers of each row of the weight, words
    of a quantised one, are asked for while the kernel before this one ends."""
    TILE_T: tl.constexpr = BLOCK_T + TAIL_T
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_ar = tl.cdiv(n_ar, TILE_T)
    tiles_t = tiles_ar + tl.cdiv(T - n_ar, TILE_T)
    i_tile = tl.program_id(0)
    first_t = i_tile // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_t - first_t, GROUP)
    in_group = i_tile % (GROUP * tiles_n)
    i_t = first_t + in_group % group
    i_n = in_group // group
    is_ar = i_t < tiles_ar
    first_row = tl.where(is_ar, i_t * TILE_T, n_ar + (i_t - tiles_ar) * TILE_T)
    end_row = tl.where(is_ar, n_ar, T)

    if FORMAT is not None:
        factors = tl.where(is_ar, factors, factors_diff)
    if PDL:
        launch_dependents()
        prefetch_weight(tl.where(is_ar, p_w, p_w_diff), sw_n, i_n, tl.program_id(1), N,
                        K // CODES_A_WORD, prefetch, SEGMENTS, BLOCK_N, BLOCK_K // CODES_A_WORD)  # fmt: skip
        wait()  # x, y, partials and counters may be in use until here
    if SPLIT:
        i_s = tl.program_id(1)
        acc, tail = _segment(x, x_tail, sx_t, x_scale, ss_g, w, w_diff, sw_n, factors, is_ar, i_n, first_row,
                             end_row, i_s, N, K, SEGMENTS, TMA, FORMAT, ZEROS, FACTOR_ROWS, ASM, CODES_A_WORD,
                             AT_ONCE, VIEWS, EVEN_K, BLOCK_N, BLOCK_T, TAIL_T, BLOCK_K, STAGES)  # fmt: skip
        rows = end_row - first_row
        p_part = partials + i_tile.to(tl.int64) * (SEGMENTS * TILE_T * BLOCK_N)
        p_own = p_part + i_s * (TILE_T * BLOCK_N)
        _store_partial(p_own, acc, rows, BLOCK_N, BLOCK_T)
        if TAIL_T:
            _store_partial(p_own + BLOCK_T * BLOCK_N, tail, rows - BLOCK_T, BLOCK_N, TAIL_T)
        tl.debug_barrier()  # every thread's partial is written before one thread publishes it
        if tl.atomic_add(counters + i_tile, 1, sem="acq_rel") == SEGMENTS - 1:
            # A chunk at a time: all its partials are in flight at once, and registers suffice.
            o_n = tl.arange(0, BLOCK_N)
            m_n = (i_n * BLOCK_N + o_n < N)[None, :]
            for c in range(0, tl.minimum(rows, TILE_T), CHUNK_T):
                o_c = c + tl.arange(0, CHUNK_T)
                m_c = (o_c < rows)[:, None]
                p_c = p_part + o_c[:, None] * BLOCK_N + o_n[None, :]
                total = tl.zeros((CHUNK_T, BLOCK_N), tl.float32)
                for s in tl.static_range(SEGMENTS):  # .cg: L1 may hold an older launch's partials
                    p_s = p_c + s * (TILE_T * BLOCK_N)
                    total += tl.load(p_s, mask=m_c, other=0.0, cache_modifier=".cg")
                p_y = y + (first_row + o_c).to(tl.int64)[:, None] * sy_t + i_n * BLOCK_N + o_n[None, :]
                tl.store(p_y, total.to(y.dtype.element_ty), mask=m_c & m_n)
            tl.store(counters + i_tile, 0)  # ready for the next launch
    else:
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        total_tail = tl.zeros((BLOCK_N, TAIL_T if TAIL_T else BLOCK_T), tl.float32)
        for i_s in range(SEGMENTS):  # not unrolled: copies of the loop would spill
            acc, tail = _segment(x, x_tail, sx_t, x_scale, ss_g, w, w_diff, sw_n, factors, is_ar, i_n,
                                 first_row, end_row, i_s, N, K, SEGMENTS, TMA, FORMAT, ZEROS, FACTOR_ROWS,
                                 ASM, CODES_A_WORD, AT_ONCE, VIEWS, EVEN_K, BLOCK_N, BLOCK_T, TAIL_T, BLOCK_K,
                                 STAGES)  # fmt: skip
            total += acc
            if TAIL_T:
                total_tail += tail
        _store_rows(y, sy_t, total, i_n, first_row, end_row, N, BLOCK_N, BLOCK_T)
        if TAIL_T:
            _store_rows(y, sy_t, total_tail, i_n, first_row + BLOCK_T, end_row, N, BLOCK_N, TAIL_T)


def linear_triton(
    x: Rows, weight: AnyWeight, weight_diff: AnyWeight | None = None, n_ar: int | None = None,
    out_dtype: torch.dtype | None = None, *, out: Tensor | None = None,
    entry: tables.LinearEntry | None = None, space: Workspace | None = None, pdl: bool = False,
    early: bool = True,
) -> Tensor:  # fmt: skip
    """`linear` as one Triton launch, or one a view; `out` [T, N] takes the result. x and weights share one
    dtype. Rows for weights that round them are rounded in a launch before, unless they come as codes.

    entry: in place of the table's, for tuning. space: for launches on a second stream. pdl: as a dependent
    launch (pdl.py); with early=False this one starts in its turn, since early it holds registers and memory
    that the one in front needs, and only lets the next one start early. x and out have contiguous columns."""
    check_shapes(x, weight, weight_diff)
    rows, (n, k) = x.shape[0], weight.shape
    if weight_diff is None or n_ar is None or n_ar == rows:
        weight_diff, n_ar = weight, rows
    elif n_ar == 0:
        weight, n_ar = weight_diff, rows
    out = torch.empty(rows, n, dtype=out_dtype or x.dtype, device=x.device) if out is None else out
    assert out_dtype is None or out.dtype == out_dtype, (out.dtype, out_dtype)
    _check(x, weight, weight_diff, n_ar, out)
    if rows == 0:
        return out
    given, device = entry, tables.device_key(x.device)
    entry = given or tables.linear_entry(n, k, x.dtype, device, weight.scheme)
    wide = entry.apart is not None and max(n_ar, rows - n_ar) > entry.apart
    if 0 < n_ar < rows and (wide or weight.scheme != weight_diff.scheme):
        how: dict[str, Any] = {"entry": given, "space": space, "pdl": pdl, "early": early}
        linear_triton(x[:n_ar], weight, out=out[:n_ar], **how)
        linear_triton(x[n_ar:], weight_diff, out=out[n_ar:], **how)
        return out
    check_together(entry, weight, weight_diff)
    tile = entry.tile(max(n_ar, rows - n_ar))
    operands = row_operands(x, pdl, weight, weight_diff)
    by_rows = operands["x"], operands["x"].stride(0) if rows > 1 else k
    if tile.tma and not (describable(by_rows) and weight.describable and weight_diff.describable):
        tile = replace(tile, tma=False, block_t=tile.block_t & -tile.block_t)  # 3 * 2^k to 2^k
    block_t = _power_of_two_up_to(tile.block_t)
    tail_t = tile.block_t - block_t
    assert not tail_t or (tile.tma and 2 * tail_t == block_t), tile
    tiles_t = triton.cdiv(n_ar, tile.block_t) + triton.cdiv(rows - n_ar, tile.block_t)
    tiles = triton.cdiv(n, tile.block_n) * tiles_t
    space = space or workspace(x.device)
    split = tile.split and entry.segments > 1
    split = split and space.fits(tiles, tiles * entry.segments * tile.block_n * tile.block_t)
    loads = _LOADS_IN_FLIGHT.get(tile.warps, 32) * 32 * tile.warps
    chunk = _power_of_two_up_to(loads // (entry.segments * tile.block_n))
    can_prefetch = weight.can_prefetch and weight_diff.can_prefetch
    ahead = tile.prefetch * entry.block_k // weight.codes_a_word if can_prefetch and early else 0
    views = 2 if tile.tma and weight_diff is not weight else 1
    operands |= {"x_tail": None, "w": weight.pointer, "w_diff": weight_diff.pointer}
    if tile.tma:
        assert isinstance(weight, Weight) and isinstance(weight_diff, Weight)
        operands |= {
            "x": described(*by_rows, block_t, entry.block_k),
            "x_tail": described(*by_rows, tail_t, entry.block_k) if tail_t else None,
            "w": weight.described(tile.block_n, entry.block_k),
            "w_diff": weight_diff.described(tile.block_n, entry.block_k) if views == 2 else None,
        }
    _linear_kernel[(tiles, entry.segments if split else 1)](
        **operands, sx_t=by_rows[1], p_w=weight.pointer, p_w_diff=weight_diff.pointer, sw_n=weight.row_stride,
        factors=weight.factors, factors_diff=weight_diff.factors, y=out,
        sy_t=out.stride(0) if rows > 1 else n, partials=space.partials, counters=space.counters,
        T=rows, n_ar=n_ar, N=n, K=k, prefetch=ahead, SEGMENTS=entry.segments, SPLIT=split, TMA=tile.tma,
        PDL=pdl, **compiled_for(weight, entry, tile), VIEWS=views, EVEN_K=k % entry.block_k == 0,
        GROUP=GROUP_T, BLOCK_N=tile.block_n, BLOCK_T=block_t, TAIL_T=tail_t, BLOCK_K=entry.block_k,
        CHUNK_T=min(chunk, tail_t or block_t), STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(pdl and early),
    )  # fmt: skip
    return out


def _check(x: Rows, weight: AnyWeight, weight_diff: AnyWeight, n_ar: int, out: Tensor) -> None:
    """What the kernel takes as given."""
    rows, n = x.shape[0], weight.shape[0]
    check_rows(x, weight, weight_diff)
    assert 0 <= n_ar <= rows and out.shape == (rows, n), (n_ar, rows, out.shape)
    assert x.dtype == weight.dtype == weight_diff.dtype, (x.dtype, weight.dtype, weight_diff.dtype)
    assert x.stride(1) == out.stride(1) == 1, (x.stride(1), out.stride())


def _power_of_two_up_to(n: int) -> int:
    return 1 << max(n, 1).bit_length() - 1


def check_shapes(x: Rows, weight: AnyWeight, weight_diff: AnyWeight | None) -> None:
    """Raises ValueError when x [T, K] and the weights [N, K] do not fit together."""
    if x.shape[1] != weight.shape[1] or (weight_diff is not None and weight_diff.shape != weight.shape):
        raise ValueError(
            f"linear: x {tuple(x.shape)}, weight {weight.shape}, weight_diff "
            f"{weight_diff and weight_diff.shape} do not fit together"
        )


def linear(
    x: Tensor, weight: AnyWeight, weight_diff: AnyWeight | None = None, n_ar: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Multiply rows [0, n_ar) by `weight` and the rest by `weight_diff`; all rows by `weight` when that is
    None.

    Raises ValueError when shapes disagree or diffusion rows come without their weight."""
    check_shapes(x, weight, weight_diff)
    out_dtype = out_dtype or x.dtype

    def one_view(rows: Tensor, w: AnyWeight) -> Tensor:
        product = product_of(w)
        return by_row_tile(lambda tile: product(tile.float()).to(out_dtype), rows)

    return by_view(one_view, x, weight, weight_diff, n_ar)
