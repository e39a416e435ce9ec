"""Dual-view attention in Triton: one read of the keys for all rows of a pass, and a row's bits its own.

Per row of query head h over key head g = h // (H / G), with keys cut at `KEY_CUTS` into segments:

    scores:   s_j = q k_j, their maximum and differences raw; e(x) = exp2(x * scale * log2 e)
    segment:  m = max_j s_j,  l = sum_j e(s_j - m),  a = sum_j round(e(s_j - m)) v_j
    fold:     M = max(m, m'), l <- l' e(m' - M) + l e(m - M), a likewise, in the order of the positions
    output:   a (1 / l), rounded once to q's dtype; all else in fp32, but probabilities in v's dtype for a

Why a row's bits do not depend on the pass. Whatever the row's neighbours, its index and where its keys lie,
it goes through the same tile shape (FOLDED rows, the query heads of a key head folded into them, by
BLOCK_S keys; the tall tile of the whole form is two side by side), the same dots over the same logical keys
in the same order, cut at the same absolute positions. Three things vary, and none of them reaches the sum of
another row or the order within one:

- **where keys come from**: blocks below the context are read in place, and so are blocks of a chain of rows
  in flight (a prompt) that every row of the tile sees whole; the block that holds the end of the context and
  all others behind it are gathered by slot(path, position) from cache and in-flight rows into the same tile.
  Each block continues the (m, l, a) that the segment has reached;
- **which rows share a tile**: any rows of a sequence in segments wholly inside the context, where all see
  every key; rows of one path otherwise, a mask hiding positions at and past a row's limit. A hidden key adds
  exp2(-inf) = 0 and leaves m alone, so a row goes through blocks past its limit unchanged;
- **who folds**: with few rows one program takes one (tile, segment), and the partials are folded by a second
  kernel (`_partial_kernel`, `_combine_kernel`) or, where they are few, by the program of a key head that
  arrives last ("fused"); with many (prefill) one program takes all segments of a tile, each from a fresh
  state, and folds as it goes (`_whole_kernel`): no partials in memory. All say the fold with explicit
  `tl.fma`, so that no compiler choice of contraction can tell them apart.

Bytes moved: keys and values once per tile (from L2 for all but the first tile of a segment); partial
forms also write and read 4 (D + 2) bytes per row, query head and segment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import tl, triton
from .packed import PackedRows, key_segments, pack
from .pdl import launch_dependents, launch_options, wait
from .visibility import Rows
from .workspace import workspace as shared_workspace

# (D, bytes of an element) -> (FOLDED, BLOCK_S, warps, stages). FOLDED: rows of a tile once the query heads of
# a key head are folded in. It, BLOCK_S and the warps decide bits, stages do not. 16 bits: tiles of 64 rows or
# more gave a row the same bits (four warps per 64 rows), tiles of 16 and 32 others; 64 cost nothing even for
# one token (H200, 2026-11-24, prototypes/attention_tiles.py). fp32 multiplies without tensor cores, whose
# operands lie in registers: larger tiles spill (ptxas of triton 3.7.1, sm_90).
LAUNCH = {
    (64, 2): (64, 64, 4, 3),
    (128, 2): (64, 64, 4, 3),
    (64, 4): (64, 16, 8, 2),
    (128, 4): (16, 16, 8, 2),
}
DEFAULT_LAUNCH = (64, 64, 4, 2)  # other head sizes: tests and toy models

# Tiles side by side in the tall tile of the whole form, with as many times the warps: keys come from L2 half
# as often, and its two accumulators would spill in one. A warp holds whole rows, laid out the same in both
# heights. 16 bits only: products of fp32 are laid out over all warps. The partial form is faster in short
# tiles at every context and 32 to 128 rows (H100, 2026-11-25, bench/gpu_attention.py).
TALL = 2

# Programs from which on the whole form is taken: about one tall tile for every SM of a large GPU.
WHOLE_PROGRAMS = 120
# One path of more than so many rows (a prompt) takes it too when partials would need more memory than that,
# in bytes: they grow with the context, to hundreds of MB.
PROMPT_ROWS, PROMPT_BYTES = 128, 1 << 24
# Partials of a key head, in bytes, up to which the program that arrives last folds them: one SM reads them
# about as fast as a launch of the combine takes. One row has 520 bytes a query head and segment.
FUSED_BYTES = 1 << 17
FUSED_HEADS = 16  # rows times query heads of a key head that it folds: a kernel for each power of two
FUSED_UNROLL = (
    4  # partials it has in flight, fewer where they are more than 64 numbers a thread; 16 were no faster
)
COMBINE_UNROLL = 8  # partials a combining program has in flight; they are folded in order all the same


@triton.jit
def _step(b_s, b_v, b_max, b_sum, b_acc, scale):
    """One block of keys into the running (maximum, sum, accumulator). b_s: raw scores, -inf where hidden."""
    b_top, b_keep = _keep(b_max, tl.max(b_s, 1), scale)
    b_p = tl.exp2((b_s - _finite(b_top)[:, None]) * scale)
    b_sum = tl.fma(b_sum, b_keep, tl.sum(b_p, 1))
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision="ieee")
    return b_top, b_sum, b_acc


@triton.jit
def _finite(b_max):
    """0 in place of the maximum of nothing, so that -inf - -inf is not asked for."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def _keep(b_max, b_next, scale):
    """Maximum of two states of raw scores, and the factor that the first one's sum and accumulator take.

    Differences are scaled, not maxima subtracted from scaled scores: a fused multiply-add would leave the
    rounding error of a huge score in the exponent.
    """
    b_top = tl.maximum(b_max, b_next)
    return b_top, tl.exp2((b_max - _finite(b_top)) * scale)


@triton.jit
def _fold_weights(b_max, b_next, scale):
    """Maximum of two states, and the factors that their sums and accumulators take."""
    b_top, b_keep = _keep(b_max, b_next, scale)
    return b_top, b_keep, tl.exp2((b_next - _finite(b_top)) * scale)


@triton.jit
def _fold(acc, stats, o_first, m_m, stride_segment, n, scale, FOLDED: tl.constexpr, D: tl.constexpr,
          UNROLL: tl.constexpr):  # fmt: skip
    """Output [FOLDED, D] in fp32 of n partials each, in the order of the segments, the first at o_first."""
    o_d = tl.arange(0, D)
    b_max = tl.full((FOLDED,), float("-inf"), tl.float32)
    b_sum = tl.zeros((FOLDED,), tl.float32)
    b_acc = tl.zeros((FOLDED, D), tl.float32)
    for first in range(0, n, UNROLL):
        for u in tl.static_range(UNROLL):  # a partial past n is empty: folding it changes nothing
            m_s = m_m & (first + u < n)
            o_part = o_first + (first + u) * stride_segment
            # .cg: L1 may hold an older launch's partials
            b_m = tl.load(stats + o_part * 2, mask=m_s, other=float("-inf"), cache_modifier=".cg")
            b_l = tl.load(stats + o_part * 2 + 1, mask=m_s, other=0.0, cache_modifier=".cg")
            p_a = acc + o_part[:, None] * D + o_d[None, :]
            b_a = tl.load(p_a, mask=m_s[:, None], other=0.0, cache_modifier=".cg")
            b_max, b_keep, b_add = _fold_weights(b_max, b_m, scale)
            b_sum = tl.fma(b_l, b_add, b_sum * b_keep)
            b_acc = tl.fma(b_a, b_add[:, None], b_acc * b_keep[:, None])
    b_scale = tl.div_rn(1.0, tl.where(m_m, b_sum, 1.0))  # an unused place has seen nothing
    return b_acc * b_scale[:, None]


@triton.jit
def _segment(
    b_q, b_limit,
    k, stride_kt, v, stride_vt, k_cache, stride_ks, v_cache, stride_vs, slots,
    first, last, context, end, chain, chain_row, lowest, scale,
    D: tl.constexpr, FOLDED: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(maximum [FOLDED], sum [FOLDED], accumulator [FOLDED, D]) of the keys at positions [first, last).

    Pointers stand at the key head and sequence already, `slots` at the slot of position `context`. Positions
    from `chain` on lie in rows chain_row, chain_row + 1, ...; every row sees the positions below `lowest`.
    """
    o_n, o_d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    b_max = tl.full((FOLDED,), float("-inf"), tl.float32)
    b_sum = tl.zeros((FOLDED,), tl.float32)
    b_acc = tl.zeros((FOLDED, D), tl.float32)
    # Twice a run of blocks read in place and a run of gathered ones: [first, cached) from the cache, gathered
    # up to `middle`, [middle, masked) from the chain in flight, gathered to the end. Any run may be empty.
    cached = tl.maximum(first, tl.minimum(last, context // BLOCK_S * BLOCK_S))
    middle = tl.maximum(cached, tl.cdiv(chain, BLOCK_S) * BLOCK_S)
    masked = tl.maximum(middle, tl.minimum(last, lowest) // BLOCK_S * BLOCK_S)
    end = tl.minimum(last, end)
    # Left in the loop, offsets cost nothing; hoisted out of it they spill (whole form, triton 3.6.0, sm_90).
    for i_run in tl.range(2, disable_licm=True):
        in_cache = i_run == 0
        start, stop = tl.where(in_cache, first, middle), tl.where(in_cache, cached, masked)
        # Only the start of a block needs 64 bits; offsets within it stay small, which saves registers.
        i_first = tl.where(in_cache, first, chain_row + (middle - chain)).to(tl.int64)
        stride_k, stride_v = (
            tl.where(in_cache, stride_ks, stride_kt),
            tl.where(in_cache, stride_vs, stride_vt),
        )
        p_k = (k_cache if in_cache else k) + i_first * stride_k
        p_v = (v_cache if in_cache else v) + i_first * stride_v
        o_k, o_v = o_n[:, None] * stride_k + o_d[None, :], o_n[:, None] * stride_v + o_d[None, :]
        for _ in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
            b_s = tl.dot(b_q, tl.trans(tl.load(p_k + o_k)), input_precision="ieee")
            b_max, b_sum, b_acc = _step(b_s, tl.load(p_v + o_v), b_max, b_sum, b_acc, scale)
            p_k += BLOCK_S * stride_k
            p_v += BLOCK_S * stride_v
        for start in tl.range(stop, tl.where(in_cache, tl.minimum(middle, end), end), BLOCK_S, num_stages=1):
            o_s = start + o_n
            m_c, m_s = o_s < context, o_s < end
            b_slot = tl.load(slots + (o_s - context), mask=m_s & (o_s >= context), other=0).to(tl.int64)
            o_c = o_s.to(tl.int64)
            p_ks = tl.where(m_c, k_cache + o_c * stride_ks, k + b_slot * stride_kt)
            b_k = tl.load(p_ks[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            p_vs = tl.where(m_c, v_cache + o_c * stride_vs, v + b_slot * stride_vt)
            b_v = tl.load(p_vs[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0)
            b_s = tl.where(o_s[None, :] < b_limit[:, None], b_s, float("-inf"))
            b_max, b_sum, b_acc = _step(b_s, b_v, b_max, b_sum, b_acc, scale)
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=["T"])
def _partial_kernel(
    q, stride_qt, stride_qh, k, stride_kt, stride_kg, v, stride_vt, stride_vg,
    k_cache, stride_kb, stride_kcg, stride_ks, v_cache, stride_vb, stride_vcg, stride_vs,
    rows, limits, tiles, slots, segments, items,
    acc, stats, arrivals, out, stride_ot, stride_oh,
    T, G, scale,
    D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, FOLDED: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, FUSED: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One (tile, segment) for one key head: acc [C, T, H, D], stats [C, T, H, 2] (maximum, sum).

    FUSED >= T * GROUP, a power of two, for a pass of one path tile: the program that arrives last for its key
    head folds the partials into `out`. With FUSED 0 the combine does.
    """
    if PDL:
        wait()  # first of all, in programs without work too: the tables themselves may be new
        launch_dependents()
    i_g, i_item = tl.program_id(0) % G, tl.program_id(0) // G
    i_tile, i_segment = tl.load(items + 2 * i_item), tl.load(items + 2 * i_item + 1)
    if i_tile < 0:
        return
    o_m, o_d = tl.arange(0, FOLDED), tl.arange(0, D)
    m_m = o_m < TILE * GROUP
    i_row = tl.load(rows + i_tile * TILE + o_m // GROUP, mask=m_m, other=-1).to(tl.int64)
    b_limit = tl.load(limits + i_tile * TILE + o_m // GROUP, mask=m_m, other=0)
    m_m = i_row >= 0
    i_h = i_g * GROUP + o_m % GROUP
    p_q = q + (i_row * stride_qt + i_h * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
    i_b, context = tl.load(tiles + 8 * i_tile).to(tl.int64), tl.load(tiles + 8 * i_tile + 1)
    end, first_slot = tl.load(tiles + 8 * i_tile + 2), tl.load(tiles + 8 * i_tile + 3)
    chain, chain_row = tl.load(tiles + 8 * i_tile + 5), tl.load(tiles + 8 * i_tile + 6)
    lowest = tl.load(tiles + 8 * i_tile + 7)
    i_g = i_g.to(tl.int64)
    b_max, b_sum, b_acc = _segment(
        b_q, b_limit, k + i_g * stride_kg, stride_kt, v + i_g * stride_vg, stride_vt,
        k_cache + i_b * stride_kb + i_g * stride_kcg, stride_ks,
        v_cache + i_b * stride_vb + i_g * stride_vcg, stride_vs, slots + first_slot,
        tl.load(segments + i_segment), tl.load(segments + i_segment + 1), context, end,
        chain, chain_row, lowest, scale,
        D, FOLDED, BLOCK_S, STAGES,
    )  # fmt: skip
    o_part = (i_segment.to(tl.int64) * T + i_row) * (G * GROUP) + i_h
    tl.store(acc + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_m[:, None])
    tl.store(stats + o_part * 2, b_max, mask=m_m)
    tl.store(stats + o_part * 2 + 1, b_sum, mask=m_m)
    if FUSED:
        n = tl.load(tiles + 4)  # segments of the one path tile: as many programs as arrive
        tl.debug_barrier()  # every thread's partial is written before one thread publishes it
        if tl.atomic_add(arrivals + i_g, 1, sem="acq_rel") == n - 1:
            o_f = tl.arange(0, FUSED)
            f_row, f_h = (o_f // GROUP).to(tl.int64), i_g * GROUP + o_f % GROUP
            m_f = f_row < T
            o_first, stride_segment = f_row * (G * GROUP) + f_h, T.to(tl.int64) * (G * GROUP)
            b_out = _fold(acc, stats, o_first, m_f, stride_segment, n, scale, FUSED, D, UNROLL)
            p_out = out + (f_row * stride_ot + f_h * stride_oh)[:, None] + o_d[None, :]
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_f[:, None])
            tl.store(arrivals + i_g, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    acc, stats, row_segments, out, stride_ot, stride_oh, T, H, scale,
    D: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fold one row and head's partials in the order of the segments and divide."""
    if PDL:
        wait()
        launch_dependents()
    i_row, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(row_segments + i_row)
    o_one, o_d = tl.arange(0, 1), tl.arange(0, D)
    stride_segment = T.to(tl.int64) * H
    b_out = _fold(acc, stats, i_row * H + i_h + o_one, o_one == 0, stride_segment, n, scale, 1, D, UNROLL)
    p_out = out + i_row * stride_ot + i_h * stride_oh + o_one[:, None] + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["N"])
def _whole_kernel(
    q, stride_qt, stride_qh, k, stride_kt, stride_kg, v, stride_vt, stride_vg,
    k_cache, stride_kb, stride_kcg, stride_ks, v_cache, stride_vb, stride_vcg, stride_vs,
    rows, limits, tiles, slots, segments,
    out, stride_ot, stride_oh,
    N, G, scale,
    D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, FOLDED: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All segments of one path tile for one key head, folded in order; the last of the N tiles first, because
    in a prompt it sees most.
    """
    if PDL:
        wait()
        launch_dependents()
    i_g, i_tile = tl.program_id(0) % G, N - 1 - tl.program_id(0) // G
    o_m, o_d = tl.arange(0, FOLDED), tl.arange(0, D)
    m_m = o_m < TILE * GROUP
    i_row = tl.load(rows + i_tile * TILE + o_m // GROUP, mask=m_m, other=-1).to(tl.int64)
    b_limit = tl.load(limits + i_tile * TILE + o_m // GROUP, mask=m_m, other=0)
    m_m = i_row >= 0
    i_h = i_g * GROUP + o_m % GROUP
    p_q = q + (i_row * stride_qt + i_h * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
    i_b, context = tl.load(tiles + 8 * i_tile).to(tl.int64), tl.load(tiles + 8 * i_tile + 1)
    end, first_slot = tl.load(tiles + 8 * i_tile + 2), tl.load(tiles + 8 * i_tile + 3)
    chain, chain_row = tl.load(tiles + 8 * i_tile + 5), tl.load(tiles + 8 * i_tile + 6)
    lowest = tl.load(tiles + 8 * i_tile + 7)
    n_segments = tl.load(tiles + 8 * i_tile + 4)
    i_g = i_g.to(tl.int64)
    b_max = tl.full((FOLDED,), float("-inf"), tl.float32)
    b_sum = tl.zeros((FOLDED,), tl.float32)
    b_acc = tl.zeros((FOLDED, D), tl.float32)
    for i_segment in range(n_segments):
        b_m, b_l, b_a = _segment(
            b_q, b_limit, k + i_g * stride_kg, stride_kt, v + i_g * stride_vg, stride_vt,
            k_cache + i_b * stride_kb + i_g * stride_kcg, stride_ks,
            v_cache + i_b * stride_vb + i_g * stride_vcg, stride_vs, slots + first_slot,
            tl.load(segments + i_segment), tl.load(segments + i_segment + 1), context, end,
            chain, chain_row, lowest, scale,
            D, FOLDED, BLOCK_S, STAGES,
        )  # fmt: skip
        b_max, b_keep, b_add = _fold_weights(b_max, b_m, scale)
        b_sum = tl.fma(b_l, b_add, b_sum * b_keep)
        b_acc = tl.fma(b_a, b_add[:, None], b_acc * b_keep[:, None])
    b_scale = tl.div_rn(1.0, tl.where(m_m, b_sum, 1.0))  # an unused place has seen nothing
    b_out = b_acc * b_scale[:, None]
    p_out = out + (i_row * stride_ot + i_h * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None])


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows | PackedRows, scale: float,
    *, out: Tensor | None = None, workspace: Tensor | None = None, form: str = "auto", pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from every row of a pass; returns [T, H, D] in q's dtype. Arguments as for the twin `attention`.

    q [T, H, D]; k, v [T, G, D]; k_cache, v_cache [B, G, S, D]: any strides but a last one of 1.
    rows: of the pass, or packed already for tiles of `tile_rows(...)` rows: once a pass, not once a layer.
    workspace: at least `workspace_size(...)` fp32 numbers, where nothing may be allocated.
    form: "partial", "fused" (passes of one path tile) or "whole", the same bits; "auto" takes the fastest.
    "fused" counts arrivals in the device's shared workspace: launches on one stream only.
    pdl: as dependent launches (pdl.py), the combine too."""
    n, heads, d = q.shape
    groups = k.shape[1]
    group = heads // groups
    if isinstance(rows, Rows):
        rows = pack(rows, tile_rows(heads, groups, d, q.dtype, rows), q.device)
    _check(q, k, v, k_cache, v_cache, rows, scale)
    out = torch.empty_like(q) if out is None else out
    assert out.shape == q.shape and out.stride(2) == 1, (out.shape, out.stride())
    folded, block, warps, stages = _launch(d, q.dtype)
    if form == "auto":
        form = _form(rows, groups, group, d, q.dtype)
    tall = _tall(q.dtype) if form == "whole" else 1
    assert rows.tile_rows * group <= tall * folded, f"form {form} takes no tiles of {rows.tile_rows} rows"
    assert form != "fused" or _one_tile(rows), "form fused takes passes of one path tile"
    shared = {
        "q": q, "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "k": k, "stride_kt": k.stride(0), "stride_kg": k.stride(1),
        "v": v, "stride_vt": v.stride(0), "stride_vg": v.stride(1),
        "k_cache": k_cache, "stride_kb": k_cache.stride(0), "stride_kcg": k_cache.stride(1),
        "stride_ks": k_cache.stride(2),
        "v_cache": v_cache, "stride_vb": v_cache.stride(0), "stride_vcg": v_cache.stride(1),
        "stride_vs": v_cache.stride(2),
        "rows": rows.rows, "limits": rows.limits, "tiles": rows.tiles, "slots": rows.slots,
        "segments": rows.segments, "G": groups, "scale": scale * math.log2(math.e),
        "out": out, "stride_ot": out.stride(0), "stride_oh": out.stride(1),
        "D": d, "GROUP": group, "TILE": rows.tile_rows, "FOLDED": tall * folded,
        "BLOCK_S": block, "STAGES": stages, "PDL": pdl, "num_warps": tall * warps, **launch_options(pdl),
    }  # fmt: skip
    if form == "whole":
        _whole_kernel[(rows.path_tiles * groups,)](N=rows.path_tiles, **shared)
        return out
    size = workspace_size(rows, heads, d)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    assert workspace.numel() >= size and workspace.dtype == torch.float32, (workspace.numel(), size)
    stats = workspace[size * d // (d + 2) : size]
    fused = triton.next_power_of_2(n * group) if form == "fused" else 0
    _partial_kernel[(len(rows.items) * groups,)](
        items=rows.items, acc=workspace, stats=stats, T=n,
        arrivals=shared_workspace(q.device).counters if fused else None,
        FUSED=fused, UNROLL=_fused_unroll(fused, d, warps), **shared,
    )  # fmt: skip
    if not fused:
        _combine_kernel[(n, heads)](
            acc=workspace, stats=stats, row_segments=rows.row_segments,
            out=out, stride_ot=out.stride(0), stride_oh=out.stride(1), T=n, H=heads,
            scale=shared["scale"], D=d, UNROLL=COMBINE_UNROLL, PDL=pdl, num_warps=1,
            **launch_options(pdl),
        )  # fmt: skip
    return out


def prepare_rows_triton(
    rows: Rows, heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device, *, room: int = 0
) -> PackedRows:
    """The tables of a pass for `attention_triton`, on the device: once a pass, not once a layer. room: as for
    `pack`."""
    return pack(rows, tile_rows(heads, groups, d, dtype, rows), device, room=room)


def tile_rows(heads: int, groups: int, d: int, dtype: torch.dtype, rows: Rows | None = None) -> int:
    """Rows of a tile, what `pack` is to be called with, for H query heads, G key heads of size D in a dtype.

    Any pass may take the height without `rows`; a prompt in a 16-bit dtype gets the tall tiles of the whole
    form. A row's bits are the same in both."""
    height = _launch(d, dtype)[0] // (heads // groups)
    if rows is None:
        return height
    tall = _tall(dtype) * _launch(d, dtype)[0] // (heads // groups)
    leaves = rows.n_ar - len({rows.parents[i] for i in range(rows.n_ar)} - {-1})
    n_paths = leaves + len(set(rows.blocks) - {-1})
    most_tiles = -(-len(rows) // tall) + n_paths - 1
    if _fills(len(rows), most_tiles, tall, groups):
        return tall
    segments = sum(1 for _ in key_segments(max(rows.positions, default=0) + 1))
    partials = 4 * segments * len(rows) * heads * (d + 2)
    prompt = n_paths == 1 and len(rows) > PROMPT_ROWS and partials > PROMPT_BYTES
    return tall if prompt and dtype.itemsize == 2 else height


def _launch(d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(FOLDED, BLOCK_S, warps, stages) of the reduction class of a head size and dtype."""
    return LAUNCH.get((d, dtype.itemsize), DEFAULT_LAUNCH)


def _tall(dtype: torch.dtype) -> int:
    return TALL if dtype.itemsize == 2 else 1


def workspace_size(rows: PackedRows, heads: int, d: int) -> int:
    """fp32 numbers that the partials of a pass take: D + 2 per segment, row and query head."""
    return rows.n_segments * rows.n_rows * heads * (d + 2)


def _form(rows: PackedRows, groups: int, group: int, d: int, dtype: torch.dtype) -> str:
    """The fastest form of a pass."""
    tall = rows.tile_rows == _tall(dtype) * _launch(d, dtype)[0] // group
    if tall and (dtype.itemsize == 2 or _fills(rows.n_rows, rows.path_tiles, rows.tile_rows, groups)):
        return "whole"
    few = rows.n_rows * group <= FUSED_HEADS and 4 * workspace_size(rows, group, d) <= FUSED_BYTES
    return "fused" if few and _one_tile(rows) else "partial"


def _fills(n_rows: int, path_tiles: int, height: int, groups: int) -> bool:
    """Whether path tiles alone fill the GPU, and are about as full as context tiles would be."""
    return path_tiles * groups >= WHOLE_PROGRAMS and path_tiles <= 1.25 * -(-n_rows // height)


def _one_tile(rows: PackedRows) -> bool:
    """Whether all rows lie in one path tile and so, in segments inside the context, in one context tile."""
    return rows.path_tiles == 1


def _fused_unroll(fused: int, d: int, warps: int) -> int:
    """Partials of `fused` rows and heads that the folding program has in flight."""
    return max(1, min(FUSED_UNROLL, 64 * 32 * warps // (fused * d))) if fused else 1


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PackedRows, scale: float
) -> None:
    n, heads, d = q.shape
    groups = k.shape[1]
    folded = _launch(d, q.dtype)[0]
    assert heads % groups == 0 and heads // groups <= folded, (heads, groups, folded)
    assert k.shape == v.shape == (n, groups, d), (q.shape, k.shape, v.shape)
    assert k_cache.shape == v_cache.shape and k_cache.shape[1::2] == (groups, d), (k_cache.shape, k.shape)
    assert {t.dtype for t in (q, k, v, k_cache, v_cache)} == {q.dtype}, "one dtype for all"
    assert all(t.stride(-1) == 1 for t in (q, k, v, k_cache, v_cache)), "last strides must be 1"
    heights = [tall * folded // (heads // groups) for tall in {1, _tall(q.dtype)}]
    assert rows.n_rows == n and rows.tile_rows in heights, (rows.n_rows, n, rows.tile_rows, heights)
    assert scale > 0, f"scale is {scale}; the running maximum is taken before scaling"
