"""Programmatic dependent launch (PDL): a kernel's CTAs start while the kernel before it still runs.

A launcher's `pdl=True` compiles the two calls below into its kernel and launches it with `launch_pdl=True`.

Why no kernel reads what is not yet written. `wait` returns when the grid in front has completed and its
writes are visible. **Every program calls it, before its first read or write of memory that any kernel of the
pass touches**, and before any early return: then a grid completes only after the grid in front of it, so all
earlier kernels are complete too, by induction back to the last ordinary launch, which had itself waited for
everything. A single program that left without waiting would break the chain only if all of its grid did; the
rule is for every program, so that nobody has to count. An ordinary launch between two dependent ones holds by
the order of the stream: it starts when the grid in front has completed, and so may even carry the two calls
(`wait` returns at once): it then lets the next one start early without starting early itself.

What may come before `wait`: indices; loads of weights, which no kernel of a pass writes (write weights, then
synchronise or launch anything ordinary); prefetches into L2, which is where writes become visible and so
never holds a stale line. Tables of a pass, rotary angles and tokens are written by copies and kernels of the
same pass: never. tests/kernels/test_pdl.py reads the compiled code for that.

`launch_dependents` lets the next kernel start once every program of this one has called it or ended. So
programs that wait never keep out programs that they wait for: those are all running by then. **Small kernels
call it behind their wait**, when the linear in front of them has ended: the linear behind them then starts
while they run, on multiprocessors that are free, and reads weights. Called at once it lets that linear start
while the one in front still needs its place, and all get slower (bench/LOG.md). Linears call it at once, as
what comes behind them is small; but for the gate and up projections with SwiGLU, which a linear follows and
which call it when their sums are done. (The two launches of a linear that takes the views apart are next to
each other all the same: not measured otherwise.) In Gluon all call it at once, since a program fills a
multiprocessor; one warp of it copies and waits, and every other one waits for the rows that this warp copies
behind its wait (gluon_ring.py).

GPUs from sm_90 on; elsewhere, and in the interpreter, nothing is launched so (`pdl_supported`)."""

from __future__ import annotations

import torch

from . import tables
from ._triton import tl, triton, triton_interprets

# Kinds of operations (backends.py) that a model launches as dependent ones where the device can: at 1 row
# 0.97 of the time without for 8B, 0.94 for 1.7B (H100, bench/LOG.md, 2026-11-26).
PDL: frozenset[str] = frozenset({"rowwise", "attention", "linear"})


def pdl_supported(device: torch.device) -> bool:
    """Whether kernels on this device may be launched with `launch_pdl=True`."""
    kind, _, arch = tables.device_key(device).partition("_")
    return not triton_interprets() and kind == "sm" and int(arch) >= 90


def pdl_kinds(device: torch.device) -> frozenset[str]:
    """What a model on this device launches as dependent launches, unless it is told otherwise."""
    return PDL if pdl_supported(device) else frozenset()


def launch_options(pdl: bool) -> dict[str, bool]:
    """The launch option of a dependent launch; nothing otherwise, as other GPUs do not know it."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def launch_dependents():
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait():
    tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_to_l2(p):
    """Ask L2 for the cache line of each pointer of p."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
