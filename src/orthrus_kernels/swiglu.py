"""SwiGLU: round(silu(gate)) * up, the rounding order of Hugging Face's Qwen3 (silu in fp32, rounded, product
rounded). Moves 3 F elements a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .pdl import launch_dependents, launch_options, wait
from .rows import NO_CONTRACTION, new_rows

BLOCK_F = 1024  # 8 numbers a thread at 4 warps: 16-byte loads in 16 bits


def _launch_metadata(grid, kernel, args):
    """Name and bytes for Triton's profiler."""
    return {
        "name": f"swiglu_{grid[0]}x{args['F']}",
        "bytes": 3 * grid[0] * args["F"] * args["gate_up"].element_size(),
    }


@triton.jit
def silu_times(gate, up, dtype: tl.constexpr):
    """Blocks of gate and up, fp32 that hold numbers of `dtype` -> round(silu(gate)) * up in `dtype`."""
    silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    return (silu * up).to(dtype)


@triton.jit(launch_metadata=_launch_metadata)
def _swiglu_kernel(gate_up, sg_t, y, sy_t, F, PDL: tl.constexpr, BLOCK_F: tl.constexpr):
    """Program (t, i): columns [i BLOCK_F, (i + 1) BLOCK_F) of row t."""
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    if PDL:
        wait()  # gate_up and y may be in use until here
        launch_dependents()
    gate = tl.load(gate_up + i_t * sg_t + o_f, mask=m_f, other=0.0).to(tl.float32)
    up = tl.load(gate_up + i_t * sg_t + F + o_f, mask=m_f, other=0.0).to(tl.float32)
    tl.store(y + i_t * sy_t + o_f, silu_times(gate, up, y.dtype.element_ty), mask=m_f)


def swiglu_triton(gate_up: Tensor, *, out: Tensor | None = None, pdl: bool = False) -> Tensor:
    """`swiglu` as one Triton launch; columns of gate_up and `out` [T, F] must be contiguous. pdl: as a
    dependent launch (pdl.py)."""
    rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = new_rows(gate_up, rows, f) if out is None else out
    assert out.shape == (rows, f) and out.dtype == gate_up.dtype, (out.shape, gate_up.shape, out.dtype)
    assert gate_up.stride(1) == out.stride(1) == 1, (gate_up.stride(), out.stride())
    if rows:
        _swiglu_kernel[(rows, -(-f // BLOCK_F))](
            gate_up=gate_up, sg_t=gate_up.stride(0) if rows > 1 else 2 * f, y=out,
            sy_t=out.stride(0) if rows > 1 else f, F=f, PDL=pdl, BLOCK_F=BLOCK_F, num_warps=4,
            **NO_CONTRACTION, **launch_options(pdl),
        )  # fmt: skip
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F]: the gate's F columns, then the up projection's. Returns [T, F] in the same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up
