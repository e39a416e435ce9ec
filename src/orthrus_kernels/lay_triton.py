"""The one builder of a pass's tables as a kernel of one program; lay.py is its twin.

The kernel holds all rows as one vector. A walk up a path would take a step a row; it goes from **run** to
run, which are rows that stand below their neighbours: a chain of 2048 rows is one run. What a thread reads
that another one wrote goes through memory, a barrier between the two."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark
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
from .pages import PAGE
from .pass_tables import PassTables
from .plan import PassPlan
from .visibility import row_above_triton, row_begin_triton, row_limit_triton

_BLOCK = 512  # places that are cleared in a step
# Rows of the vector for a warp, of which there are 8 at most. Beside context tiles a vector of more than
# _WIDE rows has twice as many warps: with 8 of them registers spill.
_WARP_ROWS, _WIDE = 128, 512


@triton.jit
def larger(a, b):
    """For a scan: the largest so far."""
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _fill(p, n, value, BLOCK: tl.constexpr):
    """n numbers from p on."""
    o = tl.arange(0, BLOCK)
    for i in range(0, n, BLOCK):
        tl.store(p + i + o, tl.zeros((BLOCK,), tl.int32) + value, mask=i + o < n)


@triton.jit
def _walk(o, m, b_up, b_kin, b_run, b_depth, slots, W, scratch, T, DOUBLINGS):
    """(line, place in it from its head on, is it a head, is it the last of the line) of each row; fills the
    slots. b_kin: the row above is of the same view and block, so that the row may go on with its line.

    followers holds T in every place."""
    followers, heads, up = scratch, scratch + T, scratch + 2 * T
    depths, lines = scratch + 3 * T, scratch + 4 * T
    tl.atomic_min(followers + b_up, o, mask=b_kin, sem="relaxed")
    tl.store(heads + o, b_run, mask=m)
    tl.store(up + o, b_up, mask=m)
    tl.store(depths + o, b_depth, mask=m)
    tl.debug_barrier()
    goes_on = b_kin & (tl.load(followers + b_up, mask=b_kin, other=-1) == o)
    is_last = m & (tl.load(followers + o, mask=m, other=0) == T)
    is_head = m & (goes_on == 0)
    # To the head: from a row to the first row of the run above, while the line goes on there, then to where
    # that one has got to, and twice as far again.
    b_head = tl.where(goes_on, tl.load(heads + b_up, mask=goes_on, other=0), o)
    tl.debug_barrier()  # every thread has read the runs
    tl.store(heads + o, b_head, mask=m)
    tl.store(lines + o, tl.cumsum(is_head.to(tl.int32)) - 1, mask=is_head)
    tl.debug_barrier()
    for _ in range(DOUBLINGS):
        b_head = tl.load(heads + b_head, mask=m, other=0)
        tl.store(heads + o, b_head, mask=m)
        tl.debug_barrier()
    b_line = tl.load(lines + b_head, mask=m, other=0)
    b_place = b_depth - tl.load(depths + b_head, mask=m, other=0)
    tl.store(slots + b_line * W + b_depth, o, mask=m)
    # Above the head: a step a row, heads only.
    b_above, b_level = tl.where(is_head, b_up, -1), b_depth - 1
    for _ in range(tl.max(tl.where(is_head, b_depth, 0))):
        tl.store(slots + b_line * W + b_level, b_above, mask=b_above >= 0)
        b_above = tl.load(up + b_above, mask=b_above >= 0, other=-1)
        b_level -= 1
    return b_line, b_place, is_head, is_last


@triton.jit
def _work_list(tiles, items, count, FIRST, N_TILES, N_PATH, TILES: tl.constexpr, WHOLE: tl.constexpr):
    """The pairs of a tile from FIRST on and a segment that has keys of it, in order, and their number.
    N_PATH: path tiles that are used."""
    o_t = tl.arange(0, TILES)
    if WHOLE:
        tl.store(items + 2 * (N_PATH - 1 - o_t), o_t, mask=o_t < N_PATH)
        tl.store(items + 2 * (N_PATH - 1 - o_t) + 1, tl.zeros((TILES,), tl.int32), mask=o_t < N_PATH)
        tl.store(count, N_PATH)
    else:
        p_t, m_t = tiles + TILE_COLUMNS * o_t, (o_t >= FIRST) & (o_t < N_TILES)
        b_begin = tl.load(p_t + TILE_BEGIN, mask=m_t, other=0)
        b_reach = tl.load(p_t + TILE_REACH, mask=m_t, other=0)
        b_size = b_reach - b_begin
        b_turn = tl.load(p_t + TILE_SEQUENCE, mask=m_t, other=0) % tl.maximum((b_size + 1) // 2, 1)
        n = 0
        for i in range(0, tl.max(b_size)):
            has_keys = (i < b_size).to(tl.int32)
            b_back = tl.where(i == b_turn, 1, tl.where(i < b_turn, i + 2, i + 1))
            p_i = items + 2 * (n + tl.cumsum(has_keys) - 1)
            tl.store(p_i, o_t, mask=has_keys > 0)
            tl.store(p_i + 1, b_reach - b_back, mask=has_keys > 0)
            n += tl.sum(has_keys)
        tl.store(count, n)


@triton.jit(do_not_specialize=["T", "W", "S", "N_SEGMENTS", "N_TILES", "PATH_TILES", "DOUBLINGS"])
def _lay_kernel(
    tokens, positions, parents, blocks, sequences, start, stride_start, root, stride_root,
    rows, limits, tiles, slots, segments, items, count, row_segments, scratch, clock,
    T, W, S, N_SEGMENTS, N_TILES, PATH_TILES, DOUBLINGS,
    ROWS: tl.constexpr, TILE: tl.constexpr, PATH_TILE: tl.constexpr, TILES: tl.constexpr, MIXED: tl.constexpr,
    SHARED: tl.constexpr, WHOLE: tl.constexpr, ROOTED: tl.constexpr, MARKS: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Powers of two: ROWS >= T, TILES >= N_TILES. PATH_TILE: rows of a path tile at most. MIXED: there are
    context tiles. SHARED, WHOLE: the forms. MARKS: of the clock."""
    for i in tl.static_range(MARKS):
        mark(clock, i)
    _fill(rows, N_TILES * TILE, -1, BLOCK)
    _fill(limits, N_TILES * TILE, 0, BLOCK)
    _fill(tiles, N_TILES * TILE_COLUMNS, 0, BLOCK)
    _fill(scratch, T, T, BLOCK)

    o = tl.arange(0, ROWS)
    b_seq = tl.load(sequences + o, mask=o < T, other=-1)
    m = b_seq >= 0
    m_before, m_after = m & (o > 0), m & (o + 1 < T)
    m_before &= tl.load(sequences + o - 1, mask=m_before, other=-1) == b_seq
    m_after &= tl.load(sequences + o + 1, mask=m_after, other=-1) == b_seq
    b_block = tl.load(blocks + o, mask=m, other=-1)
    b_before = tl.load(blocks + o - 1, mask=m_before, other=-1)
    b_after = tl.load(blocks + o + 1, mask=m_after, other=-1)
    b_up = row_above_triton(o, tl.load(parents + o, mask=m, other=-1), b_block, b_before)
    b_up = tl.where(m, b_up, -1)
    b_run = tl.associative_scan(tl.where((b_up >= 0) & (b_up == o - 1), 0, o), 0, larger)
    ends_block = (b_block < 0) | (b_after != b_block)
    b_last = tl.associative_scan(tl.where(ends_block, o, ROWS), 0, _smaller, reverse=True)
    b_start = tl.load(start + b_seq * stride_start, mask=m, other=0)
    if ROOTED:
        b_depth = o - b_run
        tl.store(positions + o, (b_start + b_depth).to(tl.int64), mask=m)
        b_root = tl.load(root + b_seq * stride_root, mask=m, other=0)
        tl.store(tokens + o, b_root.to(tl.int64), mask=m & (b_depth == 0))
    else:
        b_depth = tl.load(positions + o, mask=m, other=0).to(tl.int32) - b_start
    b_at = b_start + b_depth
    b_limit = tl.where(m, row_limit_triton(b_at, b_block, b_at + 1 + b_last - o), 0)
    b_inside, b_reach = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
    b_begin = tl.zeros((ROWS,), tl.int32)
    first = tl.load(segments)
    for i in range(N_SEGMENTS):
        last = tl.load(segments + i + 1)
        b_reach += (first < b_limit).to(tl.int32)
        b_inside += (last <= b_start).to(tl.int32)
        b_begin += (last <= row_begin_triton(b_limit)).to(tl.int32)
        first = last
    tl.store(row_segments + 2 * o, b_begin, mask=o < T)
    tl.store(row_segments + 2 * o + 1, b_reach, mask=o < T)
    b_kin = (b_up >= 0) & (tl.load(blocks + b_up, mask=b_up >= 0, other=-1) == b_block)
    tl.debug_barrier()  # what was filled is written by other threads
    b_line, b_place, is_head, is_last = _walk(
        o, m, b_up, b_kin, b_run, b_depth, slots, W, scratch, T, DOUBLINGS
    )

    if MIXED:
        tile = PATH_TILES
        for s in range(S):
            mine = b_seq == s
            if tl.sum((mine & is_head).to(tl.int32)) > (0 if SHARED else 1):
                begin = tl.min(tl.where(mine, tl.minimum(b_begin, b_inside), N_SEGMENTS))
                b_begin = tl.where(mine, tl.maximum(b_inside, b_begin), b_begin)
                b_rank = tl.cumsum(mine.to(tl.int32)) - 1
                b_tile = tile + b_rank // TILE
                tl.store(rows + tile * TILE + b_rank, o, mask=mine)
                tl.store(limits + tile * TILE + b_rank, b_limit, mask=mine)
                opens, p_t = mine & (b_rank % TILE == 0), tiles + TILE_COLUMNS * b_tile
                b_here, b_taken = b_start, b_inside
                if SHARED:
                    b_here = b_start // PAGE * PAGE
                    b_taken += (tl.load(segments + b_inside, mask=opens, other=0) < b_here).to(tl.int32)
                tl.store(p_t + TILE_SEQUENCE, b_seq, mask=opens)
                tl.store(p_t + TILE_CONTEXT, b_here, mask=opens)
                tl.store(p_t + TILE_END, b_here, mask=opens)
                tl.store(p_t + TILE_BEGIN, tl.zeros((ROWS,), tl.int32) + begin, mask=opens)
                tl.store(p_t + TILE_REACH, b_taken, mask=opens)
                tl.store(p_t + TILE_CHAIN, b_here, mask=opens)
                tl.store(p_t + TILE_LOWEST, b_here, mask=opens)
                tile += tl.cdiv(tl.sum(mine.to(tl.int32)), TILE)

    b_place = b_place % PATH_TILE
    opens, closes = m & (b_place == 0), m & ((b_place == PATH_TILE - 1) | is_last)
    numbers = scratch + 5 * T
    b_number = tl.cumsum(opens.to(tl.int32))
    tl.store(numbers + o, b_number - 1, mask=opens)
    tl.debug_barrier()  # numbers and slots are read by other threads than wrote them
    b_first = tl.load(slots + b_line * W + b_depth - b_place, mask=m, other=0)
    b_tile = tl.load(numbers + b_first, mask=m, other=0)
    tl.store(rows + b_tile * TILE + b_place, o, mask=m)
    tl.store(limits + b_tile * TILE + b_place, b_limit, mask=m)
    p_t = tiles + TILE_COLUMNS * b_tile
    tl.store(p_t + TILE_SEQUENCE, b_seq, mask=opens)
    tl.store(p_t + TILE_CONTEXT, b_start, mask=opens)
    tl.store(p_t + TILE_FIRST_SLOT, b_line * W, mask=opens)
    tl.store(p_t + TILE_LOWEST, b_limit, mask=opens)
    tl.store(p_t + TILE_BEGIN, b_begin, mask=opens)
    tl.store(p_t + TILE_END, b_limit, mask=closes)
    tl.store(p_t + TILE_REACH, b_reach, mask=closes)
    # a block sees its end, past the row itself: the run is that of its last row, which is the same
    tl.store(p_t + TILE_CHAIN, b_at - (o - b_run), mask=closes)
    tl.store(p_t + TILE_CHAIN_ROW, b_run, mask=closes)
    tl.debug_barrier()  # the tiles are read by other threads than wrote them
    _work_list(tiles, items, count, PATH_TILES if SHARED else 0, N_TILES, tl.max(b_number), TILES, WHOLE)


def lay_triton(
    plan: PassPlan, tables: PassTables, root: Tensor | None = None, clock: Tensor | None = None
) -> None:
    """`lay` as one launch of one program."""
    shape, rows = plan.shape, triton.next_power_of_2(plan.shape.n_rows)
    assert shape == tables.shape, (shape, tables.shape)
    assert all(t.is_contiguous() for t in (plan.tokens, plan.positions, plan.parents, plan.blocks)), shape
    assert plan.start.shape == (shape.sequences,) and plan.start.dtype == torch.int32, plan.start.shape
    assert root is None or (root.shape == plan.start.shape and root.dtype == torch.int32), root
    tiles = triton.next_power_of_2(len(tables.tiles))
    mixed = tables.path_tiles < len(tables.tiles)
    halves = 1 + (mixed and rows > _WIDE)
    _lay_kernel[(1,)](
        tokens=plan.tokens, positions=plan.positions, parents=plan.parents, blocks=plan.blocks,
        sequences=plan.sequences, start=plan.start, stride_start=plan.start.stride(0),
        root=root, stride_root=0 if root is None else root.stride(0),
        rows=tables.rows, limits=tables.limits, tiles=tables.tiles, slots=tables.slots,
        segments=tables.segments, items=tables.items, count=tables.count, row_segments=tables.row_segments,
        scratch=tables.scratch, clock=clock, T=shape.n_rows, W=shape.depth, S=shape.sequences,
        N_SEGMENTS=tables.n_segments, N_TILES=len(tables.tiles), PATH_TILES=tables.path_tiles,
        DOUBLINGS=(shape.depth - 1).bit_length(),
        ROWS=rows, TILE=tables.tile_rows, PATH_TILE=tables.path_rows, TILES=tiles, MIXED=mixed,
        SHARED=tables.shared, WHOLE=tables.whole, ROOTED=root is not None,
        MARKS=0 if clock is None else len(clock), BLOCK=_BLOCK, PAGE=PAGE,
        num_warps=halves * min(8, max(1, max(rows, tiles) // _WARP_ROWS)),
    )  # fmt: skip
