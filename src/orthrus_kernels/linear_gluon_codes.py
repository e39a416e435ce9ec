"""The linear layer with a quantised weight for Hopper in Gluon: y = x W^T of up to 192 rows of one view, or
SwiGLU of it.

It is `linear_triton` or `linear_swiglu_triton` to the bit: groups of 128 columns in order, in the segments of
the weight's reduction class, which are added in index order from zero. A program is as in linear_gluon.py;
gluon_codes.py is its way to the sums or, where rows are codes too, gluon_rounded.py. linear_either.py says
when this kernel runs."""

from typing import Any

import torch
from torch import Tensor

from . import tables
from ._gluon import GluonDescriptor, gl, gluon
from .coded_rows import Rows
from .descriptors import describable
from .gluon_codes import GROUP, Codes, copy_codes, new_codes_ring, sum_groups
from .gluon_ring import HEIGHT, Tile
from .gluon_rounded import sum_rounded
from .gluon_sums import Out, finish
from .late import late_word
from .linear_gluon import Plan, launch_dependents, multiprocessors, row_tiles
from .pdl import launch_options
from .quantised import QuantisedWeight
from .quantised_triton import row_operands
from .rows import NO_CONTRACTION
from .tables.gluon import CodedTile, coded_entries
from .workspace import Workspace, workspace


@gluon.jit
def _multiply(tile, codes, ring, out, G: gl.constexpr):
    """Multiplying warpgroup G."""
    if codes.SCALES > 0:
        finish(tile, out, sum_rounded(tile, codes, ring, G), G)
    else:
        finish(tile, out, sum_groups(tile, codes, ring, G), G)


@gluon.jit(do_not_specialize=["T", "first_scale"])
def _linear_gluon_codes_kernel(
    w, factors, x, x_tail, x_scale, first_scale, y, sy_t, partials, counters, late,
    T, N, K,
    SEGMENTS: gl.constexpr, SWIGLU: gl.constexpr, PDL: gl.constexpr, FORMAT: gl.constexpr,
    ZEROS: gl.constexpr, FACTOR_ROWS: gl.constexpr, WORDS: gl.constexpr,
    SCALES: gl.constexpr, GROUPS: gl.constexpr,
    PARTS: gl.constexpr, BLOCK_T: gl.constexpr, TAIL_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (segment, tile). w, x, x_tail, x_scale: descriptors, x_tail None where there is no tail of a
    tile, x_scale where rows are bf16; first_scale: its column of the first row."""
    number, segment = gl.program_id(1), gl.program_id(0)
    out = Out(y, sy_t, N // 2 if SWIGLU else N, partials, counters, late)
    codes = Codes(factors, gl.to_tensor(N), FORMAT, ZEROS, FACTOR_ROWS, WORDS, SCALES)
    groups = K // GROUP
    each = gl.cdiv(groups, SEGMENTS)
    first = segment * each
    tile = Tile(number * (GROUPS * HEIGHT), gl.to_tensor(0), T, first, gl.minimum(each, groups - first),
                segment, number, GROUPS, PARTS, BLOCK_T, TAIL_T, STAGES, SEGMENTS, SWIGLU)  # fmt: skip
    ring = new_codes_ring(tile, codes)
    if PDL:
        launch_dependents()
    if GROUPS == 1:
        gl.warp_specialize(
            [(_multiply, (tile, codes, ring, out, 0)),
             (copy_codes, (tile, codes, ring, w, x, x_tail, x_scale, first_scale, PDL))],
            [1], [24],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [(_multiply, (tile, codes, ring, out, 0)), (_multiply, (tile, codes, ring, out, 1)),
             (copy_codes, (tile, codes, ring, w, x, x_tail, x_scale, first_scale, PDL))],
            # of 168 x 384 registers the launch's own warpgroup has as many
            [4, 1], [240 if PARTS * BLOCK_T + TAIL_T > 128 else 232, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [(_multiply, (tile, codes, ring, out, 0)), (_multiply, (tile, codes, ring, out, 1)),
             (_multiply, (tile, codes, ring, out, 2)),
             (copy_codes, (tile, codes, ring, w, x, x_tail, x_scale, first_scale, PDL))],
            [4, 4, 1], [152, 152, 24],
        )  # fmt: skip


COLUMNS = 128  # GROUP, for the host
# Launches on rows that are codes begin at a multiple of so many: TMA reads at multiples of 16 bytes, here of
# scales, wherever the descriptor begins. Any other address is an illegal instruction.
ROUNDED_ROWS_BEGIN = 4


def rows_of_launches(rows: int, most: int, rounds: bool) -> int:
    """Rows of every launch but the last one, where so many are cut into as few launches of `most` rows as
    there can be: equal parts or, of weights that round rows, the next number at which a launch can begin.
    most: a multiple of that."""
    height = -(-rows // -(-rows // most))
    return height + -height % ROUNDED_ROWS_BEGIN if rounds else height


def plans_of(weight: QuantisedWeight, device: str, rows: int, swiglu: bool) -> list[tuple[Plan, int]]:
    """Launches by the table for so many rows of one view, each with its number of rows: those that no tile
    takes are cut. Empty where Triton's kernels run. device: a key of the table."""
    (n, k), bits = weight.shape, weight.format.bits
    entry = coded_entries(weight.rounds).get((n, k, bits, device))
    if entry is None or rows < entry.least or weight.group != COLUMNS or (swiglu and n % 16):
        return []
    height = rows_of_launches(rows, entry.tiles[-1].rows, weight.rounds)
    plan = plan_with(weight, device, entry.tile(height), swiglu)
    if not plan.runs or (swiglu and plan.segments > 1):
        return []
    return [(plan, min(height, rows - first)) for first in range(0, rows, height)]


def plan_with(weight: QuantisedWeight, device: str, tile: CodedTile, swiglu: bool) -> Plan:
    """A launch in the weight's reduction class."""
    n, k = weight.shape
    of = tables.linear_entry(n, k, torch.bfloat16, device, weight.scheme)
    return Plan(n, k, of.segments, tile, None, swiglu, COLUMNS)


def takes_codes(x: Rows, weight: QuantisedWeight) -> bool:
    """Whether rows are bf16, or codes of such, and operands can be copied by descriptors. Codes of rows that
    are made for the launch can; others begin at a multiple of ROUNDED_ROWS_BEGIN."""
    sx_t = x.stride(0) if x.shape[0] > 1 else x.shape[1]
    same = x.stride(1) == 1 and weight.dtype == x.dtype == torch.bfloat16
    rows = weight.rounds or (isinstance(x, Tensor) and describable((x, sx_t)))
    return same and rows and describable((weight.pointer, weight.row_stride))


def linear_gluon_codes(
    plan: Plan, x: Rows, weight: QuantisedWeight, *, out: Tensor, space: Workspace | None = None,
    pdl: bool = False, early: bool = True,
) -> Tensor:  # fmt: skip
    """One launch of a plan into `out` [T, N], or [T, N / 2] with SwiGLU, and one before that makes codes of
    bf16 rows where the weight rounds them. x is what `takes_codes` asks for; columns of `out` are contiguous.
    space, pdl, early: as of `linear_triton`."""
    rows, space = x.shape[0], space or workspace(x.device)
    assert plan.runs and (plan.n, plan.k, plan.block_k) == (*weight.shape, weight.group), (plan, weight.shape)
    assert 0 < rows <= plan.tile.rows and x.shape[1] == plan.k and takes_codes(x, weight), (plan, x.shape)
    assert out.shape == (rows, plan.n // 2 if plan.swiglu else plan.n), (out.shape, plan)
    assert out.stride(1) == 1 and out.dtype == x.dtype, (out.dtype, out.stride())
    assert plan.fits(multiprocessors(x.device), space), (plan, multiprocessors(x.device))
    assert isinstance(plan.tile, CodedTile) and plan.tile.rounds == weight.rounds, plan
    parts, wide, tail = plan.tile.kernel_rows
    operands = row_operands(x, pdl, weight)
    codes, (scales, first) = operands["x"], _scale_tiles(operands["x_scale"], plan.tile.scales)
    sx_t, bits = codes.stride(0) if rows > 1 else plan.k, 8 * codes.element_size()
    _linear_gluon_codes_kernel[(plan.segments, plan.programs // plan.segments)](
        w=_word_tiles(weight, plan.swiglu), factors=weight.factors,
        x=row_tiles(codes, sx_t, wide, COLUMNS, bits), x_tail=row_tiles(codes, sx_t, tail, COLUMNS, bits),
        x_scale=scales, first_scale=first, y=out, sy_t=out.stride(0) if rows > 1 else out.shape[1],
        partials=space.partials, counters=space.counters, late=late_word(x.device), T=rows, N=plan.n,
        K=plan.k, SEGMENTS=plan.segments, SWIGLU=plan.swiglu, PDL=pdl, FORMAT=weight.format.value,
        ZEROS=weight.zeros, FACTOR_ROWS=weight.factor_rows, WORDS=COLUMNS // weight.codes_a_word,
        SCALES=plan.tile.scales, GROUPS=plan.tile.groups, PARTS=parts, BLOCK_T=wide, TAIL_T=tail,
        STAGES=plan.tile.stages, num_warps=4, **NO_CONTRACTION, **launch_options(pdl and early),
    )  # fmt: skip
    return out


def _word_tiles(weight: QuantisedWeight, pairs: bool) -> Any:
    """Words in tiles of 64 rows and a group, of a gate and its up rows in turns of 8 where they are pairs."""
    (n, _), stride, width = weight.shape, weight.row_stride, COLUMNS // weight.codes_a_word
    size = weight.pointer.element_size()
    layout = gl.NVMMASharedLayout(size * width, 8 * size, rank=4 if pairs else 2)
    if not pairs:
        return GluonDescriptor(weight.pointer, [n, stride], [stride, 1], [64, width], layout)
    strides = [8 * stride, n // 2 * stride, stride, 1]
    return GluonDescriptor(weight.pointer, [n // 16, 2, 8, stride], strides, [4, 2, 8, width], layout)


def _scale_tiles(scale: Tensor | None, width: int) -> tuple[Any, int | None]:
    """Scales [K / 128, T] in tiles of a group, and the column of the first row in them, a multiple of
    ROUNDED_ROWS_BEGIN: a descriptor is of the memory of all rows. None: there are none."""
    if scale is None:
        return None, None
    stride, offset = scale.stride(0), int(scale.storage_offset())
    whole = scale.as_strided((len(scale), stride), (stride, 1), offset - offset % stride)
    assert describable((whole, stride)), (scale.shape, stride)
    assert offset % stride % ROUNDED_ROWS_BEGIN == 0, offset
    layout = gl.NVMMASharedLayout(0, 32, rank=2)
    return GluonDescriptor(whole, [len(scale), stride], [stride, 1], [1, width], layout), offset % stride
