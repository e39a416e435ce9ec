"""Dual-view attention in Triton, the launch: which tiles and which form of the kernels a pass takes.

`attention_kernels.py` says what they compute and why a row's bits do not depend on the pass. Its forms:

- **partial**: the items of the work list are (tile, segment) pairs, the partials are folded by a second
  kernel. Few rows;
- **fused**: the same, folded by the program of a key head that arrives last. Fewer rows still, of one tile;
- **whole**: one program takes all segments of a tile. Many rows (prefill); no partials in memory;
- **shared**: whole pages of the context as in the partial form, by tiles of all rows of a sequence; then one
  program a path tile, as in the whole form, folds these partials and goes on. Trees and blocks.

Bytes moved: keys and values once per tile (from L2 for all but the first tile of a segment); all forms but
the whole one also write and read 4 (D + 2) bytes per row, query head and segment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._triton import triton
from .attention_kernels import _combine_kernel, _partial_kernel, _path_kernel, _whole_kernel
from .pages import PAGE
from .pass_tables import PassTables
from .pdl import launch_options
from .plan import PassShape
from .rows import new_rows
from .workspace import workspace as shared_workspace

# (D, bytes of an element) -> (FOLDED, BLOCK_S, warps, stages). FOLDED: rows of a tile once the query heads of
# a key head are folded in. It, BLOCK_S and the warps decide bits, stages do not. 16 bits: tiles of 64 rows or
# more gave a row the same bits (four warps per 64 rows), tiles of 16 and 32 others; 64 cost nothing even for
# one token (H200, 2026-11-24). fp32 multiplies without tensor cores, whose
# operands lie in registers: larger tiles spill (ptxas of triton 3.7.1, sm_90).
LAUNCH = {
    (64, 2): (64, 64, 4, 3),
    (128, 2): (64, 64, 4, 3),
    (64, 4): (64, 16, 8, 2),
    (128, 4): (16, 16, 8, 2),
}
DEFAULT_LAUNCH = (64, 64, 4, 2)  # other head sizes: tests and toy models

# Tiles side by side in the tall tile of the whole form, with as many times the warps: keys come from L2 half
# as often, and its two accumulators would spill in one. A warp holds whole rows, laid out the same in both
# heights. 16 bits only: products of fp32 are laid out over all warps. The partial form is faster in short
# tiles at every context and 32 to 128 rows (H100, bench/LOG.md, 2026-11-25).
TALL = 2

# Rows of a chain (a prompt) from which on, not included, the whole form is taken: it needs no memory for
# partials, which grow with the context, to hundreds of MB.
PROMPT_ROWS = 128
# Programs of the partial form, at most: 4 for every SM of an H200, which take the items of the work list in
# turn, so that the grid does not follow from the length of a text.
PROGRAMS = 4 * 132
# Partials of a key head, in bytes, up to which the program that arrives last folds them: one SM reads them
# about as fast as a launch of the combine takes. One row has 520 bytes a query head and segment.
FUSED_BYTES = 1 << 17
FUSED_HEADS = 16  # rows times query heads of a key head that it folds: a kernel for each power of two
FUSED_UNROLL = (
    4  # partials it has in flight, fewer where they are more than 64 numbers a thread; 16 were no faster
)
COMBINE_UNROLL = 8  # partials a combining program has in flight; they are folded in order all the same
# Where the program of a path tile folds: rows times query heads of a key head at a time, and numbers that a
# thread has in flight; whole tiles would spill. Its stages: most of its keys are gathered, which is not
# pipelined, and 48 KB of shared memory in place of 112 leave room for other programs.
PATH_PART = 16
PATH_NUMBERS = 128
PATH_STAGES = 1


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float, *, out: Tensor | None = None, workspace: Tensor | None = None, form: str = "auto",
    programs: int | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from every row of a pass; returns [T, H, D] in q's dtype. Arguments as for the twin `attention`.

    q [T, H, D]; k, v [T, G, D]; k_cache, v_cache [P, G, PAGE, D]: any strides but a last one of 1, keys and
    values laid out alike; pages [S, N] int32. tables: of `new_tables_triton`, laid. workspace: at least
    `workspace_size(...)` fp32 numbers, where nothing may be allocated. form: of tables that are neither whole
    nor shared, "partial" or "fused" (passes of one path tile), the same bits; "auto" takes the fastest.
    "fused" counts arrivals in the device's shared workspace: launches on one stream only. programs: of the
    partial kernel, at most, but one a key head; PROGRAMS where it is not said.
    pdl: as dependent launches (pdl.py), the second one too."""
    n, heads, d = q.shape
    groups = k.shape[1]
    group = heads // groups
    _check(q, k, v, k_cache, v_cache, pages, tables, scale)
    out = new_rows(q, *q.shape) if out is None else out
    assert out.shape == q.shape and out.stride(2) == 1, (out.shape, out.stride())
    given = _given(q, k, v, k_cache, v_cache, pages, tables, tables.tile_rows, scale, out, pdl)
    if tables.whole:
        _whole_kernel[(len(tables.items) * groups,)](items=tables.items, count=tables.count, **given)
        return out
    if tables.shared:
        form = "partial"
    elif form == "auto":
        form = form_of(tables, group, d)
    assert form != "fused" or tables.one_tile, "form fused takes passes of one path tile"
    acc, stats = room_for(tables, q, workspace)
    fused = triton.next_power_of_2(n * group) if form == "fused" else 0
    each = max((programs or PROGRAMS) // groups, 1)
    _partial_kernel[(min(len(tables.items), each) * groups,)](
        items=tables.items, count=tables.count, acc=acc, stats=stats, T=n,
        arrivals=shared_workspace(q.device).counters if fused else None,
        FUSED=fused, UNROLL=_fused_unroll(fused, d, _launch(d, q.dtype)[2]), **given,
    )  # fmt: skip
    if tables.shared:
        go_on(q, k, v, k_cache, v_cache, pages, tables, scale, acc, stats, out, pdl)
    elif not fused:
        combine(acc, stats, tables, out, scale * math.log2(math.e), pdl)
    return out


def go_on(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float, acc: Tensor, stats: Tensor, out: Tensor, pdl: bool,
) -> None:  # fmt: skip
    """What path tiles have to do in the shared form, behind the partials of `room_for`, into out [T, H, D].
    Arguments as of `attention_triton`; tables whose context tiles have any height."""
    given = _given(q, k, v, k_cache, v_cache, pages, tables, tables.path_rows, scale, out, pdl)
    part = min(PATH_PART, given["FOLDED"])
    _path_kernel[(tables.path_tiles * k.shape[1],)](
        row_segments=tables.row_segments, acc=acc, stats=stats, T=len(q), PLACES=tables.tile_rows, PART=part,
        UNROLL=_path_unroll(part, given["D"], given["num_warps"]), **given | {"STAGES": PATH_STAGES},
    )  # fmt: skip


def _given(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    height: int, scale: float, out: Tensor, pdl: bool,
) -> dict[str, Any]:  # fmt: skip
    """Arguments that kernels of tiles of `height` rows share."""
    _, heads, d = q.shape
    groups = k.shape[1]
    folded, block, warps, stages = _launch(d, q.dtype)
    tall = -(-height * (heads // groups) // folded)
    return {
        "q": q, "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "k": k, "v": v, "stride_kt": k.stride(0), "stride_kg": k.stride(1),
        "k_cache": k_cache, "v_cache": v_cache, "stride_cp": k_cache.stride(0),
        "stride_cg": k_cache.stride(1), "stride_cs": k_cache.stride(2),
        "pages": pages, "stride_ps": pages.stride(0),
        "rows": tables.rows, "limits": tables.limits, "tiles": tables.tiles, "slots": tables.slots,
        "segments": tables.segments, "G": groups, "scale": scale * math.log2(math.e),
        "out": out, "stride_ot": out.stride(0), "stride_oh": out.stride(1),
        "D": d, "GROUP": heads // groups, "TILE": height, "FOLDED": tall * folded,
        "BLOCK_S": block, "STAGES": stages, "PAGE": PAGE, "PDL": pdl, "num_warps": tall * warps,
        **launch_options(pdl),
    }  # fmt: skip


def room_for(tables: PassTables, q: Tensor, workspace: Tensor | None) -> tuple[Tensor, Tensor]:
    """Memory for the partials of a pass of queries q [T, H, D], in `workspace` where it is given:
    accumulators and, behind them, (maximum, sum) pairs."""
    heads, d = q.shape[1:]
    size = workspace_size(tables, heads, d)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    assert workspace.numel() >= size and workspace.dtype == torch.float32, (workspace.numel(), size)
    return workspace, workspace[size * d // (d + 2) : size]


def combine(
    acc: Tensor, stats: Tensor, tables: PassTables, out: Tensor, scale: float, pdl: bool
) -> None:  # fmt: skip
    """Fold the partials of `room_for` into out [T, H, D]. scale: that of the scores, times log2 e."""
    n, heads, d = out.shape
    _combine_kernel[(n, heads)](
        acc=acc, stats=stats, row_segments=tables.row_segments, out=out, stride_ot=out.stride(0),
        stride_oh=out.stride(1), T=n, H=heads, scale=scale, D=d, UNROLL=COMBINE_UNROLL, PDL=pdl, num_warps=1,
        **launch_options(pdl),
    )  # fmt: skip


def new_tables_triton(
    shape: PassShape, capacity: int, heads: int, groups: int, d: int, dtype: torch.dtype,
    device: torch.device, *, shared: bool = True,
) -> PassTables:  # fmt: skip
    """Tables for `attention_triton`: in the whole form for prompts in 16 bits, one line a sequence, if one of
    them may have all rows; in the shared form for trees and blocks, unless `shared` says no."""
    prompt = shape.lines <= shape.sequences and shape.n_rows == shape.depth > PROMPT_ROWS
    whole = prompt and dtype.itemsize == 2
    height = tile_rows(heads, groups, d, dtype, whole)
    return PassTables.new(shape, capacity, height, whole, device, shared=shared and shape.branches)


def tile_rows(heads: int, groups: int, d: int, dtype: torch.dtype, whole: bool = False) -> int:
    """Rows of a tile for H query heads, G key heads of size D in a dtype. The whole form takes the tall tiles
    of 16-bit dtypes; a row's bits are the same in both."""
    return (_tall(dtype) if whole else 1) * _launch(d, dtype)[0] // (heads // groups)


def _launch(d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(FOLDED, BLOCK_S, warps, stages) of the reduction class of a head size and dtype."""
    return LAUNCH.get((d, dtype.itemsize), DEFAULT_LAUNCH)


def _tall(dtype: torch.dtype) -> int:
    return TALL if dtype.itemsize == 2 else 1


def form_of(tables: PassTables, group: int, d: int) -> str:
    """The fastest form, "partial" or "fused", of tables that are not whole, for `group` query heads a key
    head."""
    few = tables.shape.n_rows * group <= FUSED_HEADS and 4 * workspace_size(tables, group, d) <= FUSED_BYTES
    return "fused" if few and tables.one_tile else "partial"


def workspace_size(tables: PassTables, heads: int, d: int) -> int:
    """fp32 numbers that the partials of a pass take: D + 2 per segment, row and query head."""
    return tables.n_segments * tables.shape.n_rows * heads * (d + 2)


def _fused_unroll(fused: int, d: int, warps: int) -> int:
    """Partials of `fused` rows and heads that the folding program has in flight."""
    return max(1, min(FUSED_UNROLL, 64 * 32 * warps // (fused * d))) if fused else 1


def _path_unroll(part: int, d: int, warps: int) -> int:
    """Partials that the program of a path tile has in flight, of `part` rows and heads."""
    return min(COMBINE_UNROLL, max(1, PATH_NUMBERS * 32 * warps // (part * d)))


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float,
) -> None:  # fmt: skip
    n, heads, d = q.shape
    groups = k.shape[1]
    folded, block, *_ = _launch(d, q.dtype)
    assert PAGE % block == 0, f"a block of {block} keys would lie in two pages"
    assert heads % groups == 0 and heads // groups <= folded, (heads, groups, folded)
    assert k.shape == v.shape == (n, groups, d), (q.shape, k.shape, v.shape)
    assert k_cache.shape == v_cache.shape and k_cache.shape[1:] == (groups, PAGE, d), (k_cache.shape, k.shape)
    assert k.stride() == v.stride() and k_cache.stride() == v_cache.stride(), "keys and values laid out alike"
    assert pages.ndim == 2 and pages.dtype == torch.int32 and pages.stride(1) == 1, (pages.shape, pages.dtype)
    assert {t.dtype for t in (q, k, v, k_cache, v_cache)} == {q.dtype}, "one dtype for all"
    assert all(t.stride(-1) == 1 for t in (q, k, v, k_cache, v_cache)), "last strides must be 1"
    height = tile_rows(heads, groups, d, q.dtype, tables.whole)
    assert tables.shape.n_rows == n and tables.tile_rows == height, (
        tables.shape,
        n,
        tables.tile_rows,
        height,
    )
    assert scale > 0, f"scale is {scale}; the running maximum is taken before scaling"
