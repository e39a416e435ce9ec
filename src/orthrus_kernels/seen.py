"""Which tokens a repetition penalty applies to behind each node of a draft tree: those of the text and those
of the node's own path."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton

_TILE = 4096  # tokens a program


def seen_rows(
    counts: Tensor, slots: Tensor, tokens: Tensor | None = None, parents: Tensor | None = None
) -> Tensor:
    """Returns bool [T, V]: whether the choice behind row t has seen token v.

    counts [S, V] int32: how often the text of each slot holds each token. slots [T] int32: the rows' texts;
    -1: a padding row, which has seen nothing. tokens [T] int64, parents [T] int32: rows of trees, -1 above a
    root, whose parents come before them and are rows of the same text; without them the texts alone count."""
    used = (slots >= 0)[:, None]
    seen = (counts > 0)[slots.clamp(min=0).long()] & used
    if tokens is None or parents is None:
        return seen
    for row, (token, parent) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        if not used[row]:
            continue
        if parent >= 0:
            seen[row] |= seen[parent]
        seen[row, token] = True
    return seen


@triton.jit
def _texts_kernel(counts, slots, seen, V, TILE: tl.constexpr):
    """Program (tile, row)."""
    o_v, i_r = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1)
    slot = tl.load(slots + i_r)
    b = tl.load(counts + slot.to(tl.int64) * V + o_v, mask=(o_v < V) & (slot >= 0), other=0)
    tl.store(seen + i_r.to(tl.int64) * V + o_v, (b > 0).to(tl.uint8), mask=o_v < V)


@triton.jit
def _paths_kernel(seen, slots, tokens, parents, V):
    """One row: it walks up to its root."""
    i_r = tl.program_id(0)
    seen += i_r.to(tl.int64) * V
    row = tl.where(tl.load(slots + i_r) < 0, -1, i_r)
    while row >= 0:
        tl.store(seen + tl.load(tokens + row), 1)
        row = tl.load(parents + row)


def seen_rows_triton(
    counts: Tensor, slots: Tensor, tokens: Tensor | None = None, parents: Tensor | None = None
) -> Tensor:
    """`seen_rows` in one launch, and one more for trees."""
    rows, v = len(slots), counts.shape[1]
    assert counts.dtype == slots.dtype == torch.int32, (counts.dtype, slots.dtype)
    assert counts.is_contiguous() and slots.is_contiguous(), (counts.stride(), slots.stride())
    seen = torch.empty(rows, v, dtype=torch.bool, device=counts.device)
    tile = min(_TILE, triton.next_power_of_2(v))
    _texts_kernel[(triton.cdiv(v, tile), rows)](
        counts=counts, slots=slots, seen=seen.view(torch.uint8), V=v, TILE=tile, num_warps=4
    )
    if tokens is not None and parents is not None:
        assert tokens.dtype == torch.int64 and parents.dtype == torch.int32, (tokens.dtype, parents.dtype)
        assert tokens.is_contiguous() and parents.is_contiguous(), (tokens.stride(), parents.stride())
        _paths_kernel[(rows,)](
            seen=seen.view(torch.uint8), slots=slots, tokens=tokens, parents=parents, V=v, num_warps=1
        )
    return seen
