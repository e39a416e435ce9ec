"""Numbers to codes and scales, round to nearest: what `orthrus quantize` stores, and nothing of files.

Each function works on one matrix [N, K] of any float dtype, on any device, and its numbers must be finite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantised.forms import BLOCK

LARGEST_E4M3 = 448.0
LARGEST_INT4 = 15.0
# A scale is never zero, and never so small that a bf16 cannot hold it with all of its digits
SMALLEST = torch.finfo(torch.bfloat16).tiny
# Shares of a group's range that 4 bits are spread over. The best of them by mean square error is taken: the
# few numbers that it cuts off cost less than a finer step saves for all others.
RATIOS = tuple(1 - i / 40 for i in range(20))
ROWS = 512  # of a matrix are searched at a time, so that the memory of a search stays small


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [N, K] and scales bf16 [ceil(N / 128), ceil(K / 128)] of blocks of 128 x 128.

    A scale is the block's largest absolute number / 448, rounded up, so that no code stands for a number that
    was cut off."""
    n, k = weight.shape
    padded = F.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(len(padded) // BLOCK, BLOCK, -1, BLOCK)
    scale = rounded_up(blocks.abs().amax((1, 3)) / LARGEST_E4M3)
    codes = (blocks / scale.float()[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:n, :k].contiguous(), scale


def fp8_values(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers [N, K] fp32 that codes and scales of `fp8_blocks` stand for."""
    n, k = codes.shape
    each = scale.float().repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return codes.float() * each


def rounded_up(x: Tensor) -> Tensor:
    """fp32 numbers from 0 on as bf16, none smaller than it was and none below `SMALLEST`."""
    bits = x.clamp(min=SMALLEST).contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def int4_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K] in 0..15, scales bf16 and zero points uint8, both [N, K / group]: a number is
    (code - zero point) * scale. K is a multiple of the group."""
    parts = [_searched(rows, group) for rows in weight.split(ROWS)]
    codes, scale, zero = (torch.cat(column) for column in zip(*parts, strict=True))
    return codes, scale, zero


def int4_values(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The numbers [N, K] fp32 that codes, scales and zero points of `int4_groups` stand for."""
    groups = codes.float().view(*scale.shape, -1)
    return ((groups - zero.float()[..., None]) * scale.float()[..., None]).view(codes.shape)


def _searched(rows: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """`int4_groups` of some rows: every group takes the share of its range that errs least."""
    numbers = rows.float().view(len(rows), -1, group)
    low = numbers.amin(-1, keepdim=True).clamp(max=0)
    step = (numbers.amax(-1, keepdim=True).clamp(min=0) / LARGEST_INT4) - low / LARGEST_INT4
    best = _rounded(numbers, low, step, RATIOS[0])
    least = _error(numbers, *best)
    for ratio in RATIOS[1:]:
        found = _rounded(numbers, low, step, ratio)
        error = _error(numbers, *found)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    codes, scale, zero = best
    return codes.to(torch.uint8).view(rows.shape), scale[..., 0].bfloat16(), zero[..., 0].to(torch.uint8)


def _rounded(numbers: Tensor, low: Tensor, step: Tensor, ratio: float) -> tuple[Tensor, ...]:
    """Codes [N, G, group], scales and zero points [N, G, 1] in fp32 that spread a share of each range."""
    scale = (step * ratio).clamp(min=SMALLEST).bfloat16().float()
    zero = (low * -ratio / scale).round().clamp(0, LARGEST_INT4)
    return (numbers / scale).round().add(zero).clamp(0, LARGEST_INT4), scale, zero


def _error(numbers: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Summed square error of each group, [N, G, 1]."""
    return ((codes - zero) * scale - numbers).square().sum(-1, keepdim=True)
