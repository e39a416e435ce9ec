"""Dual-view attention of many rows, the kernel for Hopper in Gluon. `attention_gluon.py` launches it.

**What defines a row's bits**, as in attention_kernels.py, whose kernels this one must equal (what is written
the other way round there is the same to the bit):

1. A block is 64 keys at positions 64 i to 64 i + 63, in the order of the positions, zeros past the end of
   the path. Scores are a product over D in steps of 16, from zero (wgmma m64n64k16), kept raw in fp32.
2. Where a row does not see a position its score is -inf.
3. m' = max(m, block's maximum). keep = exp2((m - m') scale), p = exp2((s - m') scale), with 0 for an m' of
   -inf; scale holds log2 e. Differences first, then the product: nothing that a compiler may fuse.
4. l = fma(l, keep, sum of p). The sum's order follows from the layout of wgmma's result [64, 64] in four
   warps: 16 numbers a thread, in Triton's order of them, then lanes 2 and 1 apart.
5. a = a keep, rounded to fp32, then plus bf16(p) v over the 64 keys in steps of 16 (wgmma m64n128k16).
6. A segment begins with m = -inf, l = 0, a = 0. Segments are folded in order from such a state with explicit
   fused multiply-adds (`_fold` here and `attention_kernels._fold`), and a (1 / l) is rounded once.

Nothing else of a program reaches these numbers: neither which rows share a tile, nor the height of the tile,
nor who copies keys, nor when products run.

**How it is built.** A program takes (item, key head) pairs in turn. Four warps copy (attention_gluon_copy.py)
and run ahead through the ring, into the next pair as well. Two warpgroups multiply, 64 folded rows each, from
the same keys and values. A warpgroup holds its queries, its sums and its probabilities in registers. It asks
for the scores of a block and for the values' products of the block before, and computes the first one's
softmax while the second runs; the other warpgroup's products fill what is left. No segment is empty, so every
one has a first block. A warpgroup without rows lets blocks pass by."""

from ._gluon import barrier, gl, gluon, in_gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .attention_gluon_copy import (
    BLOCK,
    COPIERS,
    HEIGHT,
    Memory,
    Tables,
    copy,
    keys_of,
    new_ring,
    next_place,
    share_of,
    work_at,
)
from .pdl import launch_dependents as _launch_dependents
from .pdl import wait as _wait
from .visibility import row_sees_triton

WARPGROUPS = gl.constexpr(2)  # that multiply
# Registers a thread: 168 at the launch, times 12 warps, are shared out between 4, 4 and the copying warps.
REGISTERS = gl.constexpr([208, 88])

wait, launch_dependents = in_gluon(_wait), in_gluon(_launch_dependents)
row_sees = in_gluon(row_sees_triton)


@gluon.jit
def _finite(b_max):
    """0 in place of the maximum of nothing."""
    return gl.where(b_max == float("-inf"), 0.0, b_max)


@gluon.jit
def _keep(b_max, b_next, scale):
    """Maximum of two states, and the factor that the first one's sum and accumulator take."""
    b_top = gl.maximum(b_max, b_next)
    return b_top, gl.exp2((b_max - _finite(b_top)) * scale)


@gluon.jit
def _ask_scores(ring, b_q, place, layout: gl.constexpr):
    """Raw scores of a block, under way."""
    zeros = gl.zeros([HEIGHT, BLOCK], gl.float32, layout)
    keys = ring.keys.index(place).permute((1, 0))
    return warpgroup_mma(b_q, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _hide(b_s, b_limit, position, cached, middle, masked, layout: gl.constexpr):
    """-inf where a row does not see a key, in a block that was gathered (`keys_of`)."""
    if (position >= cached) & ((position < middle) | (position >= masked)):
        o_s = position + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
        b_s = gl.where(row_sees(o_s[None, :], b_limit[:, None]), b_s, float("-inf"))
    return b_s


@gluon.jit
def _weigh(b_s, b_max, b_sum, scale, layout: gl.constexpr):
    """(maximum, factor of the sums so far, sum, probabilities in bf16) behind one more block of scores."""
    b_top, b_keep = _keep(b_max, gl.max(b_s, 1), scale)
    b_p = gl.exp2((b_s - _finite(b_top)[:, None]) * scale)
    b_sum = gl.fma(b_sum, b_keep, gl.sum(b_p, 1))
    return b_top, b_keep, b_sum, gl.convert_layout(b_p.to(gl.bfloat16), layout)


@gluon.jit
def _segment(ring, b_q, b_limit, keys, scale, place, phase, s_layout: gl.constexpr, a_layout: gl.constexpr):
    """(maximum [64], sum [64], accumulator [64, D], place and phase behind it) of a segment's keys, those of
    `keys_of`. a_layout: of accumulators."""
    first, cached, middle, masked, end = keys
    p_layout: gl.constexpr = gl.DotOperandLayout(0, a_layout, 2)
    b_acc = gl.zeros([HEIGHT, ring.D], gl.float32, a_layout)
    b_max = gl.full([HEIGHT], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    b_sum = gl.zeros([HEIGHT], gl.float32, gl.SliceLayout(1, s_layout))
    mbarrier.wait(ring.full.index(place), phase)
    b_s = warpgroup_mma_wait(0, deps=(_ask_scores(ring, b_q, place, s_layout),))
    b_s = _hide(b_s, b_limit, first, cached, middle, masked, s_layout)
    b_max, b_keep, b_sum, b_p = _weigh(b_s, b_max, b_sum, scale, p_layout)
    before = place
    place, phase = next_place(place, phase, ring.STAGES)
    mbarrier.wait(ring.full.index(place), phase, pred=first + BLOCK < end)
    for position in range(first + BLOCK, end, BLOCK):
        b_s = _ask_scores(ring, b_q, place, s_layout)
        b_acc = warpgroup_mma(b_p, ring.values.index(before), b_acc, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_s = _hide(b_s, b_limit, position, cached, middle, masked, s_layout)
        b_max, b_keep, b_sum, b_next = _weigh(b_s, b_max, b_sum, scale, p_layout)
        behind, behind_phase = next_place(place, phase, ring.STAGES)
        # This wait stands between the softmax and the end of the products because it is a loop: without one
        # ptxas moves the softmax behind the products that should run beside it.
        mbarrier.wait(ring.full.index(behind), behind_phase, pred=position + BLOCK < end)
        b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
        mbarrier.arrive(ring.free.index(before), count=1)
        b_acc = b_acc * gl.convert_layout(b_keep, gl.SliceLayout(1, a_layout))[:, None]
        b_p = b_next
        before, place, phase = place, behind, behind_phase
    b_acc = warpgroup_mma(b_p, ring.values.index(before), b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=(b_acc,))
    mbarrier.arrive(ring.free.index(before), count=1)
    return b_max, b_sum, b_acc, place, phase


@gluon.jit
def _leave(acc, stats, b_max, b_sum, b_acc, o_part, m_m, D: gl.constexpr, a_layout: gl.constexpr):
    """A segment's partial, to memory, for the combine."""
    gl.store(stats + o_part * 2, b_max, mask=m_m)
    gl.store(stats + o_part * 2 + 1, b_sum, mask=m_m)
    o_a = gl.convert_layout(o_part, gl.SliceLayout(1, a_layout))
    m_a = gl.convert_layout(m_m, gl.SliceLayout(1, a_layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, a_layout))
    gl.store(acc + o_a[:, None] * D + o_d[None, :], b_acc, mask=m_a[:, None])


@gluon.jit
def _fold(folded, b_max, b_sum, b_m, b_l, b_a, scale, a_layout: gl.constexpr):
    """Add the next segment to what has been folded; (maximum, sum). folded: accumulators in shared memory, as
    both do not fit in registers."""
    b_top, b_keep = _keep(b_max, b_m, scale)
    b_add = gl.exp2((b_m - _finite(b_top)) * scale)
    b_sum = gl.fma(b_l, b_add, b_sum * b_keep)
    a_keep = gl.convert_layout(b_keep, gl.SliceLayout(1, a_layout))[:, None]
    a_add = gl.convert_layout(b_add, gl.SliceLayout(1, a_layout))[:, None]
    folded.store(gl.fma(b_a, a_add, folded.load(a_layout) * a_keep))
    return b_top, b_sum


@gluon.jit
def _put_out(folded, out, b_sum, o_row, m_m, D: gl.constexpr, a_layout: gl.constexpr):
    """Divide by the sums. o_row: where each row's output begins."""
    b_scale = gl.div_rn(1.0, gl.where(m_m, b_sum, 1.0))  # an unused place has seen nothing
    a_scale = gl.convert_layout(b_scale, gl.SliceLayout(1, a_layout))
    o_a = gl.convert_layout(o_row, gl.SliceLayout(1, a_layout))
    m_a = gl.convert_layout(m_m, gl.SliceLayout(1, a_layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, a_layout))
    b_out = (folded.load(a_layout) * a_scale[:, None]).to(gl.bfloat16)
    gl.store(out + o_a[:, None] + o_d[None, :], b_out, mask=m_a[:, None])


@gluon.jit
def _attend(tables, ring, folded, b_q, item, W: gl.constexpr, results, scale, place, phase,
            s_layout: gl.constexpr, a_layout: gl.constexpr):  # fmt: skip
    """All segments of an item, from queries b_q of its tile; (place, phase) behind them. results: as in
    `_multiply`."""
    i_tile, begin, reach, i_g = item
    acc, stats, out, stride_ot, stride_oh, T = results
    o_m = W * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, s_layout))
    i_row = gl.load(tables.rows + i_tile * tables.TILE + o_m // tables.GROUP).to(gl.int64)
    b_limit = gl.load(tables.limits + i_tile * tables.TILE + o_m // tables.GROUP)
    m_m, i_h = i_row >= 0, i_g * tables.GROUP + o_m % tables.GROUP
    b_max = gl.full([HEIGHT], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    b_sum = gl.zeros([HEIGHT], gl.float32, gl.SliceLayout(1, s_layout))
    if tables.WHOLE:
        folded.store(gl.zeros([HEIGHT, ring.D], gl.float32, a_layout))
    for i_segment in range(begin, reach):
        keys = keys_of(tables, i_tile, i_segment)
        b_m, b_l, b_a, place, phase = _segment(
            ring, b_q, b_limit, keys, scale, place, phase, s_layout, a_layout
        )
        if tables.WHOLE:
            b_max, b_sum = _fold(folded, b_max, b_sum, b_m, b_l, b_a, scale, a_layout)
        else:
            o_part = (i_segment * T + i_row) * (tables.groups * tables.GROUP) + i_h
            _leave(acc, stats, b_m, b_l, b_a, o_part, m_m, ring.D, a_layout)
    if tables.WHOLE:
        o_row = i_row * stride_ot + i_h * stride_oh
        _put_out(folded, out, b_sum, o_row, m_m, ring.D, a_layout)
    return place, phase


@gluon.jit
def _pass_by(tables, ring, item, place, phase):
    """Let the blocks of an item go; (place, phase) behind them."""
    i_tile, begin, reach, _ = item
    for i_segment in range(begin, reach):
        first, _, _, _, end = keys_of(tables, i_tile, i_segment)
        for _ in range(first, end, BLOCK):
            mbarrier.wait(ring.full.index(place), phase)
            mbarrier.arrive(ring.free.index(place), count=1)
            place, phase = next_place(place, phase, ring.STAGES)
    return place, phase


@gluon.jit
def _multiply(tables, ring, folds, results, scale, W: gl.constexpr):
    """Multiplying warpgroup W: folded rows 64 W to 64 W + 63 of each tile. results: (accumulators, maxima and
    sums of partials, output, its strides of a row and a head, rows of the pass)."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    a_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ring.D, 16])
    place, phase, queries_phase = 0, 0, 0
    for i in range(share_of(tables)):
        item = work_at(tables, i)
        p_rows = tables.rows + item[0] * tables.TILE
        has_rows = gl.load(p_rows + W * HEIGHT // tables.GROUP) >= 0  # rows lie in a tile's first places
        mbarrier.wait(ring.queries_full, queries_phase)
        b_q = ring.queries.index(W).load(gl.DotOperandLayout(0, s_layout, 2))
        barrier()  # of this warpgroup: every thread has its queries
        mbarrier.arrive(ring.queries_free, count=1)
        queries_phase ^= 1
        if has_rows:
            place, phase = _attend(
                tables, ring, folds.index(W), b_q, item, W, results, scale, place, phase, s_layout, a_layout
            )
        else:
            place, phase = _pass_by(tables, ring, item, place, phase)


# A number that may be 1 would become a constant, which `Tables` and `Memory` do not hold.
@gluon.jit(do_not_specialize=["T", "G", "programs", "stride_ps"])
def _attention_gluon_kernel(
    q, stride_qt, stride_qh, k, v, stride_kt, stride_kg,
    k_cache, v_cache, stride_cp, stride_cg, stride_cs, pages, stride_ps,
    tiled_k, tiled_v, tiled_k_cache, tiled_v_cache,
    rows, limits, tiles, slots, segments, items, count,
    acc, stats, out, stride_ot, stride_oh, T, G, programs, scale,
    D: gl.constexpr, GROUP: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """(item, key head) pairs of the work list, one a round of all programs: acc and stats as in
    `attention_kernels._partial_kernel`, or with WHOLE the output. TILE * GROUP is 128."""
    if PDL:
        wait()  # first of all: the tables themselves may be new. All other warps start behind these
        launch_dependents()
    ring = new_ring(WARPGROUPS, D, STAGES)
    if WHOLE:  # 8 rows of a warp lie in different banks
        layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        folds = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, HEIGHT, D], layout)
    else:
        folds = ring.queries  # not used
    tables = Tables(
        rows, limits, tiles, slots, segments, items, count, G, programs, GROUP, TILE, WARPGROUPS, WHOLE
    )
    memory = Memory(
        q, stride_qt, stride_qh, k, v, stride_kt, stride_kg, k_cache, v_cache, stride_cp, stride_cg,
        stride_cs, pages, stride_ps, tiled_k, tiled_v, tiled_k_cache, tiled_v_cache,
    )  # fmt: skip
    results = acc, stats, out, stride_ot, stride_oh, T
    gl.warp_specialize([
        (_multiply, (tables, ring, folds, results, scale, 0)),
        (_multiply, (tables, ring, folds, results, scale, 1)),
        (copy, (tables, memory, ring)),
    ], [4, COPIERS], REGISTERS)  # fmt: skip
