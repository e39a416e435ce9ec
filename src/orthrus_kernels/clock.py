"""The GPU's clock, read inside kernels that run anyway: where the time of a captured cycle goes."""

from __future__ import annotations

import torch

from ._triton import tl, triton, triton_interprets


@triton.jit
def mark(clock, i):
    """The low 32 bits of the time in ns to clock[i]; they come again every 4.3 s."""
    tl.store(clock + i, tl.extra.cuda.globaltimer().to(tl.int32))


def has_clock(device: torch.device) -> bool:
    """Whether kernels on this device can read it: compiled ones, on an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.hip is None and not triton_interprets()


def seconds_between(first: int, second: int) -> float:
    """Of two marks less than 4 s apart."""
    return ((second - first) & 0xFFFFFFFF) * 1e-9
