"""Linear layer over the rows of both views: y = x W^T, AR rows by W and diffusion rows by W_diff.

Shapes: x [T, K], weight and weight_diff [N, K], y [T, N]. Products and sums in fp32, rounded once to
`out_dtype`."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import by_row_tile


def linear(
    x: Tensor,
    weight: Tensor,
    weight_diff: Tensor | None = None,
    n_ar: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply rows [0, n_ar) by `weight` and the rest by `weight_diff`; all rows by `weight` when that is
    None.

    Raises ValueError when shapes disagree or diffusion rows come without their weight.
    """
    if x.shape[1] != weight.shape[1] or (weight_diff is not None and weight_diff.shape != weight.shape):
        raise ValueError(
            f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, weight_diff "
            f"{None if weight_diff is None else tuple(weight_diff.shape)} do not fit together"
        )
    out_dtype = out_dtype or x.dtype
    if weight_diff is None or n_ar is None or n_ar == x.shape[0]:
        return _one_view(x, weight, out_dtype)
    if n_ar == 0:
        return _one_view(x, weight_diff, out_dtype)
    return torch.cat([_one_view(x[:n_ar], weight, out_dtype), _one_view(x[n_ar:], weight_diff, out_dtype)])


def _one_view(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(weight), dtype=out_dtype)
    w = weight.float().t()
    return by_row_tile(lambda tile: (tile.float() @ w).to(out_dtype), x)
