"""Head: of every row its k likeliest tokens and the log-sum-exp of its logits, which for k = 1 never reach
memory.

Shapes: x [T, E] normalised, weight [V, E] -> logits [T, k] fp32, ids [T, k], log-sum-exp [T] fp32. Logits are
those of `linear(x, weight, out_dtype=float32)`, bit for bit. Moves V E weight elements once, for each
row 12 bytes a group of 64 tokens, and if k > 1 the logits out and those of k groups in.

A row's bits. The logits by the reduction class of the weight's entry in the linear table, its segments one
after another in one CTA; the rest by reductions without an order (logit_summary.py), so that the tile may
change with the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tables
from ._triton import tl, triton
from .choice import log_sum_exp
from .linear import linear, sum_by_pointers
from .logit_summary import GROUP, Groups, Summary, empty_summary, summarise_tile
from .pdl import launch_dependents, launch_options, wait
from .tables import LinearTile
from .weight import Weight, prefetch_weight

# The linear table's tiles leave no registers for the summary: a tile has 8192 logits at most. Of those,
# these were the fastest on the weight most like a head (12288x2048, H100, bench/LOG.md, 2026-11-25);
# 128 rows take 8 warps in place of 4, since 4 need all 255 registers here.
_TILES_16_BIT = (
    LinearTile(16, 16, 128, False, 4, 5),
    LinearTile(32, 32, 128, False, 4, 5),
    LinearTile(64, 64, 128, False, 8, 4),
    LinearTile(None, 128, 64, False, 8, 4),
)
_TILES_32_BIT = (LinearTile(16, 16, 64, False, 4, 3), LinearTile(None, 32, 64, False, 4, 3))


def head_entry(n: int, e: int, dtype: torch.dtype, device: str) -> tables.LinearEntry:
    """The head's tiles, with the reduction class that `linear` has for its weight."""
    of = tables.linear_entry(n, e, dtype, device)
    tiles = _TILES_32_BIT if dtype == torch.float32 else _TILES_16_BIT
    device = "sm_90" if device == "cpu" else device
    return tables.fitted(tables.LinearEntry(of.block_k, of.segments, tiles), dtype, device)


def _launch_metadata(grid, kernel, args):
    """Name, flops and bytes for Triton's profiler."""
    t, n, k = args["T"], args["N"], args["K"]
    logits = 4 * n * t if args["STORE"] else 0
    return {
        "name": f"head_{t}x{n}x{k}",
        "flops": 2 * t * n * k,
        "bytes": args["w"].nbytes + args["x"].element_size() * t * k + logits,
    }


@triton.jit(do_not_specialize=["T", "prefetch"], launch_metadata=_launch_metadata)
def _head_kernel(
    x, sx_t, w, sw_n, logits, best, sums,
    T, N, K, prefetch,
    SEGMENTS: tl.constexpr, EVEN_K: tl.constexpr, STORE: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile): row tiles of one weight tile are neighbours, which share it in L2."""
    tiles_t = tl.cdiv(T, BLOCK_T)
    i_t, i_n = tl.program_id(0) % tiles_t, tl.program_id(0) // tiles_t
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    blocks = tl.cdiv(K, BLOCK_K)
    if PDL:
        launch_dependents()
        prefetch_weight(w, sw_n, i_n, 0, N, K, prefetch, SEGMENTS, BLOCK_N, BLOCK_K)
        wait()  # x and the scratch memory written below may be in use until here
    if SEGMENTS == 1:
        total = sum_by_pointers(w, sw_n, x, sx_t, o_n, o_t, T, 0, blocks, N, K,
                                 BLOCK_N, BLOCK_T, BLOCK_K, STAGES, EVEN_K)  # fmt: skip
    else:
        each = tl.cdiv(blocks, SEGMENTS)
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for s in range(SEGMENTS):
            total += sum_by_pointers(w, sw_n, x, sx_t, o_n, o_t, T, s * each,
                                      tl.minimum((s + 1) * each, blocks), N, K,
                                      BLOCK_N, BLOCK_T, BLOCK_K, STAGES, EVEN_K)  # fmt: skip
    if STORE:
        p_l = logits + o_t.to(tl.int64)[None, :] * N + o_n[:, None]
        tl.store(p_l, total, mask=(o_t < T)[None, :] & (o_n < N)[:, None])
    summarise_tile(total, i_n, o_t, T, N, best, sums, BLOCK_N, BLOCK_T, GROUP)


def head_triton(
    x: Tensor, weight: Weight, k: int = 1, *, out: Summary | None = None,
    entry: tables.LinearEntry | None = None, pdl: bool = False, early: bool = True,
) -> Summary:  # fmt: skip
    """`head` as two Triton launches; k up to 128. x and weight share one dtype; columns of x are contiguous.

    entry: in place of `head_entry`, for tuning; tiles of 64 tokens or a multiple. pdl, early: as
    `linear_triton`."""
    _check_shapes(x, weight)
    v = weight.shape[0]
    out = empty_summary(len(x), v, k, x.device, out)
    if len(x):
        logits = None if k == 1 else x.new_empty(len(x), v, dtype=torch.float32)
        head_groups(x, weight, logits, entry, pdl, early).merge(logits, v, out, pdl)
    return out


def head_groups(
    x: Tensor, weight: Weight, logits: Tensor | None, entry: tables.LinearEntry | None, pdl: bool = False,
    early: bool = True,
) -> Groups:  # fmt: skip
    """The first of the two launches: every group of the vocabulary, not yet merged. logits [T, V] fp32: takes
    them."""
    rows, (n, e) = x.shape[0], weight.shape
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    assert x.stride(1) == 1, x.stride()
    entry = entry or head_entry(n, e, x.dtype, tables.device_key(x.device))
    tile = entry.tile(rows)
    assert tile.block_n % GROUP == 0, tile
    groups = Groups.new(rows, n, tile.block_n, x.device)
    # what fills the pipeline: more, of all programs that wait, would not fit in L2
    prefetch = tile.stages * entry.block_k if weight.can_prefetch and early else 0
    _head_kernel[(triton.cdiv(n, tile.block_n) * triton.cdiv(rows, tile.block_t),)](
        x=x, sx_t=x.stride(0) if rows > 1 else e, w=weight.pointer, sw_n=weight.row_stride,
        logits=logits, best=groups.best, sums=groups.sums, T=rows, N=n, K=e,
        prefetch=prefetch, SEGMENTS=entry.segments, EVEN_K=e % entry.block_k == 0, STORE=logits is not None,
        GROUP=GROUP, PDL=pdl, BLOCK_N=tile.block_n, BLOCK_T=tile.block_t, BLOCK_K=entry.block_k,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages, **launch_options(pdl and early),
    )  # fmt: skip
    return groups


def _check_shapes(x: Tensor, weight: Weight) -> None:
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"head: x {tuple(x.shape)} and weight {weight.shape} do not fit together")


def head(x: Tensor, weight: Weight, k: int = 1) -> Summary:
    """(logits [T, k] fp32, ids [T, k] int64, likeliest first, log-sum-exp [T] fp32) of x [T, E], weight
    [V, E].

    Ties go to the lowest id. Raises ValueError when shapes disagree or k is not in 1..V."""
    _check_shapes(x, weight)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"head: k is {k}, the vocabulary has {weight.shape[0]} tokens")
    logits = linear(x, weight, out_dtype=torch.float32)
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k], log_sum_exp(logits)
