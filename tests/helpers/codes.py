"""Quantised weights of random codes, and what a product with one is in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from orthrus_kernels.quantised import Format, QuantisedWeight


class Coding(NamedTuple):
    """What random weights are made of."""

    format: Format
    group: int
    zeros: bool
    scale: torch.dtype
    factor_rows: int = 1
    rounds: bool = False


# Each group and each dtype of scales once with each format; fp8 by block, as Qwen's, and by row.
SCHEMES = [
    Coding(Format.E4M3, 128, False, torch.bfloat16, 128),
    Coding(Format.E4M3, 32, False, torch.float32),
    Coding(Format.INT4, 64, True, torch.float16),
    Coding(Format.INT4, 32, False, torch.float32),
    Coding(Format.INT4, 128, True, torch.bfloat16),
]
ROUNDED = Coding(Format.E4M3, 128, False, torch.bfloat16, 128, True)  # W8A8


def name_of(scheme: Coding) -> str:
    format, group, zeros, scale, rows, rounds = scheme
    kind = f"{format.value}-{group}{'-zeros' * zeros}-{str(scale).removeprefix('torch.')}"
    return kind + "-blocks" * (rows > 1) + "-rounds" * rounds


def numbers_of(format: Format) -> Tensor:
    """Every code of a format, uint8."""
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    return codes[codes & 0x7F != 0x7F] if format is Format.E4M3 else codes


def random_weight(
    scheme: Coding, n: int, k: int, device="cpu", seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> QuantisedWeight:
    """Codes of every size; scales from 2^-6 to 2^6."""
    format, group, zeros, of_scales, rows, rounds = scheme
    g = torch.Generator().manual_seed(seed)
    known = numbers_of(format)
    codes = known[torch.randint(len(known), (n, k), generator=g)]
    scale = torch.exp2(12 * torch.rand(-(-n // rows), k // group, generator=g) - 6)
    zero = torch.randint(17, (n, k // group), generator=g).to(torch.uint8) if zeros else None
    weight = QuantisedWeight.new(
        n, k, format, group, zeros=zeros, scale=of_scales, dtype=dtype, device=device, factor_rows=rows,
        rounds=rounds,
    )  # fmt: skip
    weight.put(0, codes, scale.repeat_interleave(rows, 0)[:n], zero)
    return weight


def exact(weight: QuantisedWeight) -> Tensor:
    """Its numbers without any rounding, fp64 [N, K]."""
    return weight.values().double() * weight.scale.double().t().repeat_interleave(weight.group, 1)


def fold(device="cpu") -> tuple[Tensor, QuantisedWeight, float]:
    """(row, weight, their product) where the product of a scale and a sum does not fit in fp32: a second
    rounding would make it 0."""
    one, small = 1.0, 2.0**-12
    weight = QuantisedWeight.new(
        1, 64, Format.E4M3, 32, zeros=False, scale=torch.float32, dtype=torch.bfloat16, device=device
    )
    codes, x = torch.full((1, 64), 0x38, dtype=torch.uint8), torch.zeros(1, 64)  # 0x38 is 1
    codes[:, :32] = 0xB8
    x[0, 0], x[0, 1] = one, 2 * small  # the first group: -(1 + 2^-11)
    x[0, 32], x[0, 33] = one, small  # the second: (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24
    weight.put(0, codes, torch.tensor([[one, one + small]]))
    return x.to(device, torch.bfloat16), weight, 2.0**-24
