"""The diffusion blocks of a one-pass cycle on the device: placed before the pass, followed behind it.

`place_blocks_triton` stands between the tree that `grow_triton` has grown and the pass: it chooses the nodes
that get a block (anchors.py) and fills the blocks' rows and path tiles, whose layout `tree_tables` fixes; one
program a block, each of which ranks all nodes for itself. `follow_triton` stands behind the walk: which
block's rows draft what comes next, if there is one at the node where the walk has ended."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .grow_triton import TreeTables
from .layout import (
    RECORD,
    RECORD_HEAD,
    RECORD_KEPT,
    STATE_START,
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


@triton.jit
def _place_kernel(
    start_root, parents, scores, path_tile, tokens, positions, anchors,
    limits, tiles, slots, segments, items, row_segments,
    N, DEPTH, SIZE, TILES, N_SEGMENTS,
    TILE: tl.constexpr, SEGMENTS: tl.constexpr, NODES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One block, in TILES path tiles. Powers of two: NODES >= N, SLOTS >= DEPTH and SIZE, SEGMENTS."""
    i_block = tl.program_id(0)
    start = tl.load(start_root + STATE_START)
    o_n, o_s, o_d, o_r = tl.arange(0, NODES), tl.arange(0, SEGMENTS), tl.arange(0, SLOTS), tl.arange(0, TILE)
    b_first = tl.load(segments + o_s, mask=o_s < N_SEGMENTS, other=0x7FFFFFFF)
    b_last = tl.load(segments + 1 + o_s, mask=o_s < N_SEGMENTS, other=0x7FFFFFFF)
    whole = tl.sum((b_last <= start).to(tl.int32), axis=0)  # segments wholly inside the context

    b_end = tl.exp(tl.load(scores + o_n, mask=o_n < N, other=float("-inf")))
    for node in range(1, N):
        b_end -= tl.where(o_n == tl.load(parents + node), tl.exp(tl.load(scores + node)), 0.0)
    b_end = tl.where(b_end > 0, b_end, 0.0)
    # Ranked as numbers of one tensor, as in rerank.py: bits of numbers not below 0 are in their order.
    b_key = ((0x7F800000 - b_end.to(tl.int32, bitcast=True)).to(tl.int64) << 16) | o_n
    b_key = tl.sort(tl.where(o_n < N, b_key, 0x7FFFFFFFFFFFFFFF))
    anchor = (tl.sum(tl.where(o_n == i_block, b_key, 0), axis=0) & 0xFFFF).to(tl.int32)
    tl.store(anchors + i_block, anchor)

    depth = tl.load(positions + anchor).to(tl.int32) - start
    end, row = start + depth + SIZE, N + i_block * SIZE
    reach = tl.sum((b_first < end).to(tl.int32), axis=0)
    first_slot = N * (DEPTH + 1) + i_block * (DEPTH + SIZE)
    b_above = tl.load(slots + tl.load(path_tile + anchor) * (DEPTH + 1) + o_d, mask=o_d < depth, other=0)
    tl.store(slots + first_slot + o_d, b_above, mask=o_d < depth)
    m_own = o_d < SIZE
    tl.store(slots + first_slot + depth + o_d, row + o_d, mask=m_own)
    tl.store(positions + row + o_d, (start + depth + o_d).to(tl.int64), mask=m_own)
    tl.store(row_segments + row + o_d, tl.zeros((SLOTS,), tl.int32) + reach, mask=m_own)
    tl.store(tokens + row, tl.load(tokens + anchor))
    for i in range(TILES):
        tile = N + i_block * TILES + i
        tl.store(limits + tile * TILE + o_r, tl.zeros((TILE,), tl.int32) + end, mask=i * TILE + o_r < SIZE)
        p_t = tiles + TILE_COLUMNS * tile
        tl.store(p_t + TILE_SEQUENCE, 0)
        tl.store(p_t + TILE_CONTEXT, start)
        tl.store(p_t + TILE_END, end)
        tl.store(p_t + TILE_FIRST_SLOT, first_slot)
        tl.store(p_t + TILE_REACH, reach)
        tl.store(p_t + TILE_CHAIN, start + depth)
        tl.store(p_t + TILE_CHAIN_ROW, row)
        tl.store(p_t + TILE_LOWEST, end)
        for after in tl.static_range(2):  # the segment that holds the context's end, and the next one
            p_i = items + 4 * tile + 2 * after
            tl.store(p_i, tl.where(whole + after < reach, tile, -1 - tile))
            tl.store(p_i + 1, tl.minimum(whole + after, N_SEGMENTS - 1))


def place_blocks_triton(tables: TreeTables, state: Tensor, anchors: Tensor) -> None:
    """Put the blocks of the tables at the likeliest ends of the tree that they hold. One launch.

    state [>= 2] int32: where the root stands and its token. anchors [A] int32: takes the nodes, likeliest
    first."""
    packed, n, count = tables.packed, len(tables.parents), len(anchors)
    size, rest = divmod(packed.n_rows - n, count)
    assert rest == 0 and 0 < count <= n < 2**16, (packed.n_rows, n, count)
    assert tables.block_tiles == count * triton.cdiv(size, packed.tile_rows), tables.block_tiles
    assert anchors.dtype == state.dtype == torch.int32, (anchors.dtype, state.dtype)
    _place_kernel[(count,)](
        start_root=state, parents=tables.parents, scores=tables.scores, path_tile=tables.path_tile,
        tokens=tables.ids[0], positions=tables.ids[1], anchors=anchors, limits=packed.limits,
        tiles=packed.tiles, slots=packed.slots, segments=packed.segments, items=packed.items,
        row_segments=packed.row_segments, N=n, DEPTH=tables.depth, SIZE=size,
        TILES=tables.block_tiles // count, N_SEGMENTS=packed.n_segments, TILE=packed.tile_rows,
        SEGMENTS=triton.next_power_of_2(packed.n_segments), NODES=triton.next_power_of_2(n),
        SLOTS=triton.next_power_of_2(max(tables.depth, size)), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "SIZE", "ANCHORS", "ROWS"])
def _follow_kernel(
    record, state, anchors, rows, positions, drafted,
    N, SIZE, ANCHORS, ROWS,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK >= ANCHORS and ROWS, a power of two."""
    o = tl.arange(0, BLOCK)
    kept, start = tl.load(record + RECORD_KEPT), tl.load(state + STATE_START)
    end = tl.load(record + RECORD_HEAD + 2 * N + tl.maximum(kept - 1, 0))
    b_anchor = tl.load(anchors + o, mask=o < ANCHORS, other=-1)
    block = tl.min(tl.where(b_anchor == end, o, BLOCK))
    found = (block < BLOCK) & (kept > 0)
    # row 0's proposal stands in the bonus token's place
    first = N + tl.where(found, block, 0) * SIZE + 1
    tl.store(rows + o, (first + o).to(tl.int64), mask=o < ROWS)
    tl.store(positions + o, (start + 1 + o).to(tl.int64), mask=o < ROWS)
    tl.store(drafted, tl.where(found, start, -1))


def follow_triton(
    record: Tensor, state: Tensor, anchors: Tensor, size: int, rows: Tensor, positions: Tensor,
    drafted: Tensor,
) -> None:  # fmt: skip
    """Which rows of the pass draft the tree behind the walk that `advance_triton` has recorded. One launch.

    record int32 [RECORD + 3 N], state int32: of `advance_triton`. anchors [A] int32: nodes with a block of
    `size` rows, in their order behind the N nodes. Written: rows [P] int64, those rows, and positions [P]
    int64, what their proposals take; drafted [1] int32: where the root of that tree stands, -1 without a
    block there, when any rows are written."""
    n = (len(record) - RECORD) // 3
    assert len(rows) == len(positions) <= size - 2, (len(rows), len(positions), size)
    assert {t.dtype for t in (record, state, anchors, drafted)} == {torch.int32}, "int32 tables"
    assert {rows.dtype, positions.dtype} == {torch.int64}, (rows.dtype, positions.dtype)
    _follow_kernel[(1,)](
        record=record, state=state, anchors=anchors, rows=rows, positions=positions, drafted=drafted,
        N=n, SIZE=size, ANCHORS=len(anchors), ROWS=len(rows),
        BLOCK=triton.next_power_of_2(max(len(anchors), len(rows))), num_warps=1,
    )  # fmt: skip
