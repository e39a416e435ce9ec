"""Rows as codes of 8 bits with a scale for every 128 columns: what linears with W8A8 weights multiply.

    s[t, g] = max |x[t, k]| over k in g, divided by 448 in fp32; 1 where that is 0
    code[t, k] = x[t, k] / s[t, g], to the nearest e4m3, to even

g is a group of 128 columns. Both divisions are IEEE's. In a group with a NaN or an infinity that number has
the code of NaN, so that all that is multiplied by the row is NaN. Codes and scale of a row depend on that row
alone. Moves K numbers of 16 bits of a row, K codes and K / 128 scales.

The kernel rounds by the bits of fp32, as no GPU before sm_89 and no interpreter knows how to: e4m3 has 3 bits
of fraction, and below 2^-6 steps of 2^-9."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import tl, triton
from .pdl import launch_dependents, launch_options, wait
from .rows import NO_CONTRACTION, new_rows

GROUP = 128  # columns that share a scale
LARGEST = 448.0  # of e4m3
_LARGEST, _GROUP = tl.constexpr(LARGEST), tl.constexpr(GROUP)
_GROUPS = 8  # of a program: 16 numbers a thread at 2 warps


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Rows [T, K] as codes; it answers as a tensor of rows does where linears ask."""

    codes: Tensor  # float8_e4m3fn [T, K], columns contiguous
    scale: Tensor  # fp32 [K / GROUP, T], rows contiguous: a tile of rows reads neighbours
    dtype: torch.dtype  # of the rows that they stand for

    @property
    def shape(self) -> torch.Size:
        """(T, K)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    def stride(self, dimension: int) -> int:
        """Of the codes."""
        return self.codes.stride(dimension)

    def __getitem__(self, rows: slice) -> CodedRows:
        """Some of the rows."""
        return CodedRows(self.codes[rows], self.scale[:, rows], self.dtype)


Rows = Tensor | CodedRows


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
    _check(x)
    assert x.stride(1) == 1, x.stride()
    codes = new_rows(x.new_empty(0, dtype=torch.uint8), rows, k)
    scale = x.new_empty(k // GROUP, rows, dtype=torch.float32)
    if rows:
        _quantise_rows_kernel[(rows, triton.cdiv(k // GROUP, _GROUPS))](
            x=x, sx_t=x.stride(0) if rows > 1 else k, codes=codes, sc_t=k, scale=scale, ss_g=rows, K=k,
            PDL=pdl, GROUPS=_GROUPS, num_warps=2, **NO_CONTRACTION, **launch_options(pdl),
        )  # fmt: skip
    return CodedRows(codes.view(torch.float8_e4m3fn), scale, x.dtype)


def quantise_rows(x: Tensor) -> CodedRows:
    """Codes and scales of rows x [T, K]. Raises ValueError where K is no multiple of 128."""
    _check(x)
    groups = x.float().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (groups / scale[..., None]).to(torch.float8_e4m3fn).flatten(1)
    return CodedRows(codes, scale.t().contiguous(), x.dtype)


def _check(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] % GROUP:
        raise ValueError(f"rows {tuple(x.shape)}: a multiple of {GROUP} columns was expected")
