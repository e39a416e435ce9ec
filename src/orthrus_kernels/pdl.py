"""Programmatic dependent launch (PDL): a kernel's CTAs start while the kernel before it still runs.

A kernel launched with `launch_pdl=True` must call `wait` in every program before it reads or writes any
memory that an earlier kernel touches; all earlier kernels are complete, and their writes visible, when
`wait` returns, because each of them waited too. What comes before it costs nothing: indices, and prefetches
into L2, which is where writes become visible and so never holds a stale line. `launch_dependents` lets the
next kernel start once every program of this one has called it.

GPUs from sm_90 on; elsewhere, and in the interpreter, a launcher passes PDL = False."""

from __future__ import annotations

import torch

from . import tables
from ._triton import tl, triton


def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on this device may be launched with `launch_pdl=True`."""
    kind, _, arch = tables.device_key(device).partition("_")
    return kind == "sm" and int(arch) >= 90


@triton.jit
def launch_dependents():
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait():
    tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_to_l2(p, size):
    """Ask L2 for `size` bytes from each pointer of p; pointers and size must be multiples of 16."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [p.to(tl.int64), size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
