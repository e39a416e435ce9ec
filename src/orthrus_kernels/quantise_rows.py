"""`quantise_rows` (coded_rows.py) as a kernel. Of a row it moves K numbers of 16 bits, K codes and K / 128
scales.

It rounds by the bits of fp32, since GPUs before sm_89 have no instruction for it and the interpreter rounds
otherwise: e4m3 has 3 bits of fraction, and below 2^-6 steps of 2^-9."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .coded_rows import GROUP, LARGEST, CodedRows, check_columns
from .pdl import launch_dependents, launch_options, wait
from .rows import NO_CONTRACTION, SPARE_ROWS, new_rows

_LARGEST, _GROUP = tl.constexpr(LARGEST), tl.constexpr(GROUP)
_GROUPS = 8  # of a program: 16 numbers a thread at 2 warps


@triton.jit
def e4m3_code(v):
    """The code of |v| <= 448 (1 + 1/64), fp32, to nearest even: int32 0 .. 0xff; of all else that of NaN."""
    bits = v.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) >> 20) - ((127 - 7) << 3)
    step = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF  # ulp: 2^-9
    code = tl.where(size < 0x3C800000, step, normal)  # 2^-6
    code = tl.where(size < 0x43E80000, code, 0x7F)  # 464
    return code | ((bits >> 24) & 0x80)


@triton.jit
def group_scale(largest):
    """s of the largest magnitudes of groups."""
    s = tl.div_rn(largest, tl.full(largest.shape, _LARGEST, tl.float32))
    return tl.where(s == 0, 1.0, s)


def _launch_metadata(grid, kernel, args):
    """Name and bytes for Triton's profiler."""
    rows, k = grid[0], args["K"]
    each = k * (args["x"].element_size() + 1) + k // 32
    return {"name": f"quantise_rows_{rows}x{k}", "bytes": rows * each}


@triton.jit(launch_metadata=_launch_metadata)
def _quantise_rows_kernel(x, sx_t, codes, sc_t, scale, ss_g, K, PDL: tl.constexpr, GROUPS: tl.constexpr):
    """Program (t, i): groups [i GROUPS, (i + 1) GROUPS) of row t."""
    i_t = tl.program_id(0).to(tl.int64)
    o_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    o_k = o_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    m_k = o_k < K
    if PDL:
        wait()  # x, codes and scale may be in use until here
        launch_dependents()
    b_x = tl.load(x + i_t * sx_t + o_k, mask=m_k, other=0.0).to(tl.float32)
    # A NaN is the largest of all by its bits, which are whole numbers: tl.max of floats would pass it over.
    largest = tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    s = group_scale(largest)
    code = e4m3_code(tl.div_rn(b_x, tl.broadcast_to(s[:, None], b_x.shape)))
    tl.store(codes + i_t * sc_t + o_k, code.to(tl.uint8), mask=m_k)
    tl.store(scale + o_g.to(tl.int64) * ss_g + i_t, s, mask=o_g * _GROUP < K)


def quantise_rows_triton(x: Tensor, *, pdl: bool = False) -> CodedRows:
    """`quantise_rows` as one Triton launch; columns of x are contiguous. pdl: as a dependent launch
    (pdl.py)."""
    rows, k = x.shape
    check_columns(x)
    assert x.stride(1) == 1, x.stride()
    codes = new_rows(x.new_empty(0, dtype=torch.uint8), rows, k)
    width = -(-(rows + SPARE_ROWS) // 16) * 16  # for TMA, which copies scales of a whole tile
    scale = x.new_empty(k // GROUP, width, dtype=torch.float32)[:, :rows]
    if rows:
        _quantise_rows_kernel[(rows, triton.cdiv(k // GROUP, _GROUPS))](
            x=x, sx_t=x.stride(0) if rows > 1 else k, codes=codes, sc_t=k, scale=scale, ss_g=width, K=k,
            PDL=pdl, GROUPS=_GROUPS, num_warps=2, **NO_CONTRACTION, **launch_options(pdl),
        )  # fmt: skip
    return CodedRows(codes.view(torch.float8_e4m3fn), scale, x.dtype)
