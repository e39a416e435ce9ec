"""A quantised weight: the matrix [N, K] as codes of 8 or 4 bits, a scale for every group of columns of a row.

What a product with it is, for every format, on every device:

    y[t, n] = sum over groups g of  scale[n, g] * (sum over k in g of value(code[n, k]) * x[t, k])

value(code) is exact in bf16, so that codes enter a tensor core as they are; scales multiply sums of groups in
fp32, by `fma(sum of the group, scale, sum so far)`. No weight is ever rounded. Segments of a reduction class
(linear.py) are cut at groups.

A weight of E4M3 in groups of 128 may also **round** its rows (W8A8): x becomes codes of 8 bits with a scale s
for each row and group (coded_rows.py), for every row that it multiplies, however many there are, and

    y[t, n] = sum over groups g of  (scale[n, g] * s[t, g])
                                      * (sum over k in g of value(code[n, k]) * value(code[t, k]))

by `fma(sum of the group, scale * s in fp32, sum so far)`. Products of codes are exact in fp32. Hopper's
tensor cores add those of 8 bits with some 13 bits of fraction, so that between a GPU and the twin a sum of a
group differs by about 2^-13 of its largest term; the bits of a row on a GPU do not depend on other rows.

Codes lie in int32 **words**, in the order in which a thread of a tensor core takes them (the words of a row
follow one another):

- E4M3, 4 codes a word: half b, of 16 bits, of word 4 g + t has columns 16 g + 8 h + 2 t + b (t < 4;
  h, b < 2). The column with h = 0 has its sign in bit 15 and the rest in bits 10 to 4, as a bf16 has them.
  The column with h = 1 has its sign in bit 11 and the rest in bits 14 to 12 and 3 to 0;
- E4M3 of a weight that rounds its rows: bytes in the order of columns, which is how wgmma takes 8 bits;
- INT4, 8 codes a word: nibble 4 b + 2 s + h of word 4 g + t is column 32 g + 16 s + 8 h + 2 t + b.

So neighbouring columns (b) are in the two halves of a word, as a pair of bf16 has them in a register. A row
of x meets its columns in the order that a dense weight has, whatever the words look like.

A group's scale lies in a **factor** of 32 bits: the scale in fp32, exactly, and where there are zero points
its lowest 7 bits are the zero point; scales of 16 bits leave them 0. Triton copies loads of 32 bits ahead of
their use, and makes smaller ones when they are used, which takes a trip to memory for each group.

Where a scale belongs to a block of 128 rows, they have one factor: `factor_rows` rows n share factor
n // factor_rows of a group. In this memory blocks begin at row 0 of the weight, whatever is stacked in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .coded_rows import GROUP, quantise_rows

GROUPS = (32, 64, 128)  # columns that may share a scale
FACTOR_ROWS = (1, 128)  # rows that may share a factor
LOWEST = 0x7F  # the bits of a factor that are a zero point
SYMMETRIC = 8  # the zero point of INT4 codes that come without one


class Format(Enum):
    """What a code stands for."""

    E4M3 = "fp8"  # float8_e4m3fn; codes 0x7f and 0xff (NaN) do not occur
    INT4 = "int4"  # 0 .. 15, minus the zero point of its group

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self is Format.E4M3 else 4


class Scheme(NamedTuple):
    """What a kernel is compiled for. Weights of one scheme may share a launch, dense ones have none."""

    format: Format
    group: int
    zeros: bool
    factor_rows: int = 1
    rounds: bool = False


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """Codes [N, K] with scales, on any device; it multiplies rows of `dtype`. K is a multiple of the group.

    A part of it, such as the key projection in a stack of three, is filled by `put`."""

    format: Format
    group: int  # one of GROUPS
    words: Tensor  # int32 [N, K * bits / 32]
    factors: Tensor  # int32 [K / group, ceil(N / factor_rows)]
    factor_rows: int  # one of FACTOR_ROWS
    zeros: bool  # whether factors have zero points, INT4 alone; else they are SYMMETRIC everywhere
    scale_dtype: torch.dtype  # that scales are rounded to: fp32, bf16 or fp16, as stored in the checkpoint
    dtype: torch.dtype  # of the rows that it multiplies
    rounds: bool = False  # whether it rounds them to codes first; E4M3 in groups of 128 alone

    @staticmethod
    def new(
        n: int, k: int, format: Format, group: int, *, zeros: bool, scale: torch.dtype, dtype: torch.dtype,
        device: torch.device | str, factor_rows: int = 1, rounds: bool = False,
    ) -> QuantisedWeight:  # fmt: skip
        """Memory for a weight [n, k], not filled in. zeros: INT4 with a zero point a group, beside scales of
        16 bits. factor_rows: how many rows share a scale, one of FACTOR_ROWS; without zero points.

        Raises ValueError where k is no multiple of the group, or the group is none of GROUPS."""
        if group not in GROUPS or k % group or (zeros and format is not Format.INT4):
            raise ValueError(f"{format.value} of {k} columns in groups of {group}: expected one of {GROUPS}")
        assert not (zeros and scale == torch.float32), "a factor has no room for both"
        assert not rounds or can_round(format, group), (format, group)
        assert factor_rows in FACTOR_ROWS and not (zeros and factor_rows > 1), factor_rows
        words = torch.empty(n, k * format.bits // 32, dtype=torch.int32, device=device)
        factors = torch.empty(k // group, -(-n // factor_rows), dtype=torch.int32, device=device)
        return QuantisedWeight(format, group, words, factors, factor_rows, zeros, scale, dtype, rounds)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.words), self.words.shape[1] * 32 // self.format.bits

    @property
    def nbytes(self) -> int:
        """Bytes that a product with it reads."""
        return self.words.nbytes + self.factors.nbytes

    def nbytes_of(self, rows: int) -> int:
        """Bytes of so many rows, of which the first begins a block."""
        blocks = -(-rows // self.factor_rows)
        return self.words[:rows].nbytes + self.factors[:, :blocks].nbytes

    @property
    def scale(self) -> Tensor:
        """fp32 [K / group, N]."""
        factors = self.factors & ~LOWEST if self.zeros else self.factors
        each = factors.view(torch.float32).repeat_interleave(self.factor_rows, 1)
        return each[:, : self.shape[0]]

    @property
    def zero(self) -> Tensor | None:
        """Zero points uint8 [K / group, N]; None: SYMMETRIC everywhere."""
        return (self.factors & LOWEST).to(torch.uint8) if self.zeros else None

    @cached_property
    def scheme(self) -> Scheme:
        """What a kernel is compiled for."""
        return Scheme(self.format, self.group, self.zeros, self.factor_rows, self.rounds)

    @property
    def pointer(self) -> Tensor:
        """What kernels take to load words, or codes where rows are codes too, and to prefetch them."""
        return self.words.view(torch.float8_e4m3fn) if self.rounds else self.words

    @property
    def codes_a_word(self) -> int:
        """Columns that one number at `pointer` holds."""
        return 1 if self.rounds else 32 // self.format.bits

    @property
    def row_stride(self) -> int:
        """Numbers at `pointer` between rows."""
        return self.pointer.shape[1]

    @property
    def describable(self) -> bool:
        """No kernel loads tiles of words by descriptors."""
        return False

    @property
    def can_prefetch(self) -> bool:
        """Whether rows are whole units of 16 bytes."""
        return self.words.shape[1] % 4 == 0

    def put(self, first: int, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> None:
        """Fill rows from `first` on: codes uint8 [n, K], scale [n, K / group], zero uint8 [n, K / group], on
        any device; scales are cast to the weight's dtype of scales. Rows that share a factor have one."""
        rows = slice(first, first + len(codes))
        assert codes.dtype == torch.uint8 and codes.shape[1] == self.shape[1], (codes.dtype, codes.shape)
        assert scale.shape == (len(codes), len(self.factors)), (scale.shape, self.factors.shape)
        assert (zero is not None) == self.zeros, "zero points where the weight has them, and only there"
        codes = codes.to(self.words.device)
        self.words[rows] = codes.view(torch.int32) if self.rounds else packed(codes, self.format)
        factors = scale.to(self.words.device).to(self.scale_dtype).float().view(torch.int32)
        if zero is not None:
            factors = factors | zero.to(self.words.device)
        blocks = torch.arange(rows.start, rows.stop, device=factors.device) // self.factor_rows
        self.factors[:, blocks] = factors.t()
        assert torch.equal(self.factors[:, blocks], factors.t()), "rows of a block have one scale"

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return self.words.view(torch.uint8) if self.rounds else unpacked(self.words, self.format)

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


def can_round(format: Format, group: int) -> bool:
    """Whether weights of codes like these may round their rows."""
    return format is Format.E4M3 and group == GROUP


def packed(codes: Tensor, format: Format) -> Tensor:
    """Words int32 [N, K * bits / 32] of codes uint8 [N, K]."""
    n = len(codes)
    if format is Format.E4M3:
        first, second = codes.reshape(n, -1, 2, 4, 2).short().unbind(2)  # step, h, t, b -> step, t, b
        fields = (first & 0x80) << 8 | (first & 0x7F) << 4
        fields |= (second & 0x80) << 4 | (second & 0x70) << 8 | second & 0x0F
    else:
        order = codes.reshape(n, -1, 2, 2, 4, 2).permute(
            0, 1, 4, 5, 2, 3
        )  # step, s, h, t, b -> step, t, b, s, h
        fields = order[..., 0] | order[..., 1] << 4
    return fields.reshape(n, -1).view(torch.int32)


def unpacked(words: Tensor, format: Format) -> Tensor:
    """Codes uint8 [N, K] of words."""
    n, fields = len(words), words.contiguous().view(torch.uint8)
    if format is Format.E4M3:
        halves = fields.view(torch.int16).view(n, -1, 4, 2)  # step, t, b
        first = halves >> 8 & 0x80 | halves >> 4 & 0x7F
        second = halves >> 4 & 0x80 | halves >> 8 & 0x70 | halves & 0x0F
        order = torch.stack((first, second), 2).to(torch.uint8)  # step, h, t, b
    else:
        nibbles = torch.stack((fields & 15, fields >> 4), -1)
        order = nibbles.view(n, -1, 4, 2, 2, 2).permute(0, 1, 4, 5, 2, 3)
    return order.reshape(n, -1)


def product_by_groups(weight: QuantisedWeight) -> Callable[[Tensor], Tensor]:
    """The product of the first paragraphs, plainly: rows fp32 [T, K] -> fp32 [T, N].

    In fp64 the product of two numbers of fp32 is exact, so that a fold of a group is `fma` on any CPU."""
    values = [group.t() for group in weight.values().split(weight.group, 1)]
    scales = weight.scale

    def product(x: Tensor) -> Tensor:
        factors: Iterable[Tensor] = scales
        if weight.rounds:
            coded = quantise_rows(x)
            x, pairs = coded.codes.float(), zip(coded.scale, scales, strict=True)
            factors = (s[:, None] * scale for s, scale in pairs)
        total = x.new_zeros(len(x), weight.shape[0])
        for columns, value, factor in zip(x.split(weight.group, 1), values, factors, strict=True):
            total = torch.add(total.double(), (columns @ value).double() * factor.double()).float()
        return total

    return product
