"""How far a kernel may be from its fp64 definition on the same inputs, by output dtype, and why.

Two measures together: the largest error relative to the largest output, and the RMS error relative to the RMS
output. A wrong mask or index shows in the first, a lost accumulator digit in the second."""

from __future__ import annotations

import torch
from torch import Tensor

# (largest, RMS). fp32: sums of up to 1100 terms, each off by half an ulp (2^-24) of the running sum: 1e-6
# seen with massive channels. fp16 and bf16: roundings to the output's dtype, each at most 2^-11 or 2^-9 of a
# result, up to three in one operation; the RMS of one is about 0.29 ulp.
LIMITS = {
    torch.float32: (4e-6, 2e-6),
    torch.float16: (1.5e-3, 5e-4),
    torch.bfloat16: (1.2e-2, 4e-3),
}


def assert_close(got: Tensor, exact: Tensor) -> None:
    """`got` against the fp64 result `exact`."""
    exact = exact.to(got.device)
    assert got.shape == exact.shape, (got.shape, exact.shape)
    difference = got.double() - exact
    largest = (difference.abs().max() / exact.abs().max()).item()
    rms = (difference.square().mean().sqrt() / exact.square().mean().sqrt()).item()
    limits = LIMITS[got.dtype]
    assert largest <= limits[0] and rms <= limits[1], (largest, rms, limits)
