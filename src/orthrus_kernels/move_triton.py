"""The tables of a pass moved to where its sequence stands, by one program: no host between two cycles."""

from __future__ import annotations

from torch import Tensor

from ._triton import tl, triton
from .clock import mark
from .layout import TILE_CHAIN, TILE_COLUMNS, TILE_CONTEXT, TILE_END, TILE_LOWEST, TILE_REACH
from .packed import PackedRows

_BLOCK = 128  # places a step


@triton.jit(do_not_specialize=["N_TILES", "PATH_TILES", "N_ITEMS", "N_ROWS", "N_SEGMENTS"])
def _move_kernel(
    start, root, rows, limits, tiles, segments, items, row_segments, tokens, positions, depths, clock,
    N_TILES, PATH_TILES, N_ITEMS, N_ROWS, N_SEGMENTS,
    TILE: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """All of it in one program. SEGMENTS >= N_SEGMENTS, a power of two. MARKS: of the clock, set at once."""
    if MARKS > 0:
        for i in tl.static_range(MARKS):
            mark(clock, i)
    context = tl.load(start)
    delta = context - tl.load(tiles + TILE_CONTEXT)
    o_b, o_s = tl.arange(0, BLOCK), tl.arange(0, SEGMENTS)
    b_first = tl.load(segments + o_s, mask=o_s < N_SEGMENTS, other=0x7FFFFFFF)
    tl.debug_barrier()  # every thread has read the old context
    for i in range(0, N_TILES * TILE, BLOCK):
        o_p = i + o_b
        b_row = tl.load(rows + o_p, mask=o_p < N_TILES * TILE, other=-1)
        m_row = b_row >= 0
        b_limit = tl.load(limits + o_p, mask=m_row, other=0) + delta
        tl.debug_barrier()  # no thread loads again what another has moved
        tl.store(limits + o_p, b_limit, mask=m_row)
        b_count = tl.sum((b_first[None, :] < b_limit[:, None]).to(tl.int32), axis=1)
        tl.store(row_segments + b_row, b_count, mask=m_row & (o_p < PATH_TILES * TILE))
    for i in range(0, N_TILES, BLOCK):
        m_t = i + o_b < N_TILES
        p_t = tiles + TILE_COLUMNS * (i + o_b)
        b_end = tl.load(p_t + TILE_END, mask=m_t, other=0) + delta
        b_chain = tl.load(p_t + TILE_CHAIN, mask=m_t, other=0) + delta
        b_lowest = tl.load(p_t + TILE_LOWEST, mask=m_t, other=0) + delta
        tl.debug_barrier()
        tl.store(p_t + TILE_CONTEXT, tl.full((BLOCK,), context, tl.int32), mask=m_t)
        tl.store(p_t + TILE_END, b_end, mask=m_t)
        tl.store(p_t + TILE_REACH, tl.sum((b_first[None, :] < b_end[:, None]).to(tl.int32), axis=1), mask=m_t)
        tl.store(p_t + TILE_CHAIN, b_chain, mask=m_t)
        tl.store(p_t + TILE_LOWEST, b_lowest, mask=m_t)
    tl.debug_barrier()  # the ends are read by other threads than wrote them
    for i in range(0, N_ITEMS, BLOCK):
        o_i = i + o_b
        m_i = o_i < N_ITEMS
        b_tile = tl.load(items + 2 * o_i, mask=m_i, other=0)
        b_tile = tl.where(b_tile < 0, -1 - b_tile, b_tile)
        p_s = segments + tl.load(items + 2 * o_i + 1, mask=m_i, other=0)
        b_inside = tl.load(p_s + 1, mask=m_i, other=0) <= context
        b_end = tl.load(tiles + TILE_COLUMNS * b_tile + TILE_END, mask=m_i, other=0)
        b_reached = tl.load(p_s, mask=m_i, other=0) < b_end
        in_path = b_reached & ((b_inside == 0) | (N_TILES == PATH_TILES))
        has_keys = tl.where(b_tile < PATH_TILES, in_path, b_inside)
        tl.store(items + 2 * o_i, tl.where(has_keys, b_tile, -1 - b_tile), mask=m_i)
    for i in range(0, N_ROWS, BLOCK):
        o_r = i + o_b
        b_depth = tl.load(depths + o_r, mask=o_r < N_ROWS, other=0)
        tl.store(positions + o_r, b_depth + context.to(tl.int64), mask=o_r < N_ROWS)
    tl.store(tokens, tl.load(root).to(tl.int64))


def move_triton(
    packed: PackedRows, start: Tensor, root: Tensor, ids: Tensor, depths: Tensor, clock: Tensor | None = None
) -> None:
    """`move`, and the pass's input ids [2, T] int64 with it: row 0's token is root, positions are start +
    depths. One launch.

    start, root [1] int32; depths [T] int64: how far behind the context each row stands. clock int32: takes
    the time of the launch in all its places (clock.py)."""
    n = packed.n_rows
    assert ids.shape == (2, n) and depths.shape == (n,), (ids.shape, depths.shape, n)
    assert ids.is_contiguous() and depths.is_contiguous(), (ids.stride(), depths.stride())
    _move_kernel[(1,)](
        start=start, root=root, rows=packed.rows, limits=packed.limits, tiles=packed.tiles,
        segments=packed.segments, items=packed.items, row_segments=packed.row_segments,
        tokens=ids[0], positions=ids[1], depths=depths, clock=clock, N_TILES=len(packed.tiles),
        PATH_TILES=packed.path_tiles, N_ITEMS=len(packed.items), N_ROWS=n, N_SEGMENTS=packed.n_segments,
        TILE=packed.tile_rows, SEGMENTS=triton.next_power_of_2(packed.n_segments), BLOCK=_BLOCK,
        MARKS=0 if clock is None else len(clock), num_warps=4,
    )  # fmt: skip
