"""Where the time of a cycle goes: marks of the GPU's clock, made by kernels that run anyway, or by twins of
the host's."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ._triton import tl, triton, triton_interprets


@triton.jit
def mark(clock, i):
    """The low 32 bits of the time in ns to clock[i]; they come again every 4.3 s."""
    tl.store(clock + i, tl.extra.cuda.globaltimer().to(tl.int32))


def mark_here(places: Tensor) -> None:
    """The twin of `mark`: the host's time to all places of a tensor on the CPU."""
    low = time.perf_counter_ns() & 0xFFFFFFFF
    places.fill_((low ^ 0x80000000) - 0x80000000)


def has_clock(device: torch.device) -> bool:
    """Whether kernels on this device can read it: compiled ones, on an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.hip is None and not triton_interprets()


def seconds_between(first: int, second: int) -> float:
    """Of two marks less than 4 s apart."""
    return ((second - first) & 0xFFFFFFFF) * 1e-9
