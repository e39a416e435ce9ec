"""Dual-view attention in Triton, the launch: which tiles and which form of the kernels a pass takes.

`attention_kernels.py` says what they compute and why a row's bits do not depend on the pass. Its forms:

- **partial**: one program a (tile, segment), the partials folded by a second kernel. Few rows;
- **fused**: the same, folded by the program of a key head that arrives last. Fewer rows still, of one tile;
- **whole**: one program takes all segments of a tile. Many rows (prefill); no partials in memory.

Bytes moved: keys and values once per tile (from L2 for all but the first tile of a segment); partial
forms also write and read 4 (D + 2) bytes per row, query head and segment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._triton import triton
from .attention_kernels import _combine_kernel, _partial_kernel, _whole_kernel
from .packed import PackedRows, key_segments, pack
from .pdl import launch_options
from .rows import new_rows
from .visibility import Rows
from .workspace import workspace as shared_workspace

# (D, bytes of an element) -> (FOLDED, BLOCK_S, warps, stages). FOLDED: rows of a tile once the query heads of
# a key head are folded in. It, BLOCK_S and the warps decide bits, stages do not. 16 bits: tiles of 64 rows or
# more gave a row the same bits (four warps per 64 rows), tiles of 16 and 32 others; 64 cost nothing even for
# one token (H200, 2026-11-24, prototypes/attention_tiles.py). fp32 multiplies without tensor cores, whose
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

# Programs from which on the whole form is taken: about one tall tile for every SM of a large GPU.
WHOLE_PROGRAMS = 120
# One path of more than so many rows (a prompt) takes it too when partials would need more memory than that,
# in bytes: they grow with the context, to hundreds of MB.
PROMPT_ROWS, PROMPT_BYTES = 128, 1 << 24
# Partials of a key head, in bytes, up to which the program that arrives last folds them: one SM reads them
# about as fast as a launch of the combine takes. One row has 520 bytes a query head and segment.
FUSED_BYTES = 1 << 17
FUSED_HEADS = 16  # rows times query heads of a key head that it folds: a kernel for each power of two
FUSED_UNROLL = (
    4  # partials it has in flight, fewer where they are more than 64 numbers a thread; 16 were no faster
)
COMBINE_UNROLL = 8  # partials a combining program has in flight; they are folded in order all the same


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Rows | PackedRows, scale: float,
    *, out: Tensor | None = None, workspace: Tensor | None = None, form: str = "auto", pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from every row of a pass; returns [T, H, D] in q's dtype. Arguments as for the twin `attention`.

    q [T, H, D]; k, v [T, G, D]; k_cache, v_cache [B, G, S, D]: any strides but a last one of 1.
    rows: of the pass, or packed already for tiles of `tile_rows(...)` rows: once a pass, not once a layer.
    workspace: at least `workspace_size(...)` fp32 numbers, where nothing may be allocated.
    form: "partial", "fused" (passes of one path tile) or "whole", the same bits; "auto" takes the fastest.
    "fused" counts arrivals in the device's shared workspace: launches on one stream only.
    pdl: as dependent launches (pdl.py), the combine too."""
    n, heads, d = q.shape
    groups = k.shape[1]
    group = heads // groups
    if isinstance(rows, Rows):
        rows = pack(rows, tile_rows(heads, groups, d, q.dtype, rows), q.device)
    _check(q, k, v, k_cache, v_cache, rows, scale)
    out = new_rows(q, *q.shape) if out is None else out
    assert out.shape == q.shape and out.stride(2) == 1, (out.shape, out.stride())
    folded, block, warps, stages = _launch(d, q.dtype)
    if form == "auto":
        form = _form(rows, groups, group, d, q.dtype)
    tall = _tall(q.dtype) if form == "whole" else 1
    assert rows.tile_rows * group <= tall * folded, f"form {form} takes no tiles of {rows.tile_rows} rows"
    assert form != "fused" or _one_tile(rows), "form fused takes passes of one path tile"
    shared = {
        "q": q, "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "k": k, "stride_kt": k.stride(0), "stride_kg": k.stride(1),
        "v": v, "stride_vt": v.stride(0), "stride_vg": v.stride(1),
        "k_cache": k_cache, "stride_kb": k_cache.stride(0), "stride_kcg": k_cache.stride(1),
        "stride_ks": k_cache.stride(2),
        "v_cache": v_cache, "stride_vb": v_cache.stride(0), "stride_vcg": v_cache.stride(1),
        "stride_vs": v_cache.stride(2),
        "rows": rows.rows, "limits": rows.limits, "tiles": rows.tiles, "slots": rows.slots,
        "segments": rows.segments, "G": groups, "scale": scale * math.log2(math.e),
        "out": out, "stride_ot": out.stride(0), "stride_oh": out.stride(1),
        "D": d, "GROUP": group, "TILE": rows.tile_rows, "FOLDED": tall * folded,
        "BLOCK_S": block, "STAGES": stages, "PDL": pdl, "num_warps": tall * warps, **launch_options(pdl),
    }  # fmt: skip
    if form == "whole":
        _whole_kernel[(rows.path_tiles * groups,)](N=rows.path_tiles, **shared)
        return out
    size = workspace_size(rows, heads, d)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    assert workspace.numel() >= size and workspace.dtype == torch.float32, (workspace.numel(), size)
    stats = workspace[size * d // (d + 2) : size]
    fused = triton.next_power_of_2(n * group) if form == "fused" else 0
    _partial_kernel[(len(rows.items) * groups,)](
        items=rows.items, acc=workspace, stats=stats, T=n,
        arrivals=shared_workspace(q.device).counters if fused else None,
        FUSED=fused, UNROLL=_fused_unroll(fused, d, warps), **shared,
    )  # fmt: skip
    if not fused:
        _combine_kernel[(n, heads)](
            acc=workspace, stats=stats, row_segments=rows.row_segments,
            out=out, stride_ot=out.stride(0), stride_oh=out.stride(1), T=n, H=heads,
            scale=shared["scale"], D=d, UNROLL=COMBINE_UNROLL, PDL=pdl, num_warps=1,
            **launch_options(pdl),
        )  # fmt: skip
    return out


def prepare_rows_triton(
    rows: Rows, heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device, *, room: int = 0
) -> PackedRows:
    """The tables of a pass for `attention_triton`, on the device: once a pass, not once a layer. room: as for
    `pack`."""
    return pack(rows, tile_rows(heads, groups, d, dtype, rows), device, room=room)


def tile_rows(heads: int, groups: int, d: int, dtype: torch.dtype, rows: Rows | None = None) -> int:
    """Rows of a tile, what `pack` is to be called with, for H query heads, G key heads of size D in a dtype.

    Any pass may take the height without `rows`; a prompt in a 16-bit dtype gets the tall tiles of the whole
    form. A row's bits are the same in both."""
    height = _launch(d, dtype)[0] // (heads // groups)
    if rows is None:
        return height
    tall = _tall(dtype) * _launch(d, dtype)[0] // (heads // groups)
    leaves = rows.n_ar - len({rows.parents[i] for i in range(rows.n_ar)} - {-1})
    n_paths = leaves + len(set(rows.blocks) - {-1})
    most_tiles = -(-len(rows) // tall) + n_paths - 1
    if _fills(len(rows), most_tiles, tall, groups):
        return tall
    segments = sum(1 for _ in key_segments(max(rows.positions, default=0) + 1))
    partials = 4 * segments * len(rows) * heads * (d + 2)
    prompt = n_paths == 1 and len(rows) > PROMPT_ROWS and partials > PROMPT_BYTES
    return tall if prompt and dtype.itemsize == 2 else height


def _launch(d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(FOLDED, BLOCK_S, warps, stages) of the reduction class of a head size and dtype."""
    return LAUNCH.get((d, dtype.itemsize), DEFAULT_LAUNCH)


def _tall(dtype: torch.dtype) -> int:
    return TALL if dtype.itemsize == 2 else 1


def workspace_size(rows: PackedRows, heads: int, d: int) -> int:
    """fp32 numbers that the partials of a pass take: D + 2 per segment, row and query head."""
    return rows.n_segments * rows.n_rows * heads * (d + 2)


def _form(rows: PackedRows, groups: int, group: int, d: int, dtype: torch.dtype) -> str:
    """The fastest form of a pass."""
    tall = rows.tile_rows == _tall(dtype) * _launch(d, dtype)[0] // group
    if tall and (dtype.itemsize == 2 or _fills(rows.n_rows, rows.path_tiles, rows.tile_rows, groups)):
        return "whole"
    few = rows.n_rows * group <= FUSED_HEADS and 4 * workspace_size(rows, group, d) <= FUSED_BYTES
    return "fused" if few and _one_tile(rows) else "partial"


def _fills(n_rows: int, path_tiles: int, height: int, groups: int) -> bool:
    """Whether path tiles alone fill the GPU, and are about as full as context tiles would be."""
    return path_tiles * groups >= WHOLE_PROGRAMS and path_tiles <= 1.25 * -(-n_rows // height)


def _one_tile(rows: PackedRows) -> bool:
    """Whether all rows lie in one path tile and so, in segments inside the context, in one context tile."""
    return rows.path_tiles == 1


def _fused_unroll(fused: int, d: int, warps: int) -> int:
    """Partials of `fused` rows and heads that the folding program has in flight."""
    return max(1, min(FUSED_UNROLL, 64 * 32 * warps // (fused * d))) if fused else 1


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PackedRows, scale: float
) -> None:
    n, heads, d = q.shape
    groups = k.shape[1]
    folded = _launch(d, q.dtype)[0]
    assert heads % groups == 0 and heads // groups <= folded, (heads, groups, folded)
    assert k.shape == v.shape == (n, groups, d), (q.shape, k.shape, v.shape)
    assert k_cache.shape == v_cache.shape and k_cache.shape[1::2] == (groups, d), (k_cache.shape, k.shape)
    assert {t.dtype for t in (q, k, v, k_cache, v_cache)} == {q.dtype}, "one dtype for all"
    assert all(t.stride(-1) == 1 for t in (q, k, v, k_cache, v_cache)), "last strides must be 1"
    heights = [tall * folded // (heads // groups) for tall in {1, _tall(q.dtype)}]
    assert rows.n_rows == n and rows.tile_rows in heights, (rows.n_rows, n, rows.tile_rows, heights)
    assert scale > 0, f"scale is {scale}; the running maximum is taken before scaling"
