"""RMSNorm: y = round(x / sqrt(mean(x^2) + eps)) * w, over the last dimension.

Sum and root in fp32; the normalised row is rounded to x's dtype before the weight multiplies it, and the
product is rounded again: the order of Hugging Face's Qwen3. Also serves the per-head norms of q and k (last
dimension D). `add_rms_norm` first adds a layer's output to the residual stream, rounded to its dtype: one
launch in place of two, the same bits. Moves each tensor once.

A dependent launch (pdl.py) loads its weight before it waits: no kernel of a pass writes weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .pdl import launch_dependents, launch_options, wait
from .rows import NO_CONTRACTION, block_and_warps, check_weights, new_rows, row_stride
from .tiles import by_row_tile


def _launch_metadata(grid, kernel, args):
    """Name and bytes for Triton's profiler."""
    element, rows, e = args["x"].element_size(), grid[0], args["E"]
    return {"name": f"rms_norm_{rows}x{e}", "bytes": rows * e * element * (4 if args["ADD"] else 2)}


@triton.jit(do_not_specialize=["first_diff"], launch_metadata=_launch_metadata)
def _rms_norm_kernel(
    x, sx_r, residual, sr_r, weight, weight_diff, y, sy_r, total, st_r,
    first_diff, eps,
    E: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program r: row r; rows from first_diff on are multiplied by weight_diff."""
    i_r = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < E
    b_w = tl.load(tl.where(i_r < first_diff, weight, weight_diff) + o_e, mask=m_e, other=0.0).to(tl.float32)
    if PDL:
        wait()  # x, residual, y and total may be in use until here
        launch_dependents()
    b_x = tl.load(x + i_r * sx_r + o_e, mask=m_e, other=0.0).to(tl.float32)
    if ADD:
        b_r = tl.load(residual + i_r * sr_r + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_sum = (b_x + b_r).to(total.dtype.element_ty)
        tl.store(total + i_r * st_r + o_e, b_sum, mask=m_e)
        b_x = b_sum.to(tl.float32)
    scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / E + eps)
    b_unit = (b_x * scale).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + i_r * sy_r + o_e, (b_unit * b_w).to(y.dtype.element_ty), mask=m_e)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, weight_diff: Tensor | None, n_ar: int | None,
    eps: float, y: Tensor, total: Tensor | None, pdl: bool,
) -> None:  # fmt: skip
    """Normalise x [T, ..., E], plus residual when there is one, into y; the sum into total."""
    if x.numel() == 0:
        return
    e = x.shape[-1]
    rows = x.numel() // e
    weight_diff = weight if weight_diff is None else weight_diff
    first_diff = rows if n_ar is None else n_ar * (rows // x.shape[0])
    check_weights(e, weight, weight_diff)
    assert x.dtype == y.dtype == weight.dtype == weight_diff.dtype, (x.dtype, y.dtype, weight.dtype)
    assert x.shape == y.shape, (x.shape, y.shape)
    x, y = x.view(-1, e), y.view(-1, e)
    add = residual is not None
    residual, total = (x if t is None else t.view(-1, e) for t in (residual, total))
    block, warps = block_and_warps(e)
    _rms_norm_kernel[(rows,)](
        x=x, sx_r=row_stride(x, e), residual=residual, sr_r=row_stride(residual, e), weight=weight,
        weight_diff=weight_diff, y=y, sy_r=row_stride(y, e), total=total, st_r=row_stride(total, e),
        first_diff=first_diff, eps=eps, E=e, ADD=add, PDL=pdl, BLOCK_E=block, num_warps=warps,
        **NO_CONTRACTION, **launch_options(pdl),
    )  # fmt: skip


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_diff: Tensor | None = None,
    n_ar: int | None = None,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """`rms_norm` as one Triton launch, a program a row (a head, when x has heads). x can be viewed as
    rows. pdl: as a dependent launch (pdl.py)."""
    out = new_rows(x, *x.shape) if out is None else out
    _launch(x, None, weight, weight_diff, n_ar, eps, out, None, pdl)
    return out


def add_rms_norm_triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` as one Triton launch. The sum may be written over x or residual, never the norm. pdl: as
    a dependent launch (pdl.py)."""
    normed, total = out or (new_rows(x, *x.shape), torch.empty_like(x))
    _launch(x, residual, weight, None, None, eps, normed, total, pdl)
    return normed, total


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, weight_diff: Tensor | None = None, n_ar: int | None = None
) -> Tensor:
    """Normalise x [T, ..., E] by weight [E]; rows from n_ar on by `weight_diff` when it is given. Returns x's
    shape and dtype.
    """

    def normalise(tile: Tensor) -> Tensor:
        wide = tile.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    unit = by_row_tile(normalise, x)
    if weight_diff is None or n_ar is None or n_ar == x.shape[0]:
        return unit * weight
    return torch.cat([unit[:n_ar] * weight, unit[n_ar:] * weight_diff])


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): a layer's output x and the residual stream, both [T, E]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
