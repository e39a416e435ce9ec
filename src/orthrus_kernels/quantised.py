"""A quantised weight: the matrix [N, K] as codes of 8 or 4 bits, a scale for every group of columns of a row.

What a product with it is, for every format, on every device:

    y[t, n] = sum over groups g of  scale[n, g] * (sum over k in g of value(code[n, k]) * x[t, k])

value(code) is exact in bf16, so that codes enter a tensor core as they are; scales multiply sums of groups in
fp32, by `fma(sum of the group, scale, sum so far)`. No weight is ever rounded. Segments of a reduction class
(linear.py) are cut at groups.

Codes lie in int32 **words**, in the order in which a thread of a tensor core takes them (the words of a row
follow one another):

- E4M3, 4 codes a word: byte 2 h + b of word 4 g + t is column 16 g + 8 h + 2 t + b (t < 4; h, b < 2);
- INT4, 8 codes a word: nibble 4 b + 2 s + h of word 4 g + t is column 32 g + 16 s + 8 h + 2 t + b.

So a row of x meets its columns in the order that a dense weight has, whatever the words look like."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

GROUPS = (32, 64, 128)  # columns that may share a scale
SYMMETRIC = 8  # the zero point of INT4 codes that come without one


class Format(Enum):
    """What a code stands for."""

    E4M3 = "fp8"  # float8_e4m3fn; codes 0x7f and 0xff (NaN) do not occur
    INT4 = "int4"  # 0 .. 15, minus the zero point of its group

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self is Format.E4M3 else 4


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """Codes [N, K] with scales, on any device; it multiplies rows of `dtype`. K is a multiple of the group.

    A part of it, such as the key projection in a stack of three, is filled by `put`."""

    format: Format
    group: int  # one of GROUPS
    words: Tensor  # int32 [N, K * bits / 32]
    scale: Tensor  # [K / group, N] fp32, bf16 or fp16, as stored in the checkpoint
    zero: Tensor | None  # uint8 [K / group, N], INT4 alone; None: SYMMETRIC everywhere
    dtype: torch.dtype  # of the rows that it multiplies

    @staticmethod
    def new(
        n: int, k: int, format: Format, group: int, *, zeros: bool, scale: torch.dtype, dtype: torch.dtype,
        device: torch.device | str,
    ) -> QuantisedWeight:  # fmt: skip
        """Memory for a weight [n, k], not filled in. zeros: INT4 with a zero point a group.

        Raises ValueError where k is no multiple of the group, or the group is none of GROUPS."""
        if group not in GROUPS or k % group or (zeros and format is not Format.INT4):
            raise ValueError(f"{format.value} of {k} columns in groups of {group}: expected one of {GROUPS}")
        words = torch.empty(n, k * format.bits // 32, dtype=torch.int32, device=device)
        by_group = k // group, n
        zero = torch.empty(by_group, dtype=torch.uint8, device=device) if zeros else None
        scales = torch.empty(by_group, dtype=scale, device=device)
        return QuantisedWeight(format, group, words, scales, zero, dtype)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.words), self.words.shape[1] * 32 // self.format.bits

    @property
    def nbytes(self) -> int:
        """Bytes that a product with it reads."""
        return self.words.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def put(self, first: int, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> None:
        """Fill rows from `first` on: codes uint8 [n, K], scale [n, K / group], zero uint8 [n, K / group], on
        any device; scales are cast to the weight's dtype of scales."""
        rows = slice(first, first + len(codes))
        assert codes.dtype == torch.uint8 and codes.shape[1] == self.shape[1], (codes.dtype, codes.shape)
        assert scale.shape == (len(codes), len(self.scale)), (scale.shape, self.scale.shape)
        assert (zero is None) == (self.zero is None), "zero points where the weight has them, and only there"
        self.words[rows] = packed(codes.to(self.words.device), self.format)
        self.scale[:, rows] = scale.to(self.scale.device).t().to(self.scale.dtype)
        if self.zero is not None and zero is not None:
            self.zero[:, rows] = zero.to(self.zero.device).t()

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return unpacked(self.words, self.format)

    def values(self) -> Tensor:
        """What its codes stand for before they are scaled, exactly: fp32 [N, K]."""
        codes = self.codes()
        if self.format is Format.E4M3:
            return codes.view(torch.float8_e4m3fn).float()
        if self.zero is None:
            return codes.float() - SYMMETRIC
        return codes.float() - self.zero.t().repeat_interleave(self.group, 1).float()

    def dense(self) -> Tensor:
        """Its numbers rounded to `dtype`, [N, K]: for comparison alone, since no product rounds them."""
        return (self.values() * self.scale.t().float().repeat_interleave(self.group, 1)).to(self.dtype)


def packed(codes: Tensor, format: Format) -> Tensor:
    """Words int32 [N, K * bits / 32] of codes uint8 [N, K]."""
    n, bits = len(codes), format.bits
    if format is Format.E4M3:
        order = codes.view(n, -1, 2, 4, 2).permute(0, 1, 3, 2, 4)  # step, half, t, b -> step, t, half, b
    else:
        order = codes.view(n, -1, 2, 2, 4, 2).permute(0, 1, 4, 5, 2, 3)  # -> step, t, b, s, half
    fields = order.reshape(n, -1, 32 // bits).long()
    shifts = torch.arange(0, 32, bits, device=codes.device)
    words = (fields << shifts).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def unpacked(words: Tensor, format: Format) -> Tensor:
    """Codes uint8 [N, K] of words."""
    n, bits = len(words), format.bits
    shifts = torch.arange(0, 32, bits, device=words.device)
    fields = (words.long()[..., None] >> shifts & (1 << bits) - 1).to(torch.uint8)
    if format is Format.E4M3:
        order = fields.view(n, -1, 4, 2, 2).permute(0, 1, 3, 2, 4)
    else:
        order = fields.view(n, -1, 4, 2, 2, 2).permute(0, 1, 4, 5, 2, 3)
    return order.reshape(n, -1)
