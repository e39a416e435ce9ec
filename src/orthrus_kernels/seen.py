"""Which tokens a repetition penalty applies to behind each node of a draft tree: those of the text and those
of the node's own path."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton


def seen_rows(counts: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Returns bool [T, V]: whether the choice behind row t has seen token v.

    counts [V] int32: how often the text so far holds each token. tokens [T] int64, parents [T] int32: rows of
    trees, -1 above a root, whose parents come before them."""
    seen = (counts > 0).repeat(len(tokens), 1)
    for row, (token, parent) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        if parent >= 0:
            seen[row] |= seen[parent]
        seen[row, token] = True
    return seen


@triton.jit
def _paths_kernel(seen, stride, tokens, parents):
    """One row: it walks up to its root."""
    i_r = tl.program_id(0)
    seen += i_r.to(tl.int64) * stride
    row = i_r
    while row >= 0:
        tl.store(seen + tl.load(tokens + row), 1)
        row = tl.load(parents + row)


def seen_rows_triton(counts: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """`seen_rows` in two launches."""
    assert tokens.dtype == torch.int64 and parents.dtype == torch.int32, (tokens.dtype, parents.dtype)
    assert tokens.is_contiguous() and parents.is_contiguous(), (tokens.stride(), parents.stride())
    seen = (counts > 0).repeat(len(tokens), 1)
    _paths_kernel[(len(tokens),)](
        seen=seen.view(torch.uint8), stride=seen.stride(0), tokens=tokens, parents=parents, num_warps=1
    )
    return seen
