"""Dual-view attention, the kernels: one read of the keys for all rows of a pass, and a row's bits its own.
`attention_triton.py` launches them.

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

- **where keys come from**: blocks below the context are read in place, each from one page (pages.py), and so
  are blocks of a chain of rows in flight (a prompt) that every row of the tile sees whole; the block that
  holds the end of the context and all others behind it are gathered by slot(path, position) from cache and
  in-flight rows into the same tile. Each block continues the (m, l, a) that the segment has reached;
- **which rows share a tile**: any rows of a sequence in segments wholly inside the context, where all see
  every key, and in the shared form in all whole pages of the context; rows of one path otherwise, a mask
  hiding positions at and past a row's limit. A hidden key adds exp2(-inf) = 0 and leaves m alone, so a row
  goes through blocks past its limit unchanged;
- **who folds**: with few rows one program takes one (tile, segment), and the partials are folded by a second
  kernel (`_partial_kernel`, `_combine_kernel`) or, where they are few, by the program of a key head that
  arrives last ("fused"); with many (prefill) one program takes all segments of a tile, each from a fresh
  state, and folds as it goes (`_whole_kernel`): no partials in memory. In the shared form the program of a
  path tile goes on where the partial kernel has stopped in the ragged segment, from the state that lies in
  memory as it was in registers, and folds its rows' partials (`_path_kernel`). All say the fold with explicit
  `tl.fma`, so that no compiler choice of contraction can tell them apart."""

from __future__ import annotations

from ._triton import tl, triton
from .attention_states import add, divided, empty, fold, leave, left, step
from .layout import (
    TILE_BEGIN,
    TILE_CHAIN,
    TILE_CHAIN_ROW,
    TILE_COLUMNS,
    TILE_CONTEXT,
    TILE_END,
    TILE_FIRST_SLOT,
    TILE_LOWEST,
    TILE_REACH,
    TILE_SEQUENCE,
)
from .pdl import launch_dependents, wait
from .visibility import row_sees_triton


@triton.jit
def _page(pages, position, known, PAGE: tl.constexpr):
    """The page that holds a position, looked up where it is `known` to be in the cache; else the one that
    would hold it if all pages lay side by side."""
    i_page = position // PAGE
    return tl.load(pages + i_page, mask=known, other=i_page)


@triton.jit
def _segment(
    b_q, b_limit, b_max, b_sum, b_acc, k, v, stride_kt, k_cache, v_cache, stride_cp, stride_cs, pages, slots,
    first, last, context, end, chain, chain_row, lowest, scale,
    D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """(maximum [FOLDED], sum [FOLDED], accumulator [FOLDED, D]) that go on with the keys at positions [first,
    last).

    Pointers stand at the key head already, `pages` at the sequence's line of its table, `slots` at the slot
    of position `context`. Positions from `chain` on lie in rows chain_row, chain_row + 1, ...; every row sees
    the positions below `lowest`. Blocks begin at multiples of BLOCK_S, which divides PAGE.
    """
    o_n, o_d = tl.arange(0, BLOCK_S), tl.arange(0, D)
    # Twice a run of blocks read in place and a run of gathered ones: [first, cached) from the cache, gathered
    # up to `middle`, [middle, masked) from the chain in flight, gathered to the end. Any run may be empty.
    cached = tl.maximum(first, tl.minimum(last, context // BLOCK_S * BLOCK_S))
    middle = tl.maximum(cached, tl.cdiv(chain, BLOCK_S) * BLOCK_S)
    masked = tl.maximum(middle, tl.minimum(last, lowest) // BLOCK_S * BLOCK_S)
    end = tl.minimum(last, end)
    # Left in the loop, offsets cost nothing; hoisted out of it they spill (whole form, triton 3.6.0, sm_90).
    for i_run in tl.range(tl.where(middle < end, 2, 1), disable_licm=True):
        in_cache = i_run == 0
        start, stop = tl.where(in_cache, first, middle), tl.where(in_cache, cached, masked)
        # A chain in flight is read as pages that lie side by side.
        o_run = tl.where(in_cache, 0, (chain_row - chain).to(tl.int64) * stride_kt)
        p_k, p_v = (k_cache if in_cache else k) + o_run, (v_cache if in_cache else v) + o_run
        stride = tl.where(in_cache, stride_cs, stride_kt)
        stride_page = tl.where(in_cache, stride_cp, PAGE * stride_kt).to(tl.int64)
        o_kv = o_n[:, None] * stride + o_d[None, :]
        i_page = _page(pages, start, in_cache & (start < stop), PAGE)
        for position in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
            # Only the start of a block needs 64 bits; offsets within it stay small, which saves registers.
            o_block = i_page * stride_page + position % PAGE * stride
            # A page is looked up a block ahead: no copy waits for it, and the pipeline keeps all its stages.
            ahead = position + BLOCK_S
            i_page = _page(pages, ahead, in_cache & (ahead < stop), PAGE)
            b_s = tl.dot(b_q, tl.trans(tl.load(p_k + o_block + o_kv)), input_precision="ieee")
            b_max, b_sum, b_acc = step(b_s, tl.load(p_v + o_block + o_kv), b_max, b_sum, b_acc, scale)
        for position in tl.range(
            stop, tl.where(in_cache, tl.minimum(middle, end), end), BLOCK_S, num_stages=1
        ):
            o_s = position + o_n
            m_c, m_s = o_s < context, o_s < end
            i_own = _page(pages, position, position < context, PAGE).to(tl.int64)
            o_c = i_own * stride_cp + o_s % PAGE * stride_cs
            b_slot = tl.load(slots + (o_s - context), mask=m_s & (o_s >= context), other=0).to(tl.int64)
            p_ks = tl.where(m_c, k_cache + o_c, k + b_slot * stride_kt)
            b_k = tl.load(p_ks[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0)
            p_vs = tl.where(m_c, v_cache + o_c, v + b_slot * stride_kt)
            b_v = tl.load(p_vs[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_s = tl.where(row_sees_triton(o_s[None, :], b_limit[:, None]), b_s, float("-inf"))
            b_max, b_sum, b_acc = step(b_s, b_v, b_max, b_sum, b_acc, scale)
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=["T"])
def _partial_kernel(
    q, stride_qt, stride_qh, k, v, stride_kt, stride_kg,
    k_cache, v_cache, stride_cp, stride_cg, stride_cs, pages, stride_ps,
    rows, limits, tiles, slots, segments, items, count,
    acc, stats, arrivals, out, stride_ot, stride_oh,
    T, G, scale,
    D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, FOLDED: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, PAGE: tl.constexpr, FUSED: tl.constexpr, UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Items i, i + P, ... of the work list for one key head, P programs a head: acc [C, T, H, D], stats [C,
    T, H, 2] (maximum, sum) of each (tile, segment).

    FUSED >= T * GROUP, a power of two, for a pass of one path tile: the program whose item arrives last for
    its key head folds the partials into `out`. With FUSED 0 the combine does.
    """
    if PDL:
        wait()  # first of all, in programs without work too: the tables themselves may be new
        launch_dependents()
    i_g, n_items = (tl.program_id(0) % G).to(tl.int64), tl.load(count)
    o_m, o_d = tl.arange(0, FOLDED), tl.arange(0, D)
    i_h = i_g * GROUP + o_m % GROUP
    for i_item in range(tl.program_id(0) // G, n_items, tl.num_programs(0) // G):
        i_tile, i_segment = tl.load(items + 2 * i_item), tl.load(items + 2 * i_item + 1)
        m_m = o_m < TILE * GROUP
        i_row = tl.load(rows + i_tile * TILE + o_m // GROUP, mask=m_m, other=-1).to(tl.int64)
        b_limit = tl.load(limits + i_tile * TILE + o_m // GROUP, mask=m_m, other=0)
        m_m = i_row >= 0
        p_q = q + (i_row * stride_qt + i_h * stride_qh)[:, None] + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
        p_t = tiles + TILE_COLUMNS * i_tile
        i_b, context = tl.load(p_t + TILE_SEQUENCE).to(tl.int64), tl.load(p_t + TILE_CONTEXT)
        end, first_slot = tl.load(p_t + TILE_END), tl.load(p_t + TILE_FIRST_SLOT)
        chain, chain_row = tl.load(p_t + TILE_CHAIN), tl.load(p_t + TILE_CHAIN_ROW)
        lowest = tl.load(p_t + TILE_LOWEST)
        b_max, b_sum, b_acc = empty(FOLDED, D)
        b_max, b_sum, b_acc = _segment(
            b_q, b_limit, b_max, b_sum, b_acc, k + i_g * stride_kg, v + i_g * stride_kg, stride_kt,
            k_cache + i_g * stride_cg, v_cache + i_g * stride_cg, stride_cp, stride_cs,
            pages + i_b * stride_ps, slots + first_slot,
            tl.load(segments + i_segment), tl.load(segments + i_segment + 1), context, end,
            chain, chain_row, lowest, scale,
            D, BLOCK_S, STAGES, PAGE,
        )  # fmt: skip
        o_part = (i_segment.to(tl.int64) * T + i_row) * (G * GROUP) + i_h
        leave(acc, stats, o_part, m_m, b_max, b_sum, b_acc, D)
        if FUSED:
            tl.debug_barrier()  # every thread's partial is written before one thread publishes it
            if tl.atomic_add(arrivals + i_g, 1, sem="acq_rel") == n_items - 1:
                o_f = tl.arange(0, FUSED)
                f_row, f_h = (o_f // GROUP).to(tl.int64), i_g * GROUP + o_f % GROUP
                m_f = f_row < T
                o_first, stride_segment = f_row * (G * GROUP) + f_h, T.to(tl.int64) * (G * GROUP)
                o_first += tl.load(p_t + TILE_BEGIN) * stride_segment
                _, f_sum, f_acc = fold(
                    acc, stats, o_first, m_f, stride_segment, n_items, scale, FUSED, D, UNROLL
                )
                p_out = out + (f_row * stride_ot + f_h * stride_oh)[:, None] + o_d[None, :]
                tl.store(p_out, divided(f_sum, f_acc, m_f).to(out.dtype.element_ty), mask=m_f[:, None])
                tl.store(arrivals + i_g, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["T"])
def _combine_kernel(
    acc, stats, row_segments, out, stride_ot, stride_oh, T, H, scale,
    D: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Fold one row and head's partials in the order of the segments and divide; 0 for a row of padding."""
    if PDL:
        wait()
        launch_dependents()
    i_row, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(row_segments + 2 * i_row)
    n = tl.load(row_segments + 2 * i_row + 1) - first
    o_one, o_d = tl.arange(0, 1), tl.arange(0, D)
    stride_segment = T.to(tl.int64) * H
    o_first = first * stride_segment + i_row * H + i_h + o_one
    _, b_sum, b_acc = fold(acc, stats, o_first, o_one < n, stride_segment, n, scale, 1, D, UNROLL)
    p_out = out + i_row * stride_ot + i_h * stride_oh + o_one[:, None] + o_d[None, :]
    tl.store(p_out, divided(b_sum, b_acc, o_one < n).to(out.dtype.element_ty))


@triton.jit
def _whole_kernel(
    q, stride_qt, stride_qh, k, v, stride_kt, stride_kg,
    k_cache, v_cache, stride_cp, stride_cg, stride_cs, pages, stride_ps,
    rows, limits, tiles, slots, segments, items, count,
    out, stride_ot, stride_oh,
    G, scale,
    D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, FOLDED: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All segments of one path tile for one key head, folded in order."""
    if PDL:
        wait()
        launch_dependents()
    i_g, i_item = tl.program_id(0) % G, tl.program_id(0) // G
    if i_item >= tl.load(count):
        return
    i_tile = tl.load(items + 2 * i_item)
    o_m, o_d = tl.arange(0, FOLDED), tl.arange(0, D)
    m_m = o_m < TILE * GROUP
    i_row = tl.load(rows + i_tile * TILE + o_m // GROUP, mask=m_m, other=-1).to(tl.int64)
    b_limit = tl.load(limits + i_tile * TILE + o_m // GROUP, mask=m_m, other=0)
    m_m = i_row >= 0
    i_h = i_g * GROUP + o_m % GROUP
    p_q = q + (i_row * stride_qt + i_h * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
    p_t = tiles + TILE_COLUMNS * i_tile
    i_b, context = tl.load(p_t + TILE_SEQUENCE).to(tl.int64), tl.load(p_t + TILE_CONTEXT)
    end, first_slot = tl.load(p_t + TILE_END), tl.load(p_t + TILE_FIRST_SLOT)
    chain, chain_row = tl.load(p_t + TILE_CHAIN), tl.load(p_t + TILE_CHAIN_ROW)
    lowest = tl.load(p_t + TILE_LOWEST)
    begin, reach = tl.load(p_t + TILE_BEGIN), tl.load(p_t + TILE_REACH)
    i_g = i_g.to(tl.int64)
    b_max, b_sum, b_acc = empty(FOLDED, D)
    for i_segment in range(begin, reach):
        b_m, b_l, b_a = empty(FOLDED, D)
        b_m, b_l, b_a = _segment(
            b_q, b_limit, b_m, b_l, b_a, k + i_g * stride_kg, v + i_g * stride_kg, stride_kt,
            k_cache + i_g * stride_cg, v_cache + i_g * stride_cg, stride_cp, stride_cs,
            pages + i_b * stride_ps, slots + first_slot,
            tl.load(segments + i_segment), tl.load(segments + i_segment + 1), context, end,
            chain, chain_row, lowest, scale,
            D, BLOCK_S, STAGES, PAGE,
        )  # fmt: skip
        b_max, b_sum, b_acc = add(b_max, b_sum, b_acc, b_m, b_l, b_a, scale)
    p_out = out + (i_row * stride_ot + i_h * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_out, divided(b_sum, b_acc, m_m).to(out.dtype.element_ty), mask=m_m[:, None])


@triton.jit(do_not_specialize=["T"])
def _path_kernel(
    q, stride_qt, stride_qh, k, v, stride_kt, stride_kg,
    k_cache, v_cache, stride_cp, stride_cg, stride_cs, pages, stride_ps,
    rows, limits, tiles, slots, segments, row_segments,
    acc, stats, out, stride_ot, stride_oh,
    T, G, scale,
    D: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, FOLDED: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, PAGE: tl.constexpr, PLACES: tl.constexpr, PART: tl.constexpr, UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A path tile for one key head, in the shared form. acc, stats: of `_partial_kernel`, which has taken the
    whole pages of the context. The state of the ragged segment goes on from there, later segments begin anew,
    and then all are folded, PART rows and query heads at a time.

    A tile has TILE rows, in PLACES places of the tables. Row j of padding, which is in no tile, gets its
    zeros from the program of tile j // TILE.
    """
    if PDL:
        wait()
        launch_dependents()
    i_g, i_tile = (tl.program_id(0) % G).to(tl.int64), tl.program_id(0) // G
    o_m, o_d, o_f = tl.arange(0, FOLDED), tl.arange(0, D), tl.arange(0, PART)
    m_m, i_h = o_m < TILE * GROUP, i_g * GROUP + o_m % GROUP
    i_pad = i_tile * TILE + o_m // GROUP
    m_pad = m_m & (i_pad < T)
    m_pad &= tl.load(row_segments + 2 * i_pad + 1, mask=m_pad, other=1) == 0
    p_pad = out + (i_pad.to(tl.int64) * stride_ot + i_h * stride_oh)[:, None] + o_d[None, :]
    tl.store(p_pad, tl.zeros((FOLDED, D), out.dtype.element_ty), mask=m_pad[:, None])
    rows += i_tile * PLACES
    i_row = tl.load(rows + o_m // GROUP, mask=m_m, other=-1).to(tl.int64)
    b_limit = tl.load(limits + i_tile * PLACES + o_m // GROUP, mask=m_m, other=0)
    m_m = i_row >= 0
    n_folded = tl.sum(m_m.to(tl.int32))
    p_t = tiles + TILE_COLUMNS * i_tile  # asked for before the row is known: memory is waited for less often
    i_b, context = tl.load(p_t + TILE_SEQUENCE).to(tl.int64), tl.load(p_t + TILE_CONTEXT)
    end, first_slot = tl.load(p_t + TILE_END), tl.load(p_t + TILE_FIRST_SLOT)
    chain, chain_row = tl.load(p_t + TILE_CHAIN), tl.load(p_t + TILE_CHAIN_ROW)
    lowest, own, reach = tl.load(p_t + TILE_LOWEST), tl.load(p_t + TILE_BEGIN), tl.load(p_t + TILE_REACH)
    if n_folded == 0:
        return
    begin = tl.load(row_segments + 2 * tl.load(rows))
    p_q = q + (i_row * stride_qt + i_h * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
    in_pages, stride_segment = context // PAGE * PAGE, T.to(tl.int64) * (G * GROUP)
    for i_segment in range(own, reach):
        first, last = tl.load(segments + i_segment), tl.load(segments + i_segment + 1)
        o_part = i_segment * stride_segment + i_row * (G * GROUP) + i_h
        b_max, b_sum, b_acc = left(acc, stats, o_part, m_m & (first < in_pages), D)
        b_max, b_sum, b_acc = _segment(
            b_q, b_limit, b_max, b_sum, b_acc, k + i_g * stride_kg, v + i_g * stride_kg, stride_kt,
            k_cache + i_g * stride_cg, v_cache + i_g * stride_cg, stride_cp, stride_cs,
            pages + i_b * stride_ps, slots + first_slot, tl.maximum(first, in_pages), last, context, end,
            chain, chain_row, lowest, scale,
            D, BLOCK_S, STAGES, PAGE,
        )  # fmt: skip
        tl.debug_barrier()  # several threads have read one maximum, which is overwritten
        leave(acc, stats, o_part, m_m, b_max, b_sum, b_acc, D)
    tl.debug_barrier()  # other threads than wrote them read what lies in memory now
    for i_part in range(0, n_folded, PART):
        m_f = i_part + o_f < n_folded
        f_row = tl.load(rows + (i_part + o_f) // GROUP, mask=m_f, other=0).to(tl.int64)
        f_h = i_g * GROUP + (i_part + o_f) % GROUP
        o_first = begin * stride_segment + f_row * (G * GROUP) + f_h
        _, f_sum, f_acc = fold(
            acc, stats, o_first, m_f, stride_segment, reach - begin, scale, PART, D, UNROLL
        )
        p_out = out + (f_row * stride_ot + f_h * stride_oh)[:, None] + o_d[None, :]
        tl.store(p_out, divided(f_sum, f_acc, m_f).to(out.dtype.element_ty), mask=m_f[:, None])
