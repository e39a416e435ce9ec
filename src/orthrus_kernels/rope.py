"""Rotary position embedding (arXiv 2104.09864), half-split as in Qwen3, with YaRN scaling (arXiv 2309.00071).

A head (a, b) of two halves becomes (a cos - b sin, b cos + a sin). Angles, cosines, sines, products and sums
in fp32, one rounding at the end (Hugging Face rounds cosines and every product to bf16: the same numbers in
fp32, closer to exact in bf16)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class Yarn(Protocol):
    """The YaRN settings of a configuration; `qwen3_model.config.YarnScaling` is one."""

    @property
    def factor(self) -> float: ...
    @property
    def original_max_position_embeddings(self) -> int: ...
    @property
    def beta_fast(self) -> float: ...
    @property
    def beta_slow(self) -> float: ...
    @property
    def attention_factor(self) -> float | None: ...
    @property
    def truncate(self) -> bool: ...


def inverse_frequencies(head_dim: int, theta: float, yarn: Yarn | None = None) -> tuple[Tensor, float]:
    """Angle per position of each pair, [head_dim / 2] fp32 on the CPU, and the factor that scales cosine and
    sine.

    YaRN: pairs that turn more than `beta_fast` times over the original context keep their frequency, those
    that turn less than `beta_slow` times are slowed down by `factor`, the rest are blended linearly."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    periods = theta**exponents
    kept = 1.0 / periods
    if yarn is None:
        return kept, 1.0

    def pair_turning(times: float) -> float:
        """The (real-valued) pair index that turns `times` times over the original context."""
        return (
            head_dim
            * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(theta))
        )

    first, last = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # keeps the ramp finite
    kept_share = 1 - ((torch.arange(head_dim // 2).float() - first) / (last - first)).clamp(0, 1)
    slowed = 1.0 / (yarn.factor * periods)
    blended = (
        slowed * (1 - kept_share) + kept * kept_share
    )  # in this order an fp32 ulp, 40960 positions on, equals Hugging Face's
    if yarn.attention_factor is not None:
        return blended, yarn.attention_factor
    return blended, 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def cos_sin(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair at positions [T] (integers): two fp32 tensors [T, head_dim / 2]."""
    angles = positions.float()[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


def rope_table(positions: int, frequencies: Tensor, scale: float) -> Tensor:
    """`cos_sin` of positions 0, 1, ..., on the frequencies' device: [2, positions, head_dim / 2] fp32."""
    return torch.stack(cos_sin(torch.arange(positions, device=frequencies.device), frequencies, scale))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [T, H, D] by cos, sin [T, D/2]. Returns x's shape and dtype."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
