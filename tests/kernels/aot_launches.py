"""Every launch that aot.py compiles: (case, module, kernel, launcher call, targets)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from orthrus_kernels import linear as linear_op  # noqa: F401
from orthrus_kernels import tables

linear_module = sys.modules["orthrus_kernels.linear"]

Launch = tuple[str, ModuleType, str, Callable[[], object], tuple[str, ...]]
HOPPER = ("sm_90",)
ALL = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def linears() -> Iterator[Launch]:
    """Every tile of every entry of the table and of the defaults, once for equal launches."""
    seen = set()
    weights = [(n, k, dtype, entry) for (n, k, dtype, _), entry in tables.linear_entries().items()] + [
        (n, k, dtype, tables.default_entry(n, k, dtype))
        for n, k in ((151936, 4096), (4096, 4096), (2048, 6144), (2048, 2048))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    for n, k, dtype, entry in weights:
        for tile in entry.tiles:
            key = entry.block_k, entry.segments, tile.split and entry.segments > 1, tile, dtype
            if key in seen:
                continue
            seen.add(key)
            rows = tile.rows or 512

            def launch(n=n, k=k, dtype=dtype, entry=entry, rows=rows):
                space = linear_module.Workspace.new(torch.device("meta"), 1 << 28, 1 << 20)
                w = meta(n, k, dtype=dtype)
                linear_module.linear_triton(
                    meta(2 * rows, k, dtype=dtype), w, w, rows, entry=entry, space=space
                )

            name = f"{n}x{k} {dtype} rows {rows} segments {entry.segments} tile {tile}"
            yield name, linear_module, "_linear_kernel", launch, HOPPER


def launches() -> Iterator[Launch]:
    yield from linears()
