"""Words of a quantised weight and rows of x through a ring in shared memory, to sums in registers: the first
half of the linear in Gluon for codes (linear_gluon_codes.py), for Hopper.

As gluon_ring.py, with a group of 128 columns in the place of a block of 64. A warpgroup reads words from the
ring, widens them in its registers into the operand of wgmma (`widened`, as in Triton), and multiplies from
there. While the products of a group run it widens the next one, but not in a tile of three parts. A group's
sum begins at zero and is folded by `fma`, as in `sum_by_groups`. So words are widened once for all rows of a
tile.

Factors are loaded by the threads that need them, AHEAD groups before that or, of three parts, one: two rows a
thread, 256 bytes a group. They are weights, which no kernel of a pass writes.

Where rows are codes too (SCALES > 0), the ring has bytes of both and the scales of the rows;
gluon_rounded.py multiplies them."""

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
from .gluon_ring import HEIGHT, PAIRS, next_place, wait
from .quantised import LOWEST
from .quantised_triton import widened as _widened

GROUP = gl.constexpr(128)
AHEAD = gl.constexpr(3)
_LOWEST = gl.constexpr(LOWEST)

widened = in_gluon(_widened)


@aggregate
class Codes:
    """The weight: factors [K / GROUP, ceil(N / FACTOR_ROWS)]; what its words are."""

    factors: gl.tensor
    N: gl.tensor
    FORMAT: gl.constexpr
    ZEROS: gl.constexpr
    FACTOR_ROWS: gl.constexpr
    WORDS: gl.constexpr  # of a row and group; where rows are codes, bytes
    SCALES: gl.constexpr  # of rows that are codes, in a place of the ring; else 0

    @constexpr_function
    def __init__(self, factors, N, FORMAT, ZEROS, FACTOR_ROWS, WORDS, SCALES):
        self.factors = factors
        self.N = N
        self.FORMAT = gl.constexpr(FORMAT)
        self.ZEROS = gl.constexpr(ZEROS)
        self.FACTOR_ROWS = gl.constexpr(FACTOR_ROWS)
        self.WORDS = gl.constexpr(WORDS)
        self.SCALES = gl.constexpr(SCALES)


@aggregate
class CodesRing:
    """Tiles in shared memory, STAGES places of each, and the barriers of the places."""

    words: gl.shared_memory_descriptor  # int32 or e4m3 [STAGES * GROUPS, 64, WORDS]
    rows: gl.shared_memory_descriptor  # bf16 or e4m3 [STAGES * PARTS, BLOCK_T, GROUP]
    tail: gl.shared_memory_descriptor  # [STAGES, TAIL_T, GROUP]; `rows` where there is none
    scales: gl.shared_memory_descriptor  # fp32 [STAGES, 1, SCALES]; `rows` where there are none
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @constexpr_function
    def __init__(self, words, rows, tail, scales, full, free):
        self.words = words
        self.rows = rows
        self.tail = tail
        self.scales = scales
        self.full = full
        self.free = free


@gluon.jit
def new_codes_ring(tile, codes):
    ROUNDS: gl.constexpr = codes.SCALES > 0
    word: gl.constexpr = gl.float8e4nv if ROUNDS else gl.int32
    row: gl.constexpr = gl.float8e4nv if ROUNDS else gl.bfloat16
    word_layout: gl.constexpr = gl.NVMMASharedLayout(*((128, 8) if ROUNDS else (4 * codes.WORDS, 32)), rank=2)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 8 if ROUNDS else 16, rank=2)
    places: gl.constexpr = [tile.STAGES * tile.GROUPS, HEIGHT, codes.WORDS]
    words = gl.allocate_shared_memory(word, places, word_layout)
    rows = gl.allocate_shared_memory(row, [tile.STAGES * tile.PARTS, tile.BLOCK_T, GROUP], layout)
    if tile.TAIL_T > 0:
        tail = gl.allocate_shared_memory(row, [tile.STAGES, tile.TAIL_T, GROUP], layout)
    else:
        tail = rows
    if ROUNDS:
        plain: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
        scales = gl.allocate_shared_memory(gl.float32, [tile.STAGES, 1, codes.SCALES], plain)
    else:
        scales = rows
    full = gl.allocate_shared_memory(gl.int64, [tile.STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [tile.STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(tile.STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=tile.GROUPS)
    fence_async_shared()
    return CodesRing(words, rows, tail, scales, full, free)


@gluon.jit
def _copy_words(tile, codes, ring, w, i, place):
    """Group i of the segment. The place is full when the rows of x have come too."""
    ROWS: gl.constexpr = tile.PARTS * tile.BLOCK_T + tile.TAIL_T
    BYTES: gl.constexpr = tile.GROUPS * HEIGHT * codes.WORDS * 4 + ROWS * GROUP * 2
    BYTES_ROUNDED: gl.constexpr = (tile.GROUPS * HEIGHT + ROWS) * GROUP + codes.SCALES * 4
    full = ring.full.index(place)
    mbarrier.expect(full, BYTES_ROUNDED if codes.SCALES > 0 else BYTES)
    first_word = (tile.first + i) * codes.WORDS
    for g in gl.static_range(tile.GROUPS):
        to = ring.words.index(place * tile.GROUPS + g)
        if tile.SWIGLU:
            first_pair = tile.first_n // (2 * PAIRS) + g * (HEIGHT // (2 * PAIRS))
            pairs = to.reshape([HEIGHT // (2 * PAIRS), 2, PAIRS, codes.WORDS])
            tma.async_copy_global_to_shared(w, [first_pair, 0, 0, first_word], full, pairs)
        else:
            tma.async_copy_global_to_shared(w, [tile.first_n + g * HEIGHT, first_word], full, to)


@gluon.jit
def _copy_rows(tile, codes, ring, x, x_tail, x_scale, first_scale, i, place):
    """What memory holds behind the last row is copied too: columns of the sums that nobody stores."""
    full, first_k = ring.full.index(place), (tile.first + i) * GROUP
    for p in gl.static_range(tile.PARTS):
        first_row, to = tile.first_row + p * tile.BLOCK_T, ring.rows.index(place * tile.PARTS + p)
        tma.async_copy_global_to_shared(x, [first_row, first_k], full, to)
    if tile.TAIL_T > 0:
        behind = tile.first_row + tile.PARTS * tile.BLOCK_T
        tma.async_copy_global_to_shared(x_tail, [behind, first_k], full, ring.tail.index(place))
    if codes.SCALES > 0:
        of = [tile.first + i, first_scale + tile.first_row]
        tma.async_copy_global_to_shared(x_scale, of, full, ring.scales.index(place))


@gluon.jit
def copy_codes(tile, codes, ring, w, x, x_tail, x_scale, first_scale, PDL: gl.constexpr):
    """The copying warp."""
    ahead = gl.minimum(tile.blocks, tile.STAGES)
    for i in range(ahead):
        _copy_words(tile, codes, ring, w, i, i)
    if PDL:
        wait()  # x, y, partials and counters may be in use until here
    for i in range(ahead):
        _copy_rows(tile, codes, ring, x, x_tail, x_scale, first_scale, i, i)
    place, phase = 0, 0
    for i in range(ahead, tile.blocks):
        mbarrier.wait(ring.free.index(place), phase)
        _copy_words(tile, codes, ring, w, i, place)
        _copy_rows(tile, codes, ring, x, x_tail, x_scale, first_scale, i, place)
        place, phase = next_place(place, phase, tile.STAGES)


@gluon.jit
def factor_of(tile, codes, o_n, i):
    """Factors of group i of the segment, of the last group where there are fewer. Rows behind N have 0."""
    group = tile.first + gl.minimum(i, tile.blocks - 1)
    p = codes.factors + group.to(gl.int64) * gl.cdiv(codes.N, codes.FACTOR_ROWS) + o_n // codes.FACTOR_ROWS
    return gl.load(p, mask=o_n < codes.N, other=0)


@gluon.jit
def _operand(tile, codes, ring, factor, place, G: gl.constexpr):
    """A group's codes in registers, as wgmma takes them: bf16 [64, GROUP]."""
    WIDE: gl.constexpr = codes.WORDS == 32
    COLUMNS: gl.constexpr = [[8, 0], [0, 4], [0, 8], [0, 16]] if WIDE else [[8, 0], [0, 4], [0, 8]]
    layout: gl.constexpr = gl.DistributedLinearLayout(
        COLUMNS, [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [HEIGHT, codes.WORDS]
    )
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile.BLOCK_T, 16])
    words = ring.words.index(place * tile.GROUPS + G).load(layout)
    zero = None
    if codes.ZEROS:
        zero = gl.convert_layout(factor & _LOWEST, gl.SliceLayout(1, layout), assert_trivial=True)
    b_w = widened(words, zero, codes.FORMAT, True, HEIGHT, GROUP)
    return gl.convert_layout(b_w, gl.DotOperandLayout(0, acc_layout, 2), assert_trivial=True)


@gluon.jit
def _scale(codes, factor, acc):
    """A scale for each number of a sum."""
    bits = factor & ~_LOWEST if codes.ZEROS else factor
    scale = gl.convert_layout(bits, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return gl.expand_dims(scale.to(gl.float32, bitcast=True), 1).broadcast_to(acc.shape)


@gluon.jit
def weight_rows(tile, codes, layout: gl.constexpr, G: gl.constexpr):
    """Rows of the weight that warpgroup G multiplies, as its sums have them."""
    o_n = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
    if tile.SWIGLU:  # as the words are copied; out.N is F, codes.N both
        pair = tile.first_n // 2 + G * (HEIGHT // 2) + o_n // (2 * PAIRS) * PAIRS + o_n % PAIRS
        o_n = pair + o_n // PAIRS % 2 * (codes.N // 2)
    else:
        o_n += tile.first_n + G * HEIGHT
    return o_n


@gluon.jit
def sum_groups(tile, codes, ring, G: gl.constexpr):
    """Sum of the segment in weight rows of warpgroup G: [64, BLOCK_T] for each part of the rows and, if there
    is one, [64, TAIL_T], fp32."""
    if tile.PARTS == 1:
        return _sum_at_once(tile, codes, ring, G)
    else:
        return _sum_in_parts(tile, codes, ring, G)


@gluon.jit
def _products(b_w, ring, place, nothing):
    """Of a group and a part of the rows, under way."""
    return warpgroup_mma(b_w, ring.rows.index(place).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _sum_in_parts(tile, codes, ring, G: gl.constexpr):
    """Three parts of the rows, with sums and products of each in registers: so there is no room for the next
    group's operand beside them. While a warpgroup folds and widens, the tensor cores have the products of the
    other one."""
    gl.static_assert(tile.PARTS == 3 and tile.TAIL_T == 0)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile.BLOCK_T, 16])
    nothing = gl.zeros([HEIGHT, tile.BLOCK_T], gl.float32, layout)
    acc, acc_1, acc_2 = nothing, nothing, nothing
    o_n = weight_rows(tile, codes, layout, G)
    now = factor_of(tile, codes, o_n, 0)
    place, phase = 0, 0
    mbarrier.wait(ring.full.index(0), 0)  # no segment is empty
    for i in range(tile.blocks):
        b_w = _operand(tile, codes, ring, now, place, G)
        first = place * tile.PARTS
        part = _products(b_w, ring, first, nothing)
        part_1 = _products(b_w, ring, first + 1, nothing)
        part_2 = _products(b_w, ring, first + 2, nothing)
        factor, now = now, factor_of(tile, codes, o_n, i + 1)
        part, part_1, part_2, b_w = warpgroup_mma_wait(0, deps=(part, part_1, part_2, b_w))
        mbarrier.arrive(ring.free.index(place))  # its products are done
        acc = gl.fma(part, _scale(codes, factor, part), acc)
        acc_1 = gl.fma(part_1, _scale(codes, factor, part_1), acc_1)
        acc_2 = gl.fma(part_2, _scale(codes, factor, part_2), acc_2)
        place, phase = next_place(place, phase, tile.STAGES)
        if i + 1 < tile.blocks:
            mbarrier.wait(ring.full.index(place), phase)
    return acc, acc_1, acc_2


@gluon.jit
def _sum_at_once(tile, codes, ring, G: gl.constexpr):
    """One part of the rows and the tail. While their products run the next group is widened."""
    TAIL_T: gl.constexpr = tile.TAIL_T if tile.TAIL_T > 0 else tile.BLOCK_T
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile.BLOCK_T, 16])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL_T, 16])
    nothing = gl.zeros([HEIGHT, tile.BLOCK_T], gl.float32, layout)
    nothing_behind = gl.zeros([HEIGHT, TAIL_T], gl.float32, tail_layout)
    acc, tail = nothing, nothing_behind
    o_n = weight_rows(tile, codes, layout, G)
    now, then, later = (
        factor_of(tile, codes, o_n, 0),
        factor_of(tile, codes, o_n, 1),
        factor_of(tile, codes, o_n, 2),
    )
    mbarrier.wait(ring.full.index(0), 0)
    b_w = _operand(tile, codes, ring, now, 0, G)
    place, phase, before = 1, 0, 0  # of the group behind group i, and the place of group i
    if tile.blocks > 1:
        mbarrier.wait(ring.full.index(1), 0)
    for i in range(tile.blocks):
        part = warpgroup_mma(
            b_w, ring.rows.index(before).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if tile.TAIL_T > 0:
            part_tail = warpgroup_mma(
                b_w, ring.tail.index(before).permute((1, 0)), nothing_behind, use_acc=False, is_async=True
            )
        factor, now, then = now, then, later
        later = factor_of(tile, codes, o_n, i + AHEAD)
        following = _operand(tile, codes, ring, now, place, G)  # behind the last group: of words left there
        free, before = before, place
        place, phase = next_place(place, phase, tile.STAGES)
        if i + 2 < tile.blocks:  # a loop, across which ptxas does not move what was widened
            mbarrier.wait(ring.full.index(place), phase)
        if tile.TAIL_T > 0:
            part, part_tail, b_w, following = warpgroup_mma_wait(0, deps=(part, part_tail, b_w, following))
            tail = gl.fma(part_tail, _scale(codes, factor, part_tail), tail)
        else:
            part, b_w, following = warpgroup_mma_wait(0, deps=(part, b_w, following))
        mbarrier.arrive(ring.free.index(free))  # its products are done
        acc = gl.fma(part, _scale(codes, factor, part), acc)
        b_w = following
    if tile.TAIL_T > 0:
        return acc, tail
    else:
        return (acc,)
