"""Codes of a weight and codes of rows (W8A8) from the ring of gluon_codes.py to sums in registers on Hopper.

Both operands of wgmma lie in shared memory. A group's sum begins at nothing and is folded by
`fma(sum of the group, s_w * s_x, sum so far)`, as in `_sum_of_codes` (quantised_triton.py). While a warpgroup
folds, the tensor cores have the products of another one. The scales of rows come through the ring. Those of
the weight are loaded AHEAD groups before their use: one number, where all weight rows of a warpgroup share a
factor, else one for each of a thread's two rows, which in tall tiles are loaded one group ahead."""

from ._gluon import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .gluon_codes import AHEAD, factor_of, weight_rows
from .gluon_ring import HEIGHT, next_place


@gluon.jit
def _scales(tile, codes, ring, factor, place, acc, FIRST: gl.constexpr, ONE: gl.constexpr):
    """s_w * s_x for each number of a sum, whose first row is row FIRST of the tile. Scales of rows are read
    from the place."""
    columns: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = ring.scales.index(place)._reinterpret(gl.float32, [codes.SCALES], plain)
    s_x = scales.slice(FIRST, acc.shape[1]).load(columns)
    s_w = factor.to(gl.float32, bitcast=True)
    if ONE:
        return gl.expand_dims(s_w * s_x, 0).broadcast_to(acc.shape)
    else:
        s_w = gl.convert_layout(s_w, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
        return gl.expand_dims(s_w, 1) * gl.expand_dims(s_x, 0)


@gluon.jit
def sum_rounded(tile, codes, ring, G: gl.constexpr):
    """Sum of the segment in weight rows of warpgroup G: ([64, BLOCK_T],) or ([64, BLOCK_T], [64, TAIL_T]),
    fp32."""
    gl.static_assert(tile.PARTS == 1)
    ONE: gl.constexpr = codes.FACTOR_ROWS % HEIGHT == 0 and not tile.SWIGLU
    TAIL_T: gl.constexpr = tile.TAIL_T if tile.TAIL_T > 0 else tile.BLOCK_T
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile.BLOCK_T, 32])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL_T, 32])
    nothing = gl.zeros([HEIGHT, tile.BLOCK_T], gl.float32, layout)
    nothing_behind = gl.zeros([HEIGHT, TAIL_T], gl.float32, tail_layout)
    acc, tail = nothing, nothing_behind
    o_n = tile.first_n + G * HEIGHT if ONE else weight_rows(tile, codes, layout, G)
    FAR: gl.constexpr = ONE or tile.BLOCK_T + tile.TAIL_T <= 128
    now = factor_of(tile, codes, o_n, 0)
    then, later = now, now
    if FAR:
        then, later = factor_of(tile, codes, o_n, 1), factor_of(tile, codes, o_n, 2)
    place, phase = 0, 0
    for i in range(tile.blocks):
        mbarrier.wait(ring.full.index(place), phase)
        b_w = ring.words.index(place * tile.GROUPS + G)
        part = warpgroup_mma(
            b_w, ring.rows.index(place).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if tile.TAIL_T > 0:
            part_tail = warpgroup_mma(
                b_w, ring.tail.index(place).permute((1, 0)), nothing_behind, use_acc=False, is_async=True
            )
        scale = _scales(tile, codes, ring, now, place, acc, 0, ONE)
        factor = now
        if FAR:
            now, then, later = then, later, factor_of(tile, codes, o_n, i + AHEAD)
        else:
            now = factor_of(tile, codes, o_n, i + 1)
        if tile.TAIL_T > 0:  # its scales behind the wait: 192 rows have no registers for all of them
            part, part_tail = warpgroup_mma_wait(0, deps=(part, part_tail))
            scale_tail = _scales(tile, codes, ring, factor, place, tail, tile.BLOCK_T, ONE)
        else:
            part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(ring.free.index(place))  # its products are done and its scales read
        acc = gl.fma(part, scale, acc)
        if tile.TAIL_T > 0:
            tail = gl.fma(part_tail, scale_tail, tail)
        place, phase = next_place(place, phase, tile.STAGES)
    if tile.TAIL_T > 0:
        return acc, tail
    else:
        return (acc,)
