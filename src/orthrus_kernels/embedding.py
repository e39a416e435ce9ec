"""Token embedding: row `tokens[t]` of a table [V, E], copied. Moves E elements in and out a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .pdl import launch_dependents, launch_options, wait
from .rows import new_rows

BLOCK_E = 1024


@triton.jit
def _embedding_kernel(table, sv, tokens, y, sy_t, E, PDL: tl.constexpr, BLOCK_E: tl.constexpr):
    """Program (t, i): columns [i BLOCK_E, (i + 1) BLOCK_E) of row t."""
    i_t = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < E
    if PDL:
        wait()  # tokens and y may be in use until here
        launch_dependents()
    token = tl.load(tokens + i_t).to(tl.int64)
    tl.store(y + i_t * sy_t + o_e, tl.load(table + token * sv + o_e, mask=m_e, other=0.0), mask=m_e)


def embedding_triton(
    table: Tensor, tokens: Tensor, *, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """`embedding` as one Triton launch. Ids are not checked on the device: the caller says 0 <= id < V. pdl:
    as a dependent launch (pdl.py)."""
    (rows,), e = tokens.shape, table.shape[1]
    out = new_rows(table, rows, e) if out is None else out
    assert out.shape == (rows, e) and out.dtype == table.dtype, (out.shape, out.dtype, table.dtype)
    assert table.stride(1) == out.stride(1) == 1 and tokens.is_contiguous(), (table.stride(), out.stride())
    assert tokens.dtype in (torch.int32, torch.int64), tokens.dtype
    if rows:
        _embedding_kernel[(rows, -(-e // BLOCK_E))](
            table=table, sv=table.stride(0), tokens=tokens, y=out, sy_t=out.stride(0) if rows > 1 else e, E=e,
            PDL=pdl, BLOCK_E=BLOCK_E, num_warps=4, **launch_options(pdl),
        )  # fmt: skip
    return out


def embedding(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `table` [V, E] for tokens [T] (int32 or int64): [T, E]. IndexError for an id past the table."""
    return table[tokens.long()]
