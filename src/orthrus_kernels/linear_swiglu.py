"""SwiGLU in the epilogue of the gate and up projections: y = swiglu(x W^T), without the projections in
memory.

Shapes: x [T, E], gate_up [2F, E] (the gate's F rows, then the up projection's), y [T, F]. Sums in fp32; gate
and up rounded to x's dtype, then as in swiglu.py. Moves 2 F E weight elements, T E of x for every weight tile
(from L2) and T F of y.

A row's bits are those of `swiglu_triton(linear_triton(x, gate_up))`: the reduction class of gate_up in the
linear table, its segments one after another in one CTA, and one definition of the rounding (`silu_times`).
A tile is of equally many gate rows and up rows, in one CTA against one tile of x:

- by pointers one dot, in which 8 gate rows and the 8 up rows that belong to them take turns: a thread of a
  tensor-core accumulator holds rows 8 apart, so that it finds both factors in its own registers;
- by descriptors (TMA) two dots, since a descriptor fetches neighbouring rows only.

More rows than the entry's `apart` go through the two kernels, whose tiles suit them better."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import tables
from ._triton import tl, triton
from .coded_rows import Rows
from .descriptors import describable, described
from .linear import GROUP_T, check_shapes, linear, linear_triton, sum_by_pointers
from .pdl import launch_dependents, launch_options, wait
from .quantised import Scheme
from .quantised_triton import check_rows, check_together, compiled_for, row_operands, sum_by_groups
from .rows import NO_CONTRACTION, new_rows
from .swiglu import silu_times, swiglu, swiglu_triton
from .tables import LinearEntry, LinearTile
from .weight import AnyWeight, Weight, add_product, load_weight_by_tma, prefetch_weight

# wgmma takes 64 rows of the weight at least, each of the two dots by descriptors its own.
_LEAST_TMA_ROWS = 2 * 64
# In fp32 the accumulator is no tensor core's, and pairing wider tiles spills on sm_90.
_ROWS_32_BIT = 32
# Numbers a thread of each accumulator where there are two, a segment's and their sum; 128 spill on sm_90.
_TWO_ACCUMULATORS = 96
# Where the sum of a group of two codes is a third.
_THREE_ACCUMULATORS = 48


# Fastest or within 2 % of it at 1, 8, 32, 64, 128 rows of 8B, 4B, 1.7B, all ahead of the two kernels (H100,
# triton 3.6.0, bench/LOG.md, 2026-11-26); at 192 rows of 8B the two are ahead by 9 %.
_TILES_SM_90 = (
    LinearTile(16, 16, 64, False, 4, 6),
    LinearTile(32, 32, 64, False, 4, 6),
    LinearTile(64, 64, 128, False, 4, 4, tma=True),
    LinearTile(None, 128, 128, False, 4, 3, tma=True),
)
_MOST_ROWS = 128


def swiglu_entry(
    n: int, k: int, dtype: torch.dtype, device: str, scheme: Scheme | None = None
) -> LinearEntry:
    """The reduction class of gate_up [n, k] with tiles of this kernel: measured ones on sm_90 in 16 bits, or
    those of the linear table made fit. block_n counts gate and up rows together, row tiles are powers of two,
    segments are never split over CTAs. apart: rows beyond which the two kernels are taken, None of a gate_up
    that rounds its rows. scheme: of a quantised gate_up."""
    of = tables.linear_entry(n, k, dtype, device, scheme)
    device = "sm_90" if device == "cpu" else device
    rounds = scheme is not None and scheme.rounds

    def own(tile: LinearTile) -> LinearTile:
        block_t = 1 << tile.block_t.bit_length() - 1
        block_n = max(tile.block_n, _LEAST_TMA_ROWS if tile.tma else 32)
        if dtype == torch.float32:
            block_n = _ROWS_32_BIT
        most = _THREE_ACCUMULATORS if rounds else _TWO_ACCUMULATORS
        while of.segments > 1 and block_t * block_n > most * 32 * tile.warps:
            block_t //= 2
        return replace(tile, block_t=block_t, block_n=block_n, split=False)

    measured = device == "sm_90" and dtype.itemsize == 2 and scheme is None
    tiles = _TILES_SM_90 if measured else of.tiles
    entry = replace(of, tiles=tuple(map(own, tiles)), apart=None if rounds else _MOST_ROWS)
    return tables.fitted(entry, dtype, device, scheme)


def _launch_metadata(grid, kernel, args):
    """Name, flops and bytes for Triton's profiler."""
    t, f, k = args["T"], args["F"], args["K"]
    weight = sum(args[part].nbytes for part in ("p_w", "factors") if args[part] is not None)
    return {
        "name": f"linear_swiglu_{t}x{f}x{k}",
        "flops": 4 * t * f * k,
        "bytes": weight + args["y"].element_size() * (t * k + t * f),
    }


@triton.jit
def _gate_and_up_by_pointers(x, sx_t, x_scale, ss_g, w, sw_n, factors, first_h, first_row, T, F, K,
                             SEGMENTS: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr,
                             FACTOR_ROWS: tl.constexpr, ASM: tl.constexpr, CODES_A_WORD: tl.constexpr,
                             AT_ONCE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_H: tl.constexpr,
                             BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums of BLOCK_H gate rows and of their up rows: two blocks [BLOCK_H, BLOCK_T] fp32."""
    o_n = tl.arange(0, 2 * BLOCK_H)
    o_h = first_h + o_n // 16 * 8 + o_n % 8
    o_w = tl.where(o_n % 16 < 8, o_h, F + o_h)  # past the gate's last row lie up rows, which nobody stores
    o_t = first_row + tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(blocks, SEGMENTS)
    total = tl.zeros((2 * BLOCK_H, BLOCK_T), tl.float32)
    for i_s in range(SEGMENTS):
        first, last = i_s * each, tl.minimum((i_s + 1) * each, blocks)
        if FORMAT is None:
            total += sum_by_pointers(w, sw_n, x, sx_t, o_w, o_t, T, first, last, 2 * F, K,
                                     2 * BLOCK_H, BLOCK_T, BLOCK_K, STAGES, EVEN_K)  # fmt: skip
        else:
            total += sum_by_groups(w, sw_n, factors, x, sx_t, x_scale, ss_g, o_w, o_t, T, first, last, 2 * F,
                                   FORMAT, ZEROS, FACTOR_ROWS, ASM, CODES_A_WORD, AT_ONCE, 2 * BLOCK_H,
                                   BLOCK_T, BLOCK_K, STAGES)  # fmt: skip
    pairs = total.reshape(BLOCK_H // 8, 2, 8, BLOCK_T).permute(0, 2, 3, 1)
    gate, up = tl.split(pairs)
    return gate.reshape(BLOCK_H, BLOCK_T), up.reshape(BLOCK_H, BLOCK_T)


@triton.jit
def _gate_and_up_by_tma(x, w, first_h, first_row, F, K, SEGMENTS: tl.constexpr, BLOCK_H: tl.constexpr,
                        BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The same through descriptors of tiles [BLOCK_T, BLOCK_K] and [BLOCK_H, BLOCK_K]; what they read behind
    the tensors, nobody stores."""
    blocks = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(blocks, SEGMENTS)
    gate = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    up = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
    for i_s in range(SEGMENTS):
        acc_gate = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
        acc_up = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
        for i_k in tl.range(i_s * each, tl.minimum((i_s + 1) * each, blocks), num_stages=STAGES):
            b_x = x.load([first_row, i_k * BLOCK_K]).T
            b_gate = load_weight_by_tma(w, first_h, i_k * BLOCK_K)
            acc_gate = add_product(acc_gate, b_gate, b_x)
            b_up = load_weight_by_tma(w, F + first_h, i_k * BLOCK_K)
            acc_up = add_product(acc_up, b_up, b_x)
        gate += acc_gate
        up += acc_up
    return gate, up


@triton.jit(do_not_specialize=["T", "prefetch"], launch_metadata=_launch_metadata)
def _linear_swiglu_kernel(
    x, sx_t, x_scale, ss_g, w, p_w, sw_n, factors, y, sy_t,
    T, F, K, prefetch,
    SEGMENTS: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr,
    FACTOR_ROWS: tl.constexpr, ASM: tl.constexpr, CODES_A_WORD: tl.constexpr, AT_ONCE: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile). TMA: x and w are descriptors, else pointers; p_w: a pointer always. FORMAT, factors
    and PDL as in linear.py."""
    tiles_t, tiles_h = tl.cdiv(T, BLOCK_T), tl.cdiv(F, BLOCK_H)
    i_tile = tl.program_id(0)
    i_t, i_h = tl.swizzle2d(i_tile // tiles_h, i_tile % tiles_h, tiles_t, tiles_h, GROUP)
    first_h, first_row = i_h * BLOCK_H, i_t * BLOCK_T
    if PDL:
        columns = K // CODES_A_WORD
        BLOCK: tl.constexpr = BLOCK_K // CODES_A_WORD
        prefetch_weight(p_w, sw_n, i_h, 0, F, columns, prefetch, 1, BLOCK_H, BLOCK)
        p_up = p_w + tl.cast(F, tl.int64) * sw_n
        prefetch_weight(p_up, sw_n, i_h, 0, F, columns, prefetch, 1, BLOCK_H, BLOCK)
        wait()  # x and y may be in use until here
    if TMA:
        gate, up = _gate_and_up_by_tma(x, w, first_h, first_row, F, K,
                                       SEGMENTS, BLOCK_H, BLOCK_T, BLOCK_K, STAGES)  # fmt: skip
    else:
        gate, up = _gate_and_up_by_pointers(x, sx_t, x_scale, ss_g, w, sw_n, factors, first_h, first_row, T,
                                            F, K, SEGMENTS, FORMAT, ZEROS, FACTOR_ROWS, ASM, CODES_A_WORD,
                                            AT_ONCE, EVEN_K, BLOCK_H, BLOCK_T, BLOCK_K, STAGES)  # fmt: skip
    if PDL:
        launch_dependents()  # not before: a linear comes next, and would need the place of this one
    dtype: tl.constexpr = y.dtype.element_ty
    b_y = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
    o_h, o_t = first_h + tl.arange(0, BLOCK_H), first_row + tl.arange(0, BLOCK_T)
    p_y = y + o_t.to(tl.int64)[None, :] * sy_t + o_h[:, None]
    tl.store(p_y, b_y, mask=(o_t < T)[None, :] & (o_h < F)[:, None])


def linear_swiglu_triton(
    x: Rows,
    gate_up: AnyWeight,
    *,
    out: Tensor | None = None,
    entry: LinearEntry | None = None,
    pdl: bool = False,
    early: bool = True,
) -> Tensor:
    """`linear_swiglu` as one Triton launch, or two with many rows; `out` [T, F] takes the result. x, gate_up
    and `out` share one dtype; columns of x and `out` are contiguous.

    entry: in place of `swiglu_entry`, for tuning; its block_n counts gate and up rows together. pdl, early:
    as for `linear_triton`."""
    _check_shapes(x, gate_up)
    rows, (n, k) = x.shape[0], gate_up.shape
    f = n // 2
    out = new_rows(gate_up.pointer.new_empty(0, dtype=x.dtype), rows, f) if out is None else out
    assert out.shape == (rows, f), (out.shape, rows, f)
    assert x.dtype == gate_up.dtype == out.dtype, (x.dtype, gate_up.dtype, out.dtype)
    assert x.stride(1) == out.stride(1) == 1, (x.stride(1), out.stride())
    check_rows(x, gate_up)
    if rows == 0:
        return out
    device, scheme = tables.device_key(x.device), gate_up.scheme
    entry = entry or swiglu_entry(n, k, x.dtype, device, scheme)
    if entry.apart is not None and rows > entry.apart:
        of = tables.linear_entry(n, k, x.dtype, device, scheme)
        assert (entry.block_k, entry.segments) == (of.block_k, of.segments), "another class would change bits"
        return swiglu_triton(linear_triton(x, gate_up, pdl=pdl, early=early), out=out, pdl=pdl)
    check_together(entry, gate_up)
    tile = entry.tile(rows)
    block_h = tile.block_n // 2
    ahead = tile.prefetch * entry.block_k // gate_up.codes_a_word if gate_up.can_prefetch and early else 0
    operands = row_operands(x, pdl, gate_up) | {"w": gate_up.pointer}
    by_rows = operands["x"], operands["x"].stride(0) if rows > 1 else k
    tma = tile.tma and describable(by_rows) and gate_up.describable
    if tma:
        assert isinstance(gate_up, Weight)
        operands["x"] = described(*by_rows, tile.block_t, entry.block_k)
        operands["w"] = gate_up.described(block_h, entry.block_k)
    # Without contraction, as swiglu_triton is compiled. The sums are still those of linear_triton, compiled
    # with it: tensor-core dots have nothing to contract, dots in fp32 are fma.rn by name (test_aot.py).
    _linear_swiglu_kernel[(triton.cdiv(rows, tile.block_t) * triton.cdiv(f, block_h),)](
        **operands, sx_t=by_rows[1], p_w=gate_up.pointer, sw_n=gate_up.row_stride,
        factors=gate_up.factors, y=out, sy_t=out.stride(0) if rows > 1 else f, T=rows, F=f,
        K=k, prefetch=ahead, SEGMENTS=entry.segments, TMA=tma, PDL=pdl, **compiled_for(gate_up, entry, tile),
        EVEN_K=k % entry.block_k == 0, GROUP=GROUP_T, BLOCK_H=block_h, BLOCK_T=tile.block_t,
        BLOCK_K=entry.block_k, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        **NO_CONTRACTION, **launch_options(pdl and early),
    )  # fmt: skip
    return out


def _check_shapes(x: Rows, gate_up: AnyWeight) -> None:
    check_shapes(x, gate_up, None)
    if gate_up.shape[0] % 2:
        raise ValueError(f"linear_swiglu: gate_up {gate_up.shape} must have as many gate as up rows")


def linear_swiglu(x: Tensor, gate_up: AnyWeight) -> Tensor:
    """swiglu(linear(x, gate_up)): x [T, E], gate_up [2F, E] -> [T, F] in x's dtype.

    Raises ValueError when shapes disagree or gate_up has an odd number of rows."""
    _check_shapes(x, gate_up)
    return swiglu(linear(x, gate_up))
