"""Rows as codes of 8 bits with a scale for every 128 columns: what linears with W8A8 weights multiply.

    s[t, g] = max |x[t, k]| over k in g, divided by 448 in fp32; 1 where that is 0
    code[t, k] = x[t, k] / s[t, g], to the nearest e4m3, to even

g is a group of 128 columns. Both divisions are IEEE's. In a group with a NaN or an infinity that number has
the code of NaN, so that all that is multiplied by the row is NaN. Codes and scale of a row depend on that row
alone. The kernel is in quantise_rows.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128  # columns that share a scale
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Rows [T, K] as codes; it answers as a tensor of rows does where linears ask."""

    codes: Tensor  # float8_e4m3fn [T, K], columns contiguous
    scale: Tensor  # fp32 [K / GROUP, T], rows contiguous: a tile of rows reads neighbours
    dtype: torch.dtype  # of the rows that they stand for

    @property
    def shape(self) -> torch.Size:
        """(T, K)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    def stride(self, dimension: int) -> int:
        """Of the codes."""
        return self.codes.stride(dimension)

    def __getitem__(self, rows: slice) -> CodedRows:
        """Some of the rows."""
        return CodedRows(self.codes[rows], self.scale[:, rows], self.dtype)


Rows = Tensor | CodedRows


def quantise_rows(x: Tensor) -> CodedRows:
    """Codes and scales of rows x [T, K]. Raises ValueError where K is no multiple of 128."""
    check_columns(x)
    groups = x.float().unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    scale = largest / torch.full_like(largest, LARGEST)  # IEEE: by a number would be times 1 / 448
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (groups / scale[..., None]).to(torch.float8_e4m3fn).flatten(1)
    return CodedRows(codes, scale.t().contiguous(), x.dtype)


def check_columns(x: Tensor) -> None:
    """Raises ValueError unless rows are groups of columns."""
    if x.dim() != 2 or x.shape[1] % GROUP:
        raise ValueError(f"rows {tuple(x.shape)}: a multiple of {GROUP} columns was expected")
