"""Where the time of a pass goes: torch.profiler over replays, kernel by kernel, and the gaps between them.

A kernel's time is what it adds: from the end of all before it, or its start if that is later, to its own end.
With dependent launches (orthrus_kernels/pdl.py) a kernel starts, and waits, while those before it run."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

GROUPS = ("linears", "head", "attention", "norms", "the rest")
GAPS = "gaps"
# A kernel belongs to the first group one of whose words its name holds. cuBLAS's kernels are nvjet, gemm,
# gemv or split-K reductions; torch's attention is flash, fmha or cuDNN's.
_WORDS = (
    ("head", ("_head_kernel", "_logits_kernel", "_merge_kernel")),
    ("attention", ("_partial_kernel", "_combine_kernel", "_path_kernel", "_whole_kernel", "attention",
                   "flash", "fmha", "cudnn")),
    ("linears", ("linear", "nvjet", "gemm", "gemv", "cutlass", "splitk")),
    ("norms", ("norm",)),
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """One kernel or copy on the GPU; start and end in µs."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a pass. share: of the pass from its first kernel's start to its last
    one's end."""

    name: str
    group: str
    count: float  # a pass
    us: float  # a pass, what they add
    share: float


@dataclass(frozen=True)
class StepProfile:
    """A pass under the profiler, which itself costs a little: compare shares, not µs."""

    kernels: list[Kernel]  # the longest first
    us: float  # median from a pass's first start to its last end
    gaps_us: float  # median of the time in which nothing ran

    def groups(self) -> dict[str, float]:
        """µs a pass by group, gaps last."""
        sums = {g: sum(k.us for k in self.kernels if k.group == g) for g in GROUPS}
        return sums | {GAPS: self.gaps_us}


def record(call: Callable[[], Any], passes: int, on: DeviceType = DeviceType.CUDA) -> list[Span]:
    """What runs on a device in `passes` calls, by start."""
    gpu = on == DeviceType.CUDA
    # a second profile of graphs crashes after CUPTI was torn down; torch sets these for its own graphs only
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(passes):
            call()
        if gpu:
            torch.cuda.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == on and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(spans, key=lambda span: span.start)


def step_profile(spans: Sequence[Span], passes: int) -> StepProfile:
    """From the spans of `passes` equal passes, by start. Raises ValueError when they cannot be told apart."""
    if not spans or len(spans) % passes:
        raise ValueError(f"the profiler saw {len(spans)} kernels in {passes} equal passes")
    size = len(spans) // passes
    extents, gaps, times = [], [], dict[tuple[str, str], list[float]]()
    for first in range(0, len(spans), size):
        part = spans[first : first + size]
        extents.append(max(s.end for s in part) - part[0].start)
        added = _added(part)
        gaps.append(extents[-1] - sum(added))
        for span, group, us in zip(part, _groups(part), added, strict=True):
            times.setdefault((_short(span.name), group), []).append(us)
    extent = statistics.median(extents)
    kernels = [
        Kernel(name, group, len(t) / passes, sum(t) / passes, sum(t) / passes / extent)
        for (name, group), t in times.items()
    ]
    return StepProfile(sorted(kernels, key=lambda k: -k.us), extent, statistics.median(gaps))


def _added(part: Sequence[Span]) -> list[float]:
    """What each span adds to the time in which at least one of them ran, in the order of their ends: a kernel
    that waits for another ends after it, and may well have started first."""
    added, until = [0.0] * len(part), part[0].start
    for i in sorted(range(len(part)), key=lambda i: part[i].end):
        added[i] = max(part[i].end - max(part[i].start, until), 0.0)
        until = max(until, part[i].end)
    return added


def _groups(part: Sequence[Span]) -> list[str]:
    """The group of each kernel of a pass. The last linear of a pass is its head, unless the head has a kernel
    of its own."""
    found = [_group(span.name) for span in part]
    linears = [i for i, group in enumerate(found) if group == "linears"]
    if linears and "head" not in found:
        found[linears[-1]] = "head"
    return found


def _group(name: str) -> str:
    low = name.lower()
    return next((group for group, words in _WORDS if any(word in low for word in words)), "the rest")


def _short(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"[<(].*", "", plain)[:60] or name[:60]
