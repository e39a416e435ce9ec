"""Sums in registers to rows of y, with SwiGLU or added over segments: the second half of the linear in Gluon
(linear_gluon.py), for Hopper.

**Segments** run in programs of their own, which exchange their sums: each leaves its sum in memory and counts
itself as arrived; ADDERS of them wait for all, and each of these adds a share of the rows of x, in index
order from zero. The last one to leave sets the counter to zero for the next launch.

Programs that wait for programs must all run. So a launch has no more than the GPU has multiprocessors, and
the programs of a tile are neighbours in the launch order, so that they run at once where another stream holds
most of the GPU. A wait of more than a second is a fault: the program leaves a word for the host (late.py) and
stops the GPU by a write to nowhere."""

from ._gluon import aggregate, barrier, constexpr_function, gl, gluon, in_gluon
from ._triton import tl
from .gluon_ring import HEIGHT, PAIRS
from .swiglu import silu_times as _silu_times

silu_times = in_gluon(_silu_times)


@aggregate
class Out:
    """Where sums go: y [rows, N] in rows of sy_t; partials, counters of arrivals and the word for the
    host."""

    y: gl.tensor
    sy_t: gl.tensor
    N: gl.tensor
    partials: gl.tensor
    counters: gl.tensor
    late: gl.tensor

    @constexpr_function
    def __init__(self, y, sy_t, N, partials, counters, late):
        self.y = y
        self.sy_t = sy_t
        self.N = N
        self.partials = partials
        self.counters = counters
        self.late = late


@gluon.jit
def store(tile, out, total, first_n, first_row):
    """Sums [64, T] of weight rows from first_n on to y, rows of x from first_row on; those of pairs as
    SwiGLU."""
    T: gl.constexpr = total.shape[1]
    WIDTH: gl.constexpr = HEIGHT // 2 if tile.SWIGLU else HEIGHT
    if tile.SWIGLU:
        gate, up = total.reshape([HEIGHT // (2 * PAIRS), 2, PAIRS, T]).permute([0, 2, 3, 1]).split()
        gate, up = gate.to(gl.bfloat16).to(gl.float32), up.to(gl.bfloat16).to(gl.float32)
        b_y = silu_times(gate, up, gl.bfloat16).reshape([WIDTH, T])
        first_n = first_n // 2
    else:
        b_y = total.to(gl.bfloat16)
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [WIDTH // 8, 256 // WIDTH], [1, 4], [0, 1])
    o_n = first_n + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, layout))
    o_t = first_row + gl.arange(0, T, layout=gl.SliceLayout(0, layout))
    p_y = out.y + o_t.to(gl.int64)[None, :] * out.sy_t + o_n[:, None]
    gl.store(p_y, gl.convert_layout(b_y, layout), mask=(o_t < tile.end_row)[None, :] & (o_n < out.N)[:, None])


@gluon.jit
def _leave(p_own, acc, FIRST: gl.constexpr):
    """A segment's sum [64, T] to memory, rows of x from FIRST on: the order in which shares are read."""
    o_n = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, acc.type.layout))
    o_t = FIRST + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    gl.store(p_own + o_t[None, :] * HEIGHT + o_n[:, None], acc)


@gluon.jit
def _stop_if_late(began, late):
    """Stop the GPU a second behind `began`, ns of its clock. The host finds the word when its next call
    fails. Not by a trap: it ends the program, and ptxas then gives the warps of all partitions but one the
    registers that they have before they are told to take more, so that tiles of 2 and 3 groups spill."""
    waited = tl.extra.cuda.globaltimer() - began
    gl.inline_asm_elementwise(
        "{ .reg .pred gone; .reg .u64 nowhere; setp.gt.s64 gone, $1, 1000000000;"
        " @gone st.volatile.global.u32 [$2], 1; @gone membar.sys; mov.u64 nowhere, 0;"
        " @gone st.volatile.global.u32 [nowhere], 1; mov.u32 $0, 0; }",
        "=r,l,l", [waited, late.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _meet(counter, late, arrived, SEGMENTS: gl.constexpr):
    """Wait until all segments of a tile have arrived, of which `arrived` have, and say how many have left
    this wait before."""
    began = tl.extra.cuda.globaltimer()
    while arrived < SEGMENTS:
        arrived = gl.atomic_add(counter, 0, sem="acquire")
        _stop_if_late(began, late)
    return gl.atomic_add(counter, 1, sem="relaxed") - SEGMENTS


@gluon.jit
def _add_share(tile, out, p_sums, adder, first_n, FIRST: gl.constexpr, T: gl.constexpr,
               ADDERS: gl.constexpr):  # fmt: skip
    """Add the segments' sums of this program's share of T rows of x from FIRST on, in index order."""
    SHARE: gl.constexpr = T // ADDERS
    ALL: gl.constexpr = tile.PARTS * tile.BLOCK_T + tile.TAIL_T
    layout: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
    o_n = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
    o_t = FIRST + adder * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(0, layout))
    p_c = p_sums + o_t[None, :] * HEIGHT + o_n[:, None]
    total = gl.zeros([HEIGHT, SHARE], gl.float32, layout)
    for s in gl.static_range(tile.SEGMENTS):  # .cg: L1 may hold an older launch's partials
        total += gl.load(p_c + s * (ALL * HEIGHT), cache_modifier=".cg")
    store(tile, out, total, first_n, tile.first_row + FIRST + adder * SHARE)


@gluon.jit
def exchange(tile, out, sums, first_n, G: gl.constexpr):
    """Leave this segment's sum; the first ADDERS segments, a power of two of them, add all sums. Not for
    SwiGLU, which would spill."""
    ALL: gl.constexpr = tile.PARTS * tile.BLOCK_T + tile.TAIL_T
    ADDERS: gl.constexpr = 4 if tile.SEGMENTS >= 4 else 2
    i_sum = tile.number * tile.GROUPS + G
    p_sums = out.partials + i_sum.to(gl.int64) * (tile.SEGMENTS * ALL * HEIGHT)
    p_own = p_sums + tile.segment * (ALL * HEIGHT)
    for p in gl.static_range(tile.PARTS):
        _leave(p_own, sums[p], p * tile.BLOCK_T)
    if tile.TAIL_T > 0:
        _leave(p_own, sums[tile.PARTS], tile.PARTS * tile.BLOCK_T)
    barrier()  # every thread's part of the sum is written before one thread publishes it
    counter = out.counters + i_sum
    arrived = gl.atomic_add(counter, 1, sem="acq_rel") + 1
    if tile.segment < ADDERS:
        left = _meet(counter, out.late, arrived, tile.SEGMENTS)
        barrier()
        for p in gl.static_range(tile.PARTS):
            _add_share(tile, out, p_sums, tile.segment, first_n, p * tile.BLOCK_T, tile.BLOCK_T, ADDERS)
        if tile.TAIL_T > 0:
            behind: gl.constexpr = tile.PARTS * tile.BLOCK_T
            _add_share(tile, out, p_sums, tile.segment, first_n, behind, tile.TAIL_T, ADDERS)
        if left == ADDERS - 1:
            gl.store(counter, 0)  # ready for the next launch


@gluon.jit
def put(tile, out, sums, first_n):
    """Sums of weight rows from first_n on to y, a block for each part of the rows and the tail, added to zero
    as in linear.py: no sum is -0."""
    for p in gl.static_range(tile.PARTS):
        store(tile, out, 0.0 + sums[p], first_n, tile.first_row + p * tile.BLOCK_T)
    if tile.TAIL_T > 0:
        store(tile, out, 0.0 + sums[tile.PARTS], first_n, tile.first_row + tile.PARTS * tile.BLOCK_T)


@gluon.jit
def finish(tile, out, sums, G: gl.constexpr):
    """What becomes of the segment's sums of warpgroup G, a block for each part of the rows and the tail:
    exchanged with other segments', or stored."""
    first_n = tile.first_n + G * HEIGHT
    if tile.SEGMENTS > 1:
        exchange(tile, out, sums, first_n, G)
    else:
        put(tile, out, sums, first_n)
