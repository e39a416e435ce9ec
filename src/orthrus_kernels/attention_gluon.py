"""Dual-view attention of many rows for Hopper in Gluon, the launch: `attention_triton` to the bit.

attention_gluon_kernels.py says what defines the bits and how the kernel is built. Two forms:

- **partial**: items are (tile, segment) pairs, and the combine of attention_kernels.py folds the partials.
  Chains whose tiles would leave multiprocessors idle. Trees and mixed passes in the shared form: their items
  are of context tiles, and Triton's `_path_kernel` goes on from there;
- **whole**: items are tiles with all their segments, folded as they come. Longer chains (prompts).

Both take tall tiles, 128 folded rows, in as many programs as the GPU has multiprocessors. Few rows, other
GPUs, dtypes and head sizes are Triton's: attention_either.py chooses.

Bytes moved: keys and values once per tall tile, from L2 for all but the first tile of a segment."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._gluon import GluonDescriptor, gl
from .attention_gluon_kernels import _attention_gluon_kernel
from .attention_triton import combine, go_on, room_for, tile_rows
from .pages import PAGE
from .pass_tables import PassTables
from .pdl import launch_options
from .plan import PassShape
from .rows import new_rows

HEAD = 128  # the head size that it takes
FOLDED = 128  # rows of a tile once the query heads of a key head are folded in: 64 for each warpgroup
# Blocks of keys and values, 32 KB each, in shared memory. The whole form has 64 KB of folded sums there.
STAGES = {False: 5, True: 4}
# Folded rows of a pass from which on: below that a pass fills at most two tall tiles.
LEAST_FOLDED = 256
# Positions of a text from which on its trees are taken too. Where keys are few a tree's own rows take most of
# the time, and short tiles spread them over more multiprocessors.
LONG = 8192
# A chain is taken in the partial form while its pairs of a tall tile and a key head are not more: half of an
# H200's multiprocessors would have nothing to do. Its partials take 2.3 MB a pair at 40,960 positions.
PARTIAL_PAIRS = 66


def attention_gluon(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float, *, out: Tensor | None = None, workspace: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from every row of a pass; returns [T, H, 128] bf16. Arguments as of `attention_triton`; tables
    of `new_tables_gluon`, laid."""
    n, heads, d = q.shape
    groups = k.shape[1]
    _check(q, k, v, k_cache, v_cache, pages, tables, scale)
    out = new_rows(q, *q.shape) if out is None else out
    assert out.shape == q.shape and out.stride(2) == 1, (out.shape, out.stride())
    acc, stats = (None, None) if tables.whole else room_for(tables, q, workspace)
    raw = scale * math.log2(math.e)
    programs = min(multiprocessors(q.device), len(tables.items) * groups)
    _attention_gluon_kernel[(programs,)](
        q=q, stride_qt=q.stride(0), stride_qh=q.stride(1),
        k=k, v=v, stride_kt=k.stride(0), stride_kg=k.stride(1),
        k_cache=k_cache, v_cache=v_cache, stride_cp=k_cache.stride(0), stride_cg=k_cache.stride(1),
        stride_cs=k_cache.stride(2), pages=pages, stride_ps=pages.stride(0),
        tiled_k=_tiled(k, (PAGE, 1, d)), tiled_v=_tiled(v, (PAGE, 1, d)),
        tiled_k_cache=_tiled(k_cache, (1, 1, PAGE, d)), tiled_v_cache=_tiled(v_cache, (1, 1, PAGE, d)),
        rows=tables.rows, limits=tables.limits, tiles=tables.tiles, slots=tables.slots,
        segments=tables.segments, items=tables.items, count=tables.count,
        acc=acc, stats=stats, out=out, stride_ot=out.stride(0), stride_oh=out.stride(1),
        T=n, G=groups, programs=programs, scale=raw, D=d, GROUP=heads // groups, TILE=tables.tile_rows,
        STAGES=STAGES[tables.whole], WHOLE=tables.whole, PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    if acc is None or stats is None:
        return out
    if tables.shared:
        go_on(q, k, v, k_cache, v_cache, pages, tables, scale, acc, stats, out, pdl)
    else:
        combine(acc, stats, tables, out, raw, pdl)
    return out


def new_tables_gluon(
    shape: PassShape, capacity: int, heads: int, groups: int, device: torch.device, *, shared: bool = True
) -> PassTables:
    """Tables for `attention_gluon`, of tall tiles; those of trees in the shared form, unless `shared` says
    no, with path tiles as Triton's."""
    chain = shape.lines <= shape.sequences and shape.n_rows == shape.depth
    tile = FOLDED * groups // heads
    whole = chain and -(-shape.n_rows // tile) * groups > PARTIAL_PAIRS
    shared = shared and shape.branches
    path_rows = tile_rows(heads, groups, HEAD, torch.bfloat16) if shared else None
    return PassTables.new(shape, capacity, tile, whole, device, shared=shared, path_rows=path_rows)


def takes(shape: PassShape, capacity: int, heads: int, groups: int, d: int, dtype: torch.dtype) -> bool:
    """Whether a pass is one for this kernel: a prompt, or a tree of one text that may grow long."""
    group = heads // groups
    if dtype != torch.bfloat16 or d != HEAD or 64 % group or shape.n_rows * group < LEAST_FOLDED:
        return False
    return shape.n_rows == shape.depth or (shape.sequences == 1 and capacity >= LONG)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of any other device as many as an H100 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tiled(x: Tensor, block: tuple[int, ...]) -> Any:
    """A tensor in blocks of 64 keys or values, for TMA."""
    layout = gl.NVMMASharedLayout(128, 16, rank=len(block))
    return GluonDescriptor(x, list(x.shape), list(x.stride()), list(block), layout)


def _check(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float,
) -> None:  # fmt: skip
    n, heads, d = q.shape
    groups = k.shape[1]
    assert heads % groups == 0 and 64 % (heads // groups) == 0 and d == HEAD, (q.shape, k.shape)
    assert k.shape == v.shape == (n, groups, d), (q.shape, k.shape, v.shape)
    assert k_cache.shape == v_cache.shape and k_cache.shape[1:] == (groups, PAGE, d), (k_cache.shape, k.shape)
    assert k.stride() == v.stride() and k_cache.stride() == v_cache.stride(), "keys and values laid out alike"
    assert pages.ndim == 2 and pages.dtype == torch.int32 and pages.stride(1) == 1, (pages.shape, pages.dtype)
    for t in (q, k, v, k_cache, v_cache):
        assert t.dtype == torch.bfloat16 and t.stride(-1) == 1, (t.dtype, t.stride())
        starts = [t.data_ptr() % 16, *(stride % 8 for stride in t.stride()[:-1])]
        assert not any(starts), "every row of D numbers begins at a multiple of 16 bytes"
    assert tables.shape.n_rows == n and tables.tile_rows * heads == FOLDED * groups, (
        tables.shape, n, tables.tile_rows,
    )  # fmt: skip
    assert scale > 0, f"scale is {scale}; the running maximum is taken before scaling"
