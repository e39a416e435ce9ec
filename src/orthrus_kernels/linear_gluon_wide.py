"""The linear layer for Hopper in Gluon with any number of rows of one view, or SwiGLU of it: prompts, and
passes of many texts.

It is `linear_triton` or `linear_swiglu_triton` to the bit, as linear_gluon.py is, from whose parts it is
made. There the rows of a view are one tile; here they are cut into row tiles, and a program runs all segments
of a tile one after another: each is summed from zero, and the sums are added in index order. So no program
waits for another one.

**A program** takes tiles in turn, one a round of all programs, of which a GPU has one a multiprocessor: while
warpgroups store the sums of a tile, the copying warp fills the ring with the next one's. Row tiles of the
same weight rows are neighbours in the order of tiles, GROUP_T of them at most: weights are read from memory
once for them, rows of x come from L2.

**Tiles** are a list in gluon.json for each weight; `WidePlan.of` takes the one whose rounds take the fewest
clocks. Tiles change no bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tables
from ._gluon import aggregate, constexpr_function, gl, gluon, mbarrier
from .gluon_ring import BLOCK_K, HEIGHT, Tile, begin, go_on, layout_of, new_ring, sum_blocks
from .gluon_sums import Out, put
from .linear import GROUP_T
from .linear_gluon import Plan, launch_dependents, multiprocessors, row_tiles, takes, weight_tiles
from .pdl import launch_options
from .rows import NO_CONTRACTION
from .tables.gluon import MOST_GROUPS, MOST_ROWS, gluon_entries
from .weight import Weight
from .workspace import Workspace

# Clocks of a tile besides its products: its sums are stored while nothing multiplies. A guess, by which 8B's
# linears take the fastest of their tiles or one within 3 % of it (bench.tune_wide, H200, bench/LOG.md, 148).
OF_A_TILE = 1500


@aggregate
class Walk:
    """The tiles of a launch: rows T of x, N weight rows, blocks of K; row tiles that are neighbours."""

    T: gl.tensor
    N: gl.tensor
    blocks: gl.tensor
    GROUP_T: gl.constexpr
    GROUPS: gl.constexpr
    BLOCK_T: gl.constexpr
    TAIL_T: gl.constexpr
    STAGES: gl.constexpr
    SEGMENTS: gl.constexpr
    SWIGLU: gl.constexpr

    @constexpr_function
    def __init__(self, T, N, blocks, GROUP_T, GROUPS, BLOCK_T, TAIL_T, STAGES, SEGMENTS, SWIGLU):
        self.T = T
        self.N = N
        self.blocks = blocks
        self.GROUP_T = gl.constexpr(GROUP_T)
        self.GROUPS = gl.constexpr(GROUPS)
        self.BLOCK_T = gl.constexpr(BLOCK_T)
        self.TAIL_T = gl.constexpr(TAIL_T)
        self.STAGES = gl.constexpr(STAGES)
        self.SEGMENTS = gl.constexpr(SEGMENTS)
        self.SWIGLU = gl.constexpr(SWIGLU)


@gluon.jit
def _tiles(walk):
    """How many tiles a launch has."""
    return gl.cdiv(walk.N, walk.GROUPS * HEIGHT) * gl.cdiv(walk.T, walk.BLOCK_T + walk.TAIL_T)


@gluon.jit
def _tile_at(walk, number):
    """Tile number `number`, with all blocks of K."""
    TILE_T: gl.constexpr = walk.BLOCK_T + walk.TAIL_T
    tiles_n, tiles_t = gl.cdiv(walk.N, walk.GROUPS * HEIGHT), gl.cdiv(walk.T, TILE_T)
    first_t = number // (walk.GROUP_T * tiles_n) * walk.GROUP_T
    group = gl.minimum(tiles_t - first_t, walk.GROUP_T)
    inside = number - first_t * tiles_n
    first_row, first_n = (first_t + inside % group) * TILE_T, inside // group * (walk.GROUPS * HEIGHT)
    zero = gl.to_tensor(0)
    return Tile(first_n, first_row, walk.T, zero, walk.blocks, zero, number, walk.GROUPS, 1, walk.BLOCK_T,
                walk.TAIL_T, walk.STAGES, walk.SEGMENTS, walk.SWIGLU)  # fmt: skip


@gluon.jit
def _copy(walk, ring, w, x, x_tail, PDL: gl.constexpr):
    """The copying warp."""
    number = gl.program_id(0)
    tile = _tile_at(walk, number)
    ahead, place, phase = begin(tile, ring, w, x, x_tail, PDL)
    place, phase = go_on(tile, ring, w, x, x_tail, ahead, place, phase)
    for behind in range(number + gl.num_programs(0), _tiles(walk), gl.num_programs(0)):
        place, phase = go_on(_tile_at(walk, behind), ring, w, x, x_tail, 0, place, phase)


@gluon.jit
def _multiply(walk, ring, out, G: gl.constexpr):
    """Multiplying warpgroup G."""
    TAIL_T: gl.constexpr = walk.TAIL_T if walk.TAIL_T > 0 else walk.BLOCK_T
    place, phase = 0, 0
    mbarrier.wait(ring.full.index(place), phase)  # nothing is stored before rows are there (gluon_ring.py)
    for number in range(gl.program_id(0), _tiles(walk), gl.num_programs(0)):
        tile = _tile_at(walk, number)
        if walk.SEGMENTS == 1:
            total, tail, place, phase = sum_blocks(tile, ring, tile.blocks, place, phase, G)
        else:
            total = gl.zeros([HEIGHT, walk.BLOCK_T], gl.float32, layout_of(walk.BLOCK_T))
            tail = gl.zeros([HEIGHT, TAIL_T], gl.float32, layout_of(TAIL_T))
            each = gl.cdiv(tile.blocks, walk.SEGMENTS)
            for first in range(0, tile.blocks, each):  # not unrolled: copies of the loop would spill
                blocks = gl.minimum(each, tile.blocks - first)
                acc, acc_tail, place, phase = sum_blocks(tile, ring, blocks, place, phase, G)
                total += acc
                if walk.TAIL_T > 0:
                    tail += acc_tail
        put(tile, out, (total, tail), tile.first_n + G * HEIGHT)


@gluon.jit
def _run(walk, out, w, x, x_tail, PDL: gl.constexpr):
    """All warps of a program; lists as in linear_gluon.py."""
    ring = new_ring(_tile_at(walk, gl.program_id(0)))
    if PDL:
        launch_dependents()
    if walk.GROUPS == 1:
        gl.warp_specialize(
            [(_multiply, (walk, ring, out, 0)), (_copy, (walk, ring, w, x, x_tail, PDL))], [1], [40]
        )
    elif walk.GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (walk, ring, out, 0)), (_multiply, (walk, ring, out, 1)),
            (_copy, (walk, ring, w, x, x_tail, PDL))], [4, 1], [232, 40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (walk, ring, out, 0)), (_multiply, (walk, ring, out, 1)),
            (_multiply, (walk, ring, out, 2)), (_copy, (walk, ring, w, x, x_tail, PDL))],
            [4, 4, 1], [160, 160, 32])  # fmt: skip


def _launch_metadata(grid, kernel, args):
    """Name, flops and bytes for Triton's profiler."""
    t, n, k, x = args["T"], args["N"], args["K"], args["x"].base
    width = n // 2 if args["SWIGLU"] else n
    return {
        "name": f"linear_gluon_wide_{t}x{n}x{k}",
        "flops": 2 * t * n * k,
        "bytes": args["w"].base.nbytes + x.element_size() * t * (k + width),
    }


@gluon.jit(do_not_specialize=["T"], launch_metadata=_launch_metadata)
def _linear_gluon_wide_kernel(
    w, x, x_tail, y, sy_t,
    T, N, K,
    SEGMENTS: gl.constexpr, SWIGLU: gl.constexpr, PDL: gl.constexpr, GROUP_T: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_T: gl.constexpr, TAIL_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (number of its first tile). w, x, x_tail: descriptors, x_tail None where a tile has no tail."""
    out = Out(y, sy_t, N // 2 if SWIGLU else N, y, y, y)  # sums of segments meet in registers
    walk = Walk(T, gl.to_tensor(N), gl.cdiv(K, BLOCK_K), GROUP_T, GROUPS, BLOCK_T, TAIL_T, STAGES, SEGMENTS,
                SWIGLU)  # fmt: skip
    _run(walk, out, w, x, x_tail, PDL)


@dataclass(frozen=True)
class WidePlan(Plan):
    """Launches for a weight [n, k] with any number of rows of one view."""

    @property
    def runs(self) -> bool:
        """And whether the sums have registers: with several segments a warpgroup has two."""
        most = MOST_ROWS if self.segments == 1 else 128 if self.tile.groups == MOST_GROUPS else 192
        return super().runs and self.tile.rows <= most

    def fits(self, multiprocessors: int, space: Workspace) -> bool:
        """On any GPU: no program waits for another one."""
        return True

    @property
    def parts(self) -> tuple[int, int]:
        """Rows of a tile as the kernel has them; 256 are one part, whose products read x once."""
        return (self.tile.rows, 0) if self.tile.rows == MOST_ROWS else self.tile.parts

    def count(self, rows: int) -> int:
        """Tiles of a launch."""
        return -(-self.n // (64 * self.tile.groups)) * -(-rows // self.tile.rows)

    def clocks(self, rows: int, multiprocessors: int) -> int:
        """Of a launch, about: rounds of all programs, in which the tensor cores take two for each row of x
        and block of K in 64 weight rows, and what a tile takes besides."""
        blocks = -(-self.k // self.block_k)
        return -(-self.count(rows) // multiprocessors) * (
            2 * self.tile.rows * self.tile.groups * blocks + OF_A_TILE
        )

    @property
    def compared(self) -> tuple[int, int]:
        """(rows, programs) that take little memory and show a full row tile, one that is not, and two tiles a
        program."""
        rows = self.tile.rows + self.tile.rows // 2 + 1
        return rows, self.count(rows) // 2


def wide_plan_of(
    n: int, k: int, dtype: torch.dtype, device: str, rows: int, swiglu: bool, multiprocessors: int
) -> WidePlan | None:
    """The launch of a weight by the tables for so many rows of one view, on a GPU of so many multiprocessors;
    None where `plan_of` has one or Triton's kernels run. device: a key of the tables."""
    entry, of = gluon_entries().get((n, k, dtype, device)), tables.linear_entry(n, k, dtype, device)
    if entry is None or of.block_k != 64 or (swiglu and (n % 16 or of.segments > 1)):
        return None
    plans = [WidePlan(n, k, of.segments, tile, None, swiglu) for tile in entry.wide_tiles(rows)]
    fit = [plan for plan in plans if plan.runs]
    return min(fit, key=lambda plan: plan.clocks(rows, multiprocessors), default=None)


def linear_gluon_wide(
    plan: WidePlan, x: Tensor, weight: Weight, *, out: Tensor, programs: int | None = None,
    pdl: bool = False, early: bool = True,
) -> Tensor:  # fmt: skip
    """One launch of a plan into `out` [T, N], or [T, N / 2] with SwiGLU. All bf16; x and the weight are
    `describable`; columns of `out` are contiguous. programs: at most, None: one a multiprocessor. pdl, early:
    as of `linear_triton`."""
    rows = x.shape[0]
    assert plan.runs and weight.shape == (plan.n, plan.k), (plan, weight.shape)
    assert rows > 0 and x.shape[1] == plan.k, (plan, x.shape)
    assert out.shape == (rows, plan.n // 2 if plan.swiglu else plan.n), (out.shape, plan)
    assert takes(x, weight, None), (x.dtype, x.stride(), weight.dtype)
    assert out.stride(1) == 1 and out.dtype == x.dtype, (out.dtype, out.stride())
    sx_t = x.stride(0) if rows > 1 else plan.k
    wide, tail = plan.parts
    _linear_gluon_wide_kernel[(min(plan.count(rows), programs or multiprocessors(x.device)),)](
        w=weight_tiles(weight, plan.swiglu), x=row_tiles(x, sx_t, wide), x_tail=row_tiles(x, sx_t, tail),
        y=out, sy_t=out.stride(0) if rows > 1 else out.shape[1], T=rows, N=plan.n, K=plan.k,
        SEGMENTS=plan.segments, SWIGLU=plan.swiglu, PDL=pdl, GROUP_T=GROUP_T, GROUPS=plan.tile.groups,
        BLOCK_T=wide, TAIL_T=tail, STAGES=plan.tile.stages,
        num_warps=4, **NO_CONTRACTION, **launch_options(pdl and early),
    )  # fmt: skip
    return out
