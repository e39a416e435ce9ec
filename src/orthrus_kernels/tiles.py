"""Constant row tiles: how the plain twins keep a row's bits independent of the rows beside it.

A BLAS chooses its blocking, and so the order of its sums, from the shape it is given. Seen on a CPU: torch's
fp32 `x @ w.T` gives a row other bits for nearly every row count, and the same bits once rows come in tiles of
a constant height."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A published diffusion block fills one tile; 16 and 64 were row-invariant as well, 64 at twice the work.
ROW_TILE = 32


def by_row_tile(op: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply `op` to tiles of exactly ROW_TILE rows and return the rows that were asked for.

    rows: [T, ...]. The last tile is padded with zero rows, whose results are dropped; `op` must treat rows
    independently."""
    count = rows.shape[0]
    if count == ROW_TILE:
        return op(rows)
    tail = -count % ROW_TILE
    padded = torch.cat([rows, rows.new_zeros(tail, *rows.shape[1:])]) if tail else rows
    tiles = [op(tile) for tile in padded.split(ROW_TILE)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:count]
