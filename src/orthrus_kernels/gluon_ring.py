"""Tiles of a weight and of rows through a ring in shared memory, to sums in registers: the first half of the
linear in Gluon (linear_gluon.py), for Hopper.

One warp copies tiles into STAGES places (TMA), warpgroups multiply what lies there. Two barriers a place say
when it is full and when it is free again. The copying warp fills the ring with tiles of the weight, which no
kernel of a pass writes, waits for the grid in front (pdl.py), and only then copies rows of x. Multiplying
warps wait for those rows, so that whatever they touch behind their first place is touched behind that wait
too. So no segment may be empty."""

from ._gluon import (
    aggregate,
    constexpr_function,
    fence_async_shared,
    gl,
    gluon,
    in_gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .pdl import wait as _wait

BLOCK_K = gl.constexpr(64)
HEIGHT = gl.constexpr(64)  # weight rows of a warpgroup: the height of wgmma
# For SwiGLU 8 gate rows and the 8 up rows that belong to them take turns: a thread's sums have rows 8 apart.
PAIRS = gl.constexpr(8)

wait = in_gluon(_wait)


@constexpr_function
def layout_of(T):
    """Of the sums of a warpgroup, [64, T]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])


@aggregate
class Tile:
    """What a program computes: weight rows from first_n on, rows [first_row, end_row) of x, `blocks` blocks
    of K from the block `first` on, which are segment number `segment`. number: of the tile in the launch."""

    first_n: gl.tensor
    first_row: gl.tensor
    end_row: gl.tensor
    first: gl.tensor
    blocks: gl.tensor
    segment: gl.tensor
    number: gl.tensor
    GROUPS: gl.constexpr
    PARTS: gl.constexpr  # of rows of x: BLOCK_T rows each, a power of two
    BLOCK_T: gl.constexpr
    TAIL_T: gl.constexpr  # rows behind them: another power of two, or none
    STAGES: gl.constexpr
    SEGMENTS: gl.constexpr
    SWIGLU: gl.constexpr

    @constexpr_function
    def __init__(self, first_n, first_row, end_row, first, blocks, segment, number, GROUPS, PARTS, BLOCK_T,
                 TAIL_T, STAGES, SEGMENTS, SWIGLU):  # fmt: skip
        self.first_n = first_n
        self.first_row = first_row
        self.end_row = end_row
        self.first = first
        self.blocks = blocks
        self.segment = segment
        self.number = number
        self.GROUPS = gl.constexpr(GROUPS)
        self.PARTS = gl.constexpr(PARTS)
        self.BLOCK_T = gl.constexpr(BLOCK_T)
        self.TAIL_T = gl.constexpr(TAIL_T)
        self.STAGES = gl.constexpr(STAGES)
        self.SEGMENTS = gl.constexpr(SEGMENTS)
        self.SWIGLU = gl.constexpr(SWIGLU)


@aggregate
class Ring:
    """Tiles in shared memory, STAGES places of each, and the barriers of the places."""

    weight: gl.shared_memory_descriptor  # [STAGES * GROUPS, 64, 64]
    rows: gl.shared_memory_descriptor  # [STAGES, BLOCK_T, 64]
    tail: gl.shared_memory_descriptor  # [STAGES, TAIL_T, 64]; `rows` where there is none
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @constexpr_function
    def __init__(self, weight, rows, tail, full, free):
        self.weight = weight
        self.rows = rows
        self.tail = tail
        self.full = full
        self.free = free


@gluon.jit
def new_ring(tile):
    gl.static_assert(tile.PARTS == 1)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    weight = gl.allocate_shared_memory(gl.bfloat16, [tile.STAGES * tile.GROUPS, HEIGHT, BLOCK_K], layout)
    rows = gl.allocate_shared_memory(gl.bfloat16, [tile.STAGES, tile.BLOCK_T, BLOCK_K], layout)
    if tile.TAIL_T > 0:
        tail = gl.allocate_shared_memory(gl.bfloat16, [tile.STAGES, tile.TAIL_T, BLOCK_K], layout)
    else:
        tail = rows
    full = gl.allocate_shared_memory(gl.int64, [tile.STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [tile.STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(tile.STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=tile.GROUPS)
    fence_async_shared()
    return Ring(weight, rows, tail, full, free)


@gluon.jit
def _copy_weight(tile, ring, w, i, place):
    """Block i of the segment. The place is full when the rows of x have come too."""
    BYTES: gl.constexpr = (tile.GROUPS * HEIGHT + tile.BLOCK_T + tile.TAIL_T) * BLOCK_K * 2
    full = ring.full.index(place)
    mbarrier.expect(full, BYTES)
    first_k = (tile.first + i) * BLOCK_K
    for g in gl.static_range(tile.GROUPS):
        to = ring.weight.index(place * tile.GROUPS + g)
        if tile.SWIGLU:
            first_pair = tile.first_n // (2 * PAIRS) + g * (HEIGHT // (2 * PAIRS))
            pairs = to.reshape([HEIGHT // (2 * PAIRS), 2, PAIRS, BLOCK_K])
            tma.async_copy_global_to_shared(w, [first_pair, 0, 0, first_k], full, pairs)
        else:
            tma.async_copy_global_to_shared(w, [tile.first_n + g * HEIGHT, first_k], full, to)


@gluon.jit
def _copy_rows(tile, ring, x, x_tail, i, place):
    """What memory holds behind the last row is copied too: columns of the sums that nobody stores."""
    full, first_k = ring.full.index(place), (tile.first + i) * BLOCK_K
    tma.async_copy_global_to_shared(x, [tile.first_row, first_k], full, ring.rows.index(place))
    if tile.TAIL_T > 0:
        behind = tile.first_row + tile.BLOCK_T
        tma.async_copy_global_to_shared(x_tail, [behind, first_k], full, ring.tail.index(place))


@gluon.jit
def next_place(place, phase, STAGES: gl.constexpr):
    place += 1
    if place == STAGES:
        place = 0
        phase ^= 1
    return place, phase


@gluon.jit
def begin(tile, ring, w, x, x_tail, PDL: gl.constexpr):
    """Fill free places with the first blocks of a program's first tile: (blocks, place and phase behind)."""
    ahead = gl.minimum(tile.blocks, tile.STAGES)
    for i in range(ahead):
        _copy_weight(tile, ring, w, i, i)
    if PDL:
        wait()  # x, y, partials and counters may be in use until here
    place, phase = 0, 1  # of a barrier that nobody has arrived at, phase 1 has ended
    for i in range(ahead):
        _copy_rows(tile, ring, x, x_tail, i, place)
        place, phase = next_place(place, phase, tile.STAGES)
    return ahead, place, phase


@gluon.jit
def go_on(tile, ring, w, x, x_tail, first, place, phase):
    """Copy blocks from number `first` on: (place, phase) behind them."""
    for i in range(first, tile.blocks):
        mbarrier.wait(ring.free.index(place), phase)
        _copy_weight(tile, ring, w, i, place)
        _copy_rows(tile, ring, x, x_tail, i, place)
        place, phase = next_place(place, phase, tile.STAGES)
    return place, phase


@gluon.jit
def copy(tile, ring, w, x, x_tail, PDL: gl.constexpr):
    """The copying warp, of a program that has one tile."""
    ahead, place, phase = begin(tile, ring, w, x, x_tail, PDL)
    go_on(tile, ring, w, x, x_tail, ahead, place, phase)


@gluon.jit
def sum_blocks(tile, ring, blocks, place, phase, G: gl.constexpr):
    """Sum of so many blocks in weight rows of warpgroup G, [64, BLOCK_T] and [64, TAIL_T] fp32, the first one
    again where there is no tail; (sum, sum of the tail, place and phase behind them). Products of one block
    are under way while the next ones are asked for."""
    TAIL_T: gl.constexpr = tile.TAIL_T if tile.TAIL_T > 0 else tile.BLOCK_T
    acc = gl.zeros([HEIGHT, tile.BLOCK_T], gl.float32, layout_of(tile.BLOCK_T))
    tail = gl.zeros([HEIGHT, TAIL_T], gl.float32, layout_of(TAIL_T))
    before = place + 0  # a value of its own: with that of `place` Triton would take it for the same all along
    for i in range(blocks):
        mbarrier.wait(ring.full.index(place), phase)
        b_w = ring.weight.index(place * tile.GROUPS + G)
        acc = warpgroup_mma(b_w, ring.rows.index(place).permute((1, 0)), acc, is_async=True)
        if tile.TAIL_T > 0:
            tail = warpgroup_mma(b_w, ring.tail.index(place).permute((1, 0)), tail, is_async=True)
            acc, tail = warpgroup_mma_wait(2, deps=(acc, tail))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(ring.free.index(before), pred=i > 0)  # its products are done
        before = place
        place, phase = next_place(place, phase, tile.STAGES)
    if tile.TAIL_T > 0:
        acc, tail = warpgroup_mma_wait(0, deps=(acc, tail))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        tail = acc
    mbarrier.arrive(ring.free.index(before))
    return acc, tail, place, phase
