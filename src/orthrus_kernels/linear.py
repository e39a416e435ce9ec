"""Linear layer over the rows of both views: y = x W^T, AR rows by W and diffusion rows by W_diff.

Shapes: x [T, K], weight and weight_diff [N, K], y [T, N]. Products and sums in fp32, rounded once to
`out_dtype`. The kernel is in linear_triton.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .tiles import by_row_tile


def check_shapes(x: Tensor, weight: Tensor, weight_diff: Tensor | None) -> None:
    """Raises ValueError when x [T, K] and the weights [N, K] do not fit together."""
    if x.shape[1] != weight.shape[1] or (weight_diff is not None and weight_diff.shape != weight.shape):
        raise ValueError(
            f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, weight_diff "
            f"{None if weight_diff is None else tuple(weight_diff.shape)} do not fit together"
        )


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
    check_shapes(x, weight, weight_diff)
    out_dtype = out_dtype or x.dtype

    def one_view(rows: Tensor, w: Tensor) -> Tensor:
        wide = w.float().t()
        return by_row_tile(lambda tile: (tile.float() @ wide).to(out_dtype), rows)

    return by_view(one_view, x, weight, weight_diff, n_ar)


def by_view(
    one_view: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    weight_diff: Tensor | None,
    n_ar: int | None,
) -> Tensor:
    """one_view(rows, their weight) of the AR rows [0, n_ar) and of the diffusion rows behind them, [T, N]; of
    all rows by `weight` where there is one weight only.
    """
    if weight_diff is None or n_ar is None or n_ar == len(x):
        return one_view(x, weight)
    if n_ar == 0:
        return one_view(x, weight_diff)
    return torch.cat([one_view(x[:n_ar], weight), one_view(x[n_ar:], weight_diff)])
