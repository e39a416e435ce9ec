"""Products with a quantised weight in Triton: words of codes to bf16, sums of groups, and their fold.

A tile of words [BLOCK_N, BLOCK_K / codes a word] becomes the tile [BLOCK_N, BLOCK_K] of bf16 that a dense
weight would have given, in the order of its columns, so that the dot is the same one. It starts from zero
for each group; what it gives is folded by `tl.fma`, which stays one rounding however a kernel is compiled.
Where rows are codes too (W8A8) both tiles go to the tensor core as they are, from shared memory.

From codes to bf16 by their bits, exactly:

- e4m3 has 4 bits of exponent and 3 of fraction; in their places in a bf16 they are the number times 2^-120.
  One code of each half of a word lies in its place already;
- 0x4300 | q is the bf16 128 + q, from which 128 + zero is subtracted.

Both are written twice, with the same results: in NVIDIA's assembly (ASM), two neighbours in a register at a
time, and number by number for the interpreter and for other GPUs. The assembly takes one word and gives all
of its codes, so that no layout can tear a pair apart: a thread of a thin tile has one word or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton, triton_interprets
from .coded_rows import Rows
from .quantise_rows import quantise_rows_triton
from .quantised import LOWEST, SYMMETRIC
from .tables import LinearEntry, LinearTile
from .weight import AnyWeight, load_weight

_E4M3 = tl.constexpr("fp8")  # Format.E4M3.value
_SYMMETRIC = tl.constexpr(SYMMETRIC)
_LOWEST = tl.constexpr(LOWEST)
WGMMA_ROWS, WGMMA_WARPS = 64, 4


def compiled_for(weight: AnyWeight, entry: LinearEntry, tile: LinearTile) -> dict[str, Any]:
    """What a kernel that may get a quantised weight is compiled for. ASM: with NVIDIA's assembly, neither on
    AMD's GPUs nor in the interpreter."""
    return {
        "FORMAT": weight.scheme and weight.scheme.format.value, "CODES_A_WORD": weight.codes_a_word,
        "AT_ONCE": groups_at_once(weight, entry, tile),
        "ZEROS": bool(weight.scheme and weight.scheme.zeros),
        "FACTOR_ROWS": weight.scheme.factor_rows if weight.scheme else 1,
        "ASM": bool(weight.scheme) and not triton_interprets() and torch.version.hip is None,
    }  # fmt: skip


def check_rows(x: Rows, *weights: AnyWeight) -> None:
    """Raises ValueError where rows of this dtype have no kernel for one of the weights."""
    if x.dtype != torch.bfloat16 and any(weight.scheme for weight in weights):
        raise ValueError(
            f"a quantised weight has kernels for bfloat16 rows, not for {x.dtype}: run the model in "
            "bfloat16, or on backend 'reference'"
        )


def check_together(entry: LinearEntry, *weights: AnyWeight) -> None:
    """What a launch takes as given of its weights: they lie alike, a dot is a group, and every tile of codes
    has products of the same kind. Without wgmma's 64 weight rows mma.sync would take the columns of a group
    of int4 in another order, and sums would have other bits (H200, bench/LOG.md, 141); products of two codes
    of 8 bits would become some of fp16, as with fewer than wgmma's 4 warps."""
    alike = {(weight.row_stride, weight.scheme) for weight in weights}
    assert len(alike) == 1, alike
    if weights[0].scheme:
        assert weights[0].scheme.group == entry.block_k, entry
        assert all(tile.block_n >= WGMMA_ROWS for tile in entry.tiles), entry
        assert not weights[0].scheme.rounds or all(tile.warps >= WGMMA_WARPS for tile in entry.tiles), entry


def row_operands(x: Rows, pdl: bool, *weights: AnyWeight) -> dict[str, Any]:
    """What a kernel with these weights takes of x, which is rounded to codes where they round rows. pdl: as a
    dependent launch."""
    rounds = all(weight.scheme is not None and weight.scheme.rounds for weight in weights)
    if isinstance(x, Tensor) and not rounds:
        return {"x": x, "x_scale": None, "ss_g": None}
    assert rounds, "rows of codes, and a weight that takes them as they were"
    coded = quantise_rows_triton(x, pdl=pdl) if isinstance(x, Tensor) else x
    return {"x": coded.codes, "x_scale": coded.scale, "ss_g": coded.scale.stride(0)}


def groups_at_once(weight: AnyWeight, entry: LinearEntry, tile: LinearTile) -> int:
    """Groups that a round of the loop takes: the tile's if every segment has a multiple of them, else 1."""
    if weight.scheme is None:
        return 1
    groups = weight.shape[1] // entry.block_k
    each = -(-groups // entry.segments)
    return tile.at_once if each % tile.at_once == groups % tile.at_once == 0 else 1


@triton.jit
def _e4m3_asm(words):
    """Codes of words [..] as bits of bf16, four of [..]: those of half 0 and of half 1 in turns."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 s, v, one, zero;
        mov.b32 one, 0x7b807b80;
        mov.b32 zero, 0x80008000;
        and.b32 v, $4, 0x87f087f0;
        fma.rn.bf16x2 v, v, one, zero;
        mov.b32 {$0, $1}, v;
        shl.b32 s, $4, 4;
        shr.b32 v, $4, 4;
        and.b32 s, s, 0x80f080f0;
        lop3.b32 v, v, 0x07000700, s, 0xea;
        fma.rn.bf16x2 v, v, one, zero;
        mov.b32 {$2, $3}, v;
        }""",
        "=&h,=&h,=h,=h,r", [words], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _int4_asm(words, minus):
    """Nibbles 0 to 7 of words [..], as bits of bf16: eight of [..]. minus: bits of the bf16 -(128 + zero)."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 v, one, minus;
        mov.b32 one, 0x3f803f80;
        mov.b32 minus, {$9, $9};
        lop3.b32 v, $8, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 v, v, one, minus;
        mov.b32 {$0, $4}, v;
        shr.b32 v, $8, 4;
        lop3.b32 v, v, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 v, v, one, minus;
        mov.b32 {$1, $5}, v;
        shr.b32 v, $8, 8;
        lop3.b32 v, v, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 v, v, one, minus;
        mov.b32 {$2, $6}, v;
        shr.b32 v, $8, 12;
        lop3.b32 v, v, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 v, v, one, minus;
        mov.b32 {$3, $7}, v;
        }""",
        "=&h,=&h,=&h,=h,=&h,=&h,=&h,=h,r,h", [words, minus],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _e4m3(halves, SECOND: tl.constexpr):
    """A code of halves of words, as bf16."""
    bits = ((halves >> 4) & 0x0700) | ((halves << 4) & 0x80F0) if SECOND else halves & 0x87F0
    power = tl.full(bits.shape, 0x7B80, tl.int16).to(tl.bfloat16, bitcast=True)  # 2^120
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) * power


@triton.jit
def _int4(halves, minus, NIBBLE: tl.constexpr):
    """A nibble of halves of words, as bf16."""
    bits = (halves >> (4 * NIBBLE)) & 0xF | 0x4300
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) + minus.to(tl.bfloat16, bitcast=True)[:, :, None]


@triton.jit
def widened(words, zero, FORMAT: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """What the codes of words [BLOCK_N, W] stand for, in the order of columns: bf16 [BLOCK_N, BLOCK_K].
    zero: int32 [BLOCK_N] or None."""
    if FORMAT == _E4M3:
        if ASM:
            a, b, c, d = _e4m3_asm(words)
            first = tl.join(a, b).to(tl.bfloat16, bitcast=True)
            second = tl.join(c, d).to(tl.bfloat16, bitcast=True)
        else:
            halves = tl.join(words, words >> 16)
            first, second = _e4m3(halves, False), _e4m3(halves, True)
        pairs = tl.join(first, second).reshape(BLOCK_N, BLOCK_K // 16, 4, 2, 2)  # step, t, b, h
        return pairs.permute(0, 1, 4, 2, 3).reshape(BLOCK_N, BLOCK_K)
    else:
        if zero is None:
            minus = (words & 0 | (0xC300 + _SYMMETRIC)).to(tl.int16)
        else:
            minus = tl.broadcast_to((zero.to(tl.int16) + (0xC300 - 0x10000))[:, None], words.shape)
        if ASM:
            a, b, c, d, e, f, g, h = _int4_asm(words, minus)
            a, b = tl.join(a, e).to(tl.bfloat16, bitcast=True), tl.join(b, f).to(tl.bfloat16, bitcast=True)
            c, d = tl.join(c, g).to(tl.bfloat16, bitcast=True), tl.join(d, h).to(tl.bfloat16, bitcast=True)
        else:
            halves = tl.join(words, words >> 16)
            a, b = _int4(halves, minus, 0), _int4(halves, minus, 1)
            c, d = _int4(halves, minus, 2), _int4(halves, minus, 3)
        pairs = tl.join(tl.join(a, b), tl.join(c, d))
        pairs = pairs.reshape(BLOCK_N, BLOCK_K // 32, 4, 2, 2, 2)  # step, t, b, h, s
        return pairs.permute(0, 1, 5, 4, 2, 3).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _of_group(p_w, p_x, p_factor, m_n, m_t, FORMAT: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """(products, scale of each weight row) of a group."""
    b_w = load_weight(p_w, m_n[:, None])
    b_x = tl.load(p_x, mask=m_t, other=0.0)
    b_scale = tl.load(p_factor, mask=m_n, other=0)
    b_zero = None
    if ZEROS:
        b_zero = b_scale & _LOWEST
        b_scale = b_scale & ~_LOWEST
    part = tl.dot(widened(b_w, b_zero, FORMAT, ASM, BLOCK_N, BLOCK_K), b_x)
    return part, b_scale.to(tl.float32, bitcast=True)


@triton.jit
def _sum_of_words(words, sw_n, factors, x, sx_t, o_n, o_t, end_row, first, last, N, FORMAT: tl.constexpr,
                  ZEROS: tl.constexpr, FACTOR_ROWS: tl.constexpr, ASM: tl.constexpr,
                  CODES_A_WORD: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`sum_by_groups` where rows are bf16."""
    WORDS: tl.constexpr = BLOCK_K // CODES_A_WORD
    o_k = tl.arange(0, BLOCK_K)
    m_n, m_t = o_n < N, (o_t < end_row)[None, :]
    p_w = words + o_n.to(tl.int64)[:, None] * sw_n + first * WORDS + tl.arange(0, WORDS)[None, :]
    p_x = x + o_t.to(tl.int64)[None, :] * sx_t + first * BLOCK_K + o_k[:, None]
    p_factor, blocks = factors + o_n // FACTOR_ROWS, tl.cdiv(N, FACTOR_ROWS)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i_g in tl.range(first, last, AT_ONCE, num_stages=STAGES):
        p_now = p_factor + i_g * blocks
        part, b_scale = _of_group(p_w, p_x, p_now, m_n, m_t, FORMAT, ZEROS, ASM, BLOCK_N, BLOCK_K)
        if AT_ONCE == 2:
            behind, b_behind = _of_group(p_w + WORDS, p_x + BLOCK_K, p_now + blocks, m_n, m_t, FORMAT, ZEROS,
                                         ASM, BLOCK_N, BLOCK_K)  # fmt: skip
        acc = tl.fma(part, tl.broadcast_to(b_scale[:, None], part.shape), acc)
        if AT_ONCE == 2:
            acc = tl.fma(behind, tl.broadcast_to(b_behind[:, None], behind.shape), acc)
        p_w += AT_ONCE * WORDS
        p_x += AT_ONCE * BLOCK_K
    return acc


@triton.jit
def _sum_of_codes(codes, sw_n, factors, x, sx_t, x_scale, ss_g, o_n, o_t, end_row, first, last, N,
                  FACTOR_ROWS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`sum_by_groups` where rows are codes too. Past the last row of either a tile has the last row again,
    which nobody stores: a mask would cost every copy three instructions."""
    o_n, o_t, o_k = tl.minimum(o_n, N - 1), tl.minimum(o_t, end_row - 1), tl.arange(0, BLOCK_K)
    p_w = codes + o_n.to(tl.int64)[:, None] * sw_n + o_k[None, :]
    p_x = x + o_t.to(tl.int64)[None, :] * sx_t + o_k[:, None]
    p_factor, blocks, p_s = factors + o_n // FACTOR_ROWS, tl.cdiv(N, FACTOR_ROWS), x_scale + o_t
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i_round in tl.range(first, last, AT_ONCE, num_stages=STAGES):
        for nth in tl.static_range(AT_ONCE):
            i_g = i_round + nth
            b_w = tl.load(p_w + i_g * BLOCK_K, eviction_policy="evict_first")
            part = tl.dot(b_w, tl.load(p_x + i_g * BLOCK_K))
            b_scale = tl.load(p_factor + i_g * blocks).to(tl.float32, bitcast=True)
            factor = b_scale[:, None] * tl.load(p_s + i_g * ss_g)[None, :]
            acc = tl.fma(part, factor, acc)
    return acc


@triton.jit
def sum_by_groups(words, sw_n, factors, x, sx_t, x_scale, ss_g, o_n, o_t, end_row, first, last, N,
                  FORMAT: tl.constexpr, ZEROS: tl.constexpr, FACTOR_ROWS: tl.constexpr, ASM: tl.constexpr,
                  CODES_A_WORD: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sum of groups [first, last), each BLOCK_K columns, from zero: [BLOCK_N, BLOCK_T] fp32. AT_ONCE: groups
    of a round of the loop, 1 or 2; a segment has a multiple of them. x_scale: of rows that are codes, or
    None."""
    if x_scale is None:
        acc = _sum_of_words(words, sw_n, factors, x, sx_t, o_n, o_t, end_row, first, last, N, FORMAT, ZEROS,
                            FACTOR_ROWS, ASM, CODES_A_WORD, AT_ONCE, BLOCK_N, BLOCK_T, BLOCK_K,
                            STAGES)  # fmt: skip
    else:
        acc = _sum_of_codes(words, sw_n, factors, x, sx_t, x_scale, ss_g, o_n, o_t, end_row, first, last, N,
                            FACTOR_ROWS, AT_ONCE, BLOCK_N, BLOCK_T, BLOCK_K, STAGES)  # fmt: skip
    return acc
