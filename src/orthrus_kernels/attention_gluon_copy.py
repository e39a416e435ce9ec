"""Keys, values and queries of the attention in Gluon (attention_gluon_kernels.py) into shared memory: what a
program has to do, in order, and the warps that copy.

Blocks of 64 keys and their values lie in a **ring** of STAGES places; two barriers a place say when it is
full and when all warpgroups are done with it. A block that lies side by side, a page of the cache or 64 rows
of a chain in flight, is copied by TMA. The others, which hold the end of the context or rows of a tree, are
gathered as in Triton, through pages and slots; zeros past the end of the path.

Copying and multiplying warps walk through the same blocks: `share_of`, `work_at`, `keys_of` and `runs` are
for both."""

from ._gluon import (
    aggregate,
    async_copy,
    barrier,
    constexpr_function,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
)  # fmt: skip
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

BLOCK = gl.constexpr(64)  # keys of a softmax step, and positions of a page
HEIGHT = gl.constexpr(64)  # folded rows of a warpgroup: the height of wgmma
COPIERS = gl.constexpr(4)  # warps that copy: 128 threads gather a row of 16-byte pieces in 8 turns


@aggregate
class Tables:
    """The tables of a pass (pass_tables.py). WHOLE: an item is a tile with all its segments."""

    rows: gl.tensor
    limits: gl.tensor
    tiles: gl.tensor
    slots: gl.tensor
    segments: gl.tensor
    items: gl.tensor
    count: gl.tensor
    groups: gl.tensor  # key heads
    programs: gl.tensor
    GROUP: gl.constexpr  # query heads of a key head
    TILE: gl.constexpr  # rows of a tile
    WARPGROUPS: gl.constexpr
    WHOLE: gl.constexpr

    @constexpr_function
    def __init__(self, rows, limits, tiles, slots, segments, items, count, groups, programs, GROUP,
                 TILE, WARPGROUPS, WHOLE):  # fmt: skip
        self.rows = rows
        self.limits = limits
        self.tiles = tiles
        self.slots = slots
        self.segments = segments
        self.items = items
        self.count = count
        self.groups = groups
        self.programs = programs
        self.GROUP = gl.constexpr(GROUP)
        self.TILE = gl.constexpr(TILE)
        self.WARPGROUPS = gl.constexpr(WARPGROUPS)
        self.WHOLE = gl.constexpr(WHOLE)


@aggregate
class Memory:
    """Queries, keys and values in memory, and where a head, row, page or position of them lies. `tiled`:
    the keys and values in blocks, for TMA."""

    q: gl.tensor
    stride_qt: gl.tensor
    stride_qh: gl.tensor
    k: gl.tensor
    v: gl.tensor
    stride_kt: gl.tensor
    stride_kg: gl.tensor
    k_cache: gl.tensor
    v_cache: gl.tensor
    stride_cp: gl.tensor
    stride_cg: gl.tensor
    stride_cs: gl.tensor
    pages: gl.tensor
    stride_ps: gl.tensor
    tiled_k: tma.tensor_descriptor
    tiled_v: tma.tensor_descriptor
    tiled_k_cache: tma.tensor_descriptor
    tiled_v_cache: tma.tensor_descriptor

    @constexpr_function
    def __init__(self, q, stride_qt, stride_qh, k, v, stride_kt, stride_kg, k_cache, v_cache, stride_cp,
                 stride_cg, stride_cs, pages, stride_ps, tiled_k, tiled_v, tiled_k_cache,
                 tiled_v_cache):  # fmt: skip
        self.q = q
        self.stride_qt = stride_qt
        self.stride_qh = stride_qh
        self.k = k
        self.v = v
        self.stride_kt = stride_kt
        self.stride_kg = stride_kg
        self.k_cache = k_cache
        self.v_cache = v_cache
        self.stride_cp = stride_cp
        self.stride_cg = stride_cg
        self.stride_cs = stride_cs
        self.pages = pages
        self.stride_ps = stride_ps
        self.tiled_k = tiled_k
        self.tiled_v = tiled_v
        self.tiled_k_cache = tiled_k_cache
        self.tiled_v_cache = tiled_v_cache


@aggregate
class Ring:
    """Shared memory: queries of the tile at hand, and STAGES blocks of keys and of values."""

    queries: gl.shared_memory_descriptor  # [WARPGROUPS, 64, D]
    queries_full: gl.shared_memory_descriptor
    queries_free: gl.shared_memory_descriptor
    keys: gl.shared_memory_descriptor  # [STAGES, 64, D]
    values: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    D: gl.constexpr
    STAGES: gl.constexpr

    @constexpr_function
    def __init__(self, queries, queries_full, queries_free, keys, values, full, free, D, STAGES):
        self.queries = queries
        self.queries_full = queries_full
        self.queries_free = queries_free
        self.keys = keys
        self.values = values
        self.full = full
        self.free = free
        self.D = gl.constexpr(D)
        self.STAGES = gl.constexpr(STAGES)


@gluon.jit
def new_ring(WARPGROUPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    queries = gl.allocate_shared_memory(gl.bfloat16, [WARPGROUPS, HEIGHT, D], layout)
    keys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], layout)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], layout)
    queries_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    queries_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(queries_full, count=32 * COPIERS)  # every thread says that its pieces have come
    mbarrier.init(queries_free, count=WARPGROUPS)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=WARPGROUPS)
    fence_async_shared()
    return Ring(queries, queries_full, queries_free, keys, values, full, free, D, STAGES)


@gluon.jit
def next_place(place, phase, STAGES: gl.constexpr):
    place += 1
    if place == STAGES:
        place = 0
        phase ^= 1
    return place, phase


@gluon.jit
def share_of(tables):
    """How many pairs of an item and a key head this program takes, one a round."""
    programs, pairs = tables.programs, gl.load(tables.count) * tables.groups
    rounds, left = pairs // programs, pairs % programs
    turned = gl.where(rounds % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    return rounds + (turned < left).to(gl.int32)


@gluon.jit
def work_at(tables, i):
    """(tile, first segment, segment behind the last, key head) of this program's pair number i. Every other
    round the programs come in turned order: the list begins with the longest items, and a program that has
    the longest of one round has the shortest of the next."""
    programs = tables.programs
    i_pair = i * programs + gl.where(i % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
    i_item, i_g = i_pair // tables.groups, i_pair % tables.groups
    i_tile, i_segment = gl.load(tables.items + 2 * i_item), gl.load(tables.items + 2 * i_item + 1)
    if tables.WHOLE:
        p_t = tables.tiles + TILE_COLUMNS * i_tile
        return i_tile, gl.load(p_t + TILE_BEGIN), gl.load(p_t + TILE_REACH), i_g
    else:
        return i_tile, i_segment, i_segment + 1, i_g


@gluon.jit
def keys_of(tables, i_tile, i_segment):
    """(first, cached, middle, masked, end) of a tile's keys in a segment: blocks begin at first, first + 64,
    ... below end. Those below `cached` lie in the cache whole, and those in [middle, masked) in the chain in
    flight; every row sees both. All others are gathered, and a row sees those below its limit."""
    p_t = tables.tiles + TILE_COLUMNS * i_tile
    first, last = gl.load(tables.segments + i_segment), gl.load(tables.segments + i_segment + 1)
    context, chain = gl.load(p_t + TILE_CONTEXT), gl.load(p_t + TILE_CHAIN)
    cached = gl.maximum(first, gl.minimum(last, context // BLOCK * BLOCK))
    middle = gl.maximum(cached, gl.cdiv(chain, BLOCK) * BLOCK)
    masked = gl.maximum(middle, gl.minimum(last, gl.load(p_t + TILE_LOWEST)) // BLOCK * BLOCK)
    return first, cached, middle, masked, gl.minimum(last, gl.load(p_t + TILE_END))


@gluon.jit
def _copy_queries(tables, memory, ring, i_tile, i_g, layout: gl.constexpr):
    """Rows of the tile, the query heads of a key head folded into them; zeros in a place without a row."""
    o_d = gl.arange(0, ring.D, layout=gl.SliceLayout(0, layout))
    for w in gl.static_range(tables.WARPGROUPS):
        o_m = w * HEIGHT + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, layout))
        i_row = gl.load(tables.rows + i_tile * tables.TILE + o_m // tables.GROUP).to(gl.int64)
        i_h = i_g * tables.GROUP + o_m % tables.GROUP
        p_q = memory.q + (i_row * memory.stride_qt + i_h * memory.stride_qh)[:, None] + o_d[None, :]
        async_copy.async_copy_global_to_shared(ring.queries.index(w), p_q, mask=(i_row >= 0)[:, None])
    async_copy.mbarrier_arrive(ring.queries_full, increment_count=False)


@gluon.jit
def _copy_page(memory, ring, i_page, i_g, place):
    """64 keys and values that lie in a page."""
    full = ring.full.index(place)
    mbarrier.expect(full, 4 * BLOCK * ring.D)
    keys = ring.keys.index(place).reshape([1, 1, BLOCK, ring.D])
    values = ring.values.index(place).reshape([1, 1, BLOCK, ring.D])
    tma.async_copy_global_to_shared(memory.tiled_k_cache, [i_page, i_g, 0, 0], full, keys)
    tma.async_copy_global_to_shared(memory.tiled_v_cache, [i_page, i_g, 0, 0], full, values)


@gluon.jit
def _copy_chain(memory, ring, i_row, i_g, place):
    """Keys and values of 64 rows in flight that follow one another."""
    full = ring.full.index(place)
    mbarrier.expect(full, 4 * BLOCK * ring.D)
    keys = ring.keys.index(place).reshape([BLOCK, 1, ring.D])
    values = ring.values.index(place).reshape([BLOCK, 1, ring.D])
    tma.async_copy_global_to_shared(memory.tiled_k, [i_row, i_g, 0], full, keys)
    tma.async_copy_global_to_shared(memory.tiled_v, [i_row, i_g, 0], full, values)


@gluon.jit
def _gather(memory, ring, pages, slots, position, context, end, i_g, place, layout: gl.constexpr):
    """64 keys and values, each from where it lies. slots: that of position `context`."""
    o_s = position + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    o_d = gl.arange(0, ring.D, layout=gl.SliceLayout(0, layout))[None, :]
    m_c, m_s = o_s < context, o_s < end
    i_page = gl.load(pages + position // BLOCK, mask=position < context, other=0).to(gl.int64)
    i_slot = gl.load(slots + (o_s - context), mask=m_s & (o_s >= context), other=0).to(gl.int64)
    o_c = i_page * memory.stride_cp + i_g * memory.stride_cg + o_s % BLOCK * memory.stride_cs
    o_f = i_slot * memory.stride_kt + i_g * memory.stride_kg
    p_k = gl.where(m_c, memory.k_cache + o_c, memory.k + o_f)[:, None] + o_d
    p_v = gl.where(m_c, memory.v_cache + o_c, memory.v + o_f)[:, None] + o_d
    async_copy.async_copy_global_to_shared(ring.keys.index(place), p_k, mask=m_s[:, None])
    async_copy.async_copy_global_to_shared(ring.values.index(place), p_v, mask=m_s[:, None])
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()  # wgmma reads what plain copies have written
    barrier()  # of the copying warps: each thread's pieces have come
    mbarrier.arrive(ring.full.index(place), count=1)


@gluon.jit
def copy(tables, memory, ring):
    """The copying warps."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [COPIERS, 1], [1, 0])
    place, phase, queries_phase = 0, 1, 1  # all places are free
    for i in range(share_of(tables)):
        i_tile, begin, reach, i_g = work_at(tables, i)
        p_t = tables.tiles + TILE_COLUMNS * i_tile
        context, to_row = (
            gl.load(p_t + TILE_CONTEXT),
            gl.load(p_t + TILE_CHAIN_ROW) - gl.load(p_t + TILE_CHAIN),
        )
        slots = tables.slots + gl.load(p_t + TILE_FIRST_SLOT)
        pages = memory.pages + gl.load(p_t + TILE_SEQUENCE).to(gl.int64) * memory.stride_ps
        i_g64 = i_g.to(gl.int64)
        mbarrier.wait(ring.queries_free, queries_phase)
        _copy_queries(tables, memory, ring, i_tile, i_g64, layout)
        queries_phase ^= 1
        for i_segment in range(begin, reach):
            first, cached, middle, masked, end = keys_of(tables, i_tile, i_segment)
            for position in range(first, end, BLOCK):
                mbarrier.wait(ring.free.index(place), phase)
                if position < cached:
                    _copy_page(memory, ring, gl.load(pages + position // BLOCK), i_g, place)
                elif (position >= middle) & (position < masked):
                    _copy_chain(memory, ring, position + to_row, i_g, place)
                else:
                    _gather(memory, ring, pages, slots, position, context, end, i_g64, place, layout)
                place, phase = next_place(place, phase, ring.STAGES)
