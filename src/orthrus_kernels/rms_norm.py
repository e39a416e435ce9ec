"""RMSNorm: y = round(x / sqrt(mean(x^2) + eps)) * w, over the last dimension.

Sum and root in fp32; the normalised row is rounded to x's dtype before the weight multiplies it, and the
product is rounded again: the order of Hugging Face's Qwen3. Also serves the per-head norms of q and k (last
dimension D)."""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import by_row_tile


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
