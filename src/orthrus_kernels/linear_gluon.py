"""The linear layer for Hopper in Gluon: y = x W^T of up to 256 rows a view, of one view or both in a launch,
or SwiGLU of it.

It is `linear_triton` or `linear_swiglu_triton` to the bit: columns of K in order, 64 at a time, in the
segments of the weight's reduction class, which are added in index order from zero. It is faster, as it has
one warp that does nothing but copy, and reads weights while the kernel in front ends.

**A program** takes GROUPS * 64 weight rows, one segment of K and all rows of one view: gluon_ring.py is its
way to the sums, gluon_sums.py from there to y. Tiles are gluon.json's. linear_either.py says when this kernel
runs. It has no interpreter: tests/kernels/test_gluon_aot.py compiles it, tests/gpu/test_linear_gluon.py runs
it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import tables
from ._gluon import GluonDescriptor, gl, gluon, in_gluon
from .descriptors import describable, extent
from .gluon_ring import BLOCK_K, HEIGHT, Tile, copy, new_ring, sum_blocks
from .gluon_sums import Out, finish
from .late import late_word
from .pdl import launch_dependents as _launch_dependents
from .pdl import launch_options
from .rows import NO_CONTRACTION
from .tables.gluon import GluonTile, gluon_entries
from .weight import Weight
from .workspace import Workspace, workspace

launch_dependents = in_gluon(_launch_dependents)


@gluon.jit
def _multiply(tile, ring, out, G: gl.constexpr):
    """Multiplying warpgroup G."""
    place, phase = 0, 0
    acc, tail, _, _ = sum_blocks(tile, ring, tile.blocks, place, phase, G)
    finish(tile, out, (acc, tail), G)


@gluon.jit
def _idle(tile):
    """Warps that the other view of the launch needs; they hold registers that would be nobody's."""
    pass


@gluon.jit
def _run(tile, out, w, x, x_tail, IDLE: gl.constexpr, PDL: gl.constexpr):
    """All warps of a program. The lists at the end of a call: warps and registers a thread of all but its
    first function, which has 4 warps and what is left, 256 registers at most."""
    ring = new_ring(tile)
    if PDL:
        launch_dependents()
    if tile.GROUPS == 1 and IDLE == 0:
        gl.warp_specialize(
            [(_multiply, (tile, ring, out, 0)), (copy, (tile, ring, w, x, x_tail, PDL))], [1], [24]
        )
    elif tile.GROUPS == 1 and IDLE == 1:
        gl.warp_specialize(
            [(_multiply, (tile, ring, out, 0)), (copy, (tile, ring, w, x, x_tail, PDL)), (_idle, (tile,))],
            [1, 4],
            [24, 232],
        )
    elif tile.GROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (tile, ring, out, 0)),
                (copy, (tile, ring, w, x, x_tail, PDL)),
                (_idle, (tile,)),
                (_idle, (tile,)),
            ],
            [1, 4, 4],
            [24, 120, 120],
        )
    elif tile.GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (tile, ring, out, 0)),
                (_multiply, (tile, ring, out, 1)),
                (copy, (tile, ring, w, x, x_tail, PDL)),
            ],
            [4, 1],
            [232, 24],
        )
    else:
        gl.warp_specialize([
            (_multiply, (tile, ring, out, 0)), (_multiply, (tile, ring, out, 1)),
            (_multiply, (tile, ring, out, 2)), (copy, (tile, ring, w, x, x_tail, PDL))],
            [4, 4, 1], [152, 152, 24])  # fmt: skip


@gluon.jit
def _of_view(number, first_row, end_row, out, w, x, x_tail, K, SEGMENTS: gl.constexpr, SWIGLU: gl.constexpr,
             PDL: gl.constexpr, GROUPS: gl.constexpr, BLOCK_T: gl.constexpr, TAIL_T: gl.constexpr,
             STAGES: gl.constexpr, IDLE: gl.constexpr):  # fmt: skip
    """Tile number `number` of one view."""
    segment = gl.program_id(0)
    blocks = gl.cdiv(K, BLOCK_K)
    each = gl.cdiv(blocks, SEGMENTS)
    first = segment * each
    count = gl.minimum(each, blocks - first)
    tile = Tile(number * (GROUPS * HEIGHT), first_row, end_row, first, count, segment,
                number, GROUPS, 1, BLOCK_T, TAIL_T, STAGES, SEGMENTS, SWIGLU)  # fmt: skip
    _run(tile, out, w, x, x_tail, IDLE, PDL)


def _launch_metadata(grid, kernel, args):
    """Name, flops and bytes for Triton's profiler."""
    t, n, k, x = args["T"], args["N"], args["K"], args["x"].base
    views = 1 if args["w_diff"] is None else 2
    width = n // 2 if args["SWIGLU"] else n
    return {
        "name": f"linear_gluon_{t}x{n}x{k}",
        "flops": 2 * t * n * k,
        "bytes": views * args["w"].base.nbytes + x.element_size() * t * (k + width),
    }


@gluon.jit(do_not_specialize=["T", "n_ar"], launch_metadata=_launch_metadata)
def _linear_gluon_kernel(
    w, w_diff, x, x_tail, x_diff, x_diff_tail, y, sy_t, partials, counters, late,
    T, n_ar, N, K,
    SEGMENTS: gl.constexpr, SWIGLU: gl.constexpr, PDL: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_T: gl.constexpr, TAIL_T: gl.constexpr, STAGES: gl.constexpr,
    GROUPS_DIFF: gl.constexpr, BLOCK_T_DIFF: gl.constexpr, TAIL_T_DIFF: gl.constexpr,
    STAGES_DIFF: gl.constexpr,
):  # fmt: skip
    """Program (segment, tile). With w_diff first the tiles of rows [n_ar, T), which are more, then those of
    rows [0, n_ar). w to x_diff_tail: descriptors, None where there is no such view or no tail of a tile."""
    number = gl.program_id(1)
    width = N // 2 if SWIGLU else N
    out = Out(y, sy_t, width, partials, counters, late)
    if GROUPS_DIFF > 0:
        tiles_diff = gl.cdiv(N, GROUPS_DIFF * HEIGHT)
        if number < tiles_diff:
            IDLE: gl.constexpr = GROUPS - GROUPS_DIFF if GROUPS > GROUPS_DIFF else 0
            _of_view(number, n_ar, T, out, w_diff, x_diff, x_diff_tail, K, SEGMENTS, SWIGLU, PDL,
                     GROUPS_DIFF, BLOCK_T_DIFF, TAIL_T_DIFF, STAGES_DIFF, IDLE)  # fmt: skip
        else:
            sums = tiles_diff * GROUPS_DIFF
            taken = sums * (SEGMENTS * (BLOCK_T_DIFF + TAIL_T_DIFF) * HEIGHT)
            behind = Out(y, sy_t, width, partials + taken, counters + sums, late)
            IDLE_AR: gl.constexpr = GROUPS_DIFF - GROUPS if GROUPS_DIFF > GROUPS else 0
            _of_view(number - tiles_diff, gl.to_tensor(0), n_ar, behind, w, x, x_tail, K, SEGMENTS, SWIGLU,
                     PDL, GROUPS, BLOCK_T, TAIL_T, STAGES, IDLE_AR)  # fmt: skip
    else:
        _of_view(number, gl.to_tensor(0), T, out, w, x, x_tail, K, SEGMENTS, SWIGLU, PDL, GROUPS, BLOCK_T,
                 TAIL_T, STAGES, 0)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A launch for a weight [n, k]: the tile of the first view, that of the diffusion view where it has both,
    and the segments of the weight's reduction class."""

    n: int
    k: int
    segments: int
    tile: GluonTile
    tile_diff: GluonTile | None = None
    swiglu: bool = False
    block_k: int = 64  # columns of a place of the ring

    @property
    def tiles(self) -> tuple[GluonTile, ...]:
        return (self.tile,) if self.tile_diff is None else (self.tile, self.tile_diff)

    @property
    def programs(self) -> int:
        """Of the launch."""
        return sum(-(-self.n // (64 * tile.groups)) for tile in self.tiles) * self.segments

    @property
    def runs(self) -> bool:
        """Whether every segment has columns and the launch knows so many."""
        blocks = -(-self.k // self.block_k)
        return self.segments <= 8 and (self.segments - 1) * -(-blocks // self.segments) < blocks

    def fits(self, multiprocessors: int, space: Workspace) -> bool:
        """Whether all programs run at once where they wait for each other, and their sums have room."""
        if self.segments == 1:
            return True
        sums = [-(-self.n // (64 * tile.groups)) * tile.groups for tile in self.tiles]
        numbers = [count * tile.rows * 64 for count, tile in zip(sums, self.tiles, strict=True)]
        return self.programs <= multiprocessors and space.fits(sum(sums), sum(numbers) * self.segments)


def plan_of(
    n: int, k: int, dtype: torch.dtype, device: str, rows: int, rows_diff: int = 0, swiglu: bool = False
) -> Plan | None:
    """The launch of a weight by the tables for so many rows, and so many of the diffusion view behind them;
    None where they have none. device: a key of theirs."""
    entry, of = gluon_entries().get((n, k, dtype, device)), tables.linear_entry(n, k, dtype, device)
    if entry is None or of.block_k != 64 or (swiglu and (n % 16 or of.segments > 1)):
        return None  # SwiGLU of several segments would spill
    tiles = entry.pair(rows, rows_diff) if rows_diff else (entry.tile(rows), None)
    if tiles is None or tiles[0] is None:
        return None
    plan = Plan(n, k, of.segments, tiles[0], tiles[1], swiglu)
    return plan if plan.runs else None


def linear_gluon(
    plan: Plan, x: Tensor, weight: Weight, weight_diff: Weight | None = None, n_ar: int | None = None, *,
    out: Tensor, space: Workspace | None = None, pdl: bool = False, early: bool = True,
) -> Tensor:  # fmt: skip
    """One launch of a plan into `out` [T, N], or [T, N / 2] with SwiGLU. Rows from n_ar on are multiplied by
    weight_diff where the plan has two views. All bf16; x and weights are `describable`; columns of `out` are
    contiguous. space, pdl, early: as of `linear_triton`."""
    rows, space = x.shape[0], space or workspace(x.device)
    n_ar = rows if n_ar is None else n_ar
    check(plan, x, weight, weight_diff, n_ar, out)
    assert plan.fits(multiprocessors(x.device), space), (plan, multiprocessors(x.device))
    diff, sx_t = plan.tile_diff, x.stride(0) if rows > 1 else plan.k
    wide, tail = plan.tile.parts
    wide_diff, tail_diff = diff.parts if diff else (0, 0)
    _linear_gluon_kernel[(plan.segments, plan.programs // plan.segments)](
        w=weight_tiles(weight, plan.swiglu), w_diff=weight_diff and weight_tiles(weight_diff, plan.swiglu),
        x=row_tiles(x, sx_t, wide), x_tail=row_tiles(x, sx_t, tail), x_diff=row_tiles(x, sx_t, wide_diff),
        x_diff_tail=row_tiles(x, sx_t, tail_diff), y=out, sy_t=out.stride(0) if rows > 1 else out.shape[1],
        partials=space.partials, counters=space.counters, late=late_word(x.device),
        T=rows, n_ar=n_ar, N=plan.n, K=plan.k, SEGMENTS=plan.segments, SWIGLU=plan.swiglu, PDL=pdl,
        GROUPS=plan.tile.groups, BLOCK_T=wide, TAIL_T=tail, STAGES=plan.tile.stages,
        GROUPS_DIFF=diff.groups if diff else 0, BLOCK_T_DIFF=wide_diff, TAIL_T_DIFF=tail_diff,
        STAGES_DIFF=diff.stages if diff else 0,
        num_warps=4, **NO_CONTRACTION, **launch_options(pdl and early),
    )  # fmt: skip
    return out


def check(plan: Plan, x: Tensor, weight: Weight, weight_diff: Weight | None, n_ar: int, out: Tensor) -> None:
    """What the kernel takes as given."""
    rows = x.shape[0]
    assert plan.runs and weight.shape == (plan.n, plan.k), (plan, weight.shape)
    assert x.shape[1] == plan.k, (plan, x.shape)
    assert (weight_diff is None) == (plan.tile_diff is None), plan
    assert 0 < n_ar <= plan.tile.rows and rows - n_ar >= 0, (plan, n_ar, rows)
    assert rows - n_ar <= (plan.tile_diff.rows if plan.tile_diff else 0), (plan, n_ar, rows)
    assert out.shape == (rows, plan.n // 2 if plan.swiglu else plan.n), (out.shape, plan)
    assert takes(x, weight, weight_diff), (x.dtype, x.stride(), weight.dtype)
    assert out.stride(1) == 1 and out.dtype == x.dtype, (out.dtype, out.stride())


def takes(x: Tensor, weight: Weight, weight_diff: Weight | None) -> bool:
    """Whether operands are bf16 and can be copied by descriptors."""
    weights = [of for of in (weight, weight_diff) if of is not None]
    sx_t = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    same = x.stride(1) == 1 and all(of.dtype == x.dtype == torch.bfloat16 for of in weights)
    return same and describable((x, sx_t)) and all(of.describable for of in weights)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of any other device as many as an H100 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def row_tiles(x: Tensor, stride: int, rows: int, columns: int = 64, bits: int = 16) -> Any:
    """x, of so many bits a number, in tiles of so many rows; None: no such tile."""
    layout = gl.NVMMASharedLayout(128, bits, rank=2)
    return GluonDescriptor(x, extent(x, stride), [stride, 1], [rows, columns], layout) if rows else None


def weight_tiles(weight: Weight, pairs: bool) -> Any:
    """A weight in tiles of 64 rows, of a gate and its up rows in turns of 8 where they are pairs."""
    (n, k), stride = weight.shape, weight.row_stride
    if not pairs:
        layout = gl.NVMMASharedLayout(128, 16, rank=2)
        return GluonDescriptor(weight.pointer, [n, k], [stride, 1], [64, 64], layout)
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    strides = [8 * stride, n // 2 * stride, stride, 1]
    return GluonDescriptor(weight.pointer, [n // 16, 2, 8, k], strides, [4, 2, 8, 64], layout)
