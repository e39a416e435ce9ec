"""The tables that attention reads of a pass: int32, on its device, built once a pass for all layers (lay.py).

The rows above a row are its path (visibility.py), and paths overlap: they are cut into **lines**. A row goes
on with the line of the row above it if it is that row's first AR child or the next row of a block; any other
row is the head of a line. So each row is in one line, and a line of **slots** holds all rows of its path from
the context on, those above its head too.

Rows lie in tiles of constant height, of two kinds:

- a **path tile** holds rows of one line that follow one another and takes the ragged end of their path: the
  key segments from the one that holds the end of the context on, whose keys are gathered through the slots;
- a **context tile** holds rows of any line of one sequence and takes the segments wholly inside the context,
  where all of them see the same keys. A draft tree with blocks has many short lines, and its rows would fill
  few of their tiles: 33 AR rows and 24 blocks of 6 are 177 rows in 12 context tiles of 16 rows, but in about
  40 path tiles. A sequence of one line has none: its path tiles take every segment.

The work list says which (tile, segment) pairs have keys, and its length lies on the device: neither the grid
nor a graph knows how long a text is. Two forms have another one:

- **whole**, for prompts: an item is a path tile with all its segments, and there are no context tiles;
- **shared**, for trees and blocks: every sequence has context tiles, and they take all whole pages of the
  context, those of the ragged segment too. They alone are in the work list. Path tiles go on from there, so
  that each of them gathers one page of the context and no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Tile
from .pages import PAGE
from .plan import PassShape

# (first position, width): narrow segments first, so that short contexts fill a GPU, wide ones later, so that
# few partials are written and combined: 4 at 1k, 22 at 16k, 34 at 40k, 62 at 128k. Every width is a multiple
# of 256, so any power-of-two key block up to that divides it. The fastest of four lists at 16k and 40k, 1 to
# 64 rows (H100, 2026-11-25).
KEY_CUTS = ((0, 256), (1024, 512), (4096, 1024), (16384, 2048), (65536, 4096))

Cuts = Sequence[tuple[int, int]]

SCRATCH = 6  # numbers a row that lay_triton.py passes from one thread to another


def key_segments(end: int, cuts: Cuts = KEY_CUTS) -> Iterator[tuple[int, int]]:
    """The segments [first, last) of the constant list that hold positions below `end`; the last one may reach
    past it.
    """
    position = 0
    while position < end:
        width = next(width for first, width in reversed(cuts) if position >= first)
        yield position, position + width
        position += width


@dataclass(frozen=True)
class PassTables:
    """Tables for passes of one shape, for tiles of R rows (R = folded row tile // query heads of a key head).

    N tiles, the path tiles first; T rows; C key segments. Places that no row and no item has are not read."""

    shape: PassShape
    whole: bool  # an item is a tile with all of its segments
    shared: bool  # an item is of a context tile, which takes all whole pages
    path_rows: int  # places of a path tile that rows may have: R, or fewer where another kernel takes these
    path_tiles: int  # so many places for path tiles; the others are for context tiles
    rows: Tensor  # [N, R] row index, -1 in a place that is not used
    limits: Tensor  # [N, R] the row's limit (visibility.py); 0 where not used
    tiles: Tensor  # [N, columns of layout.Tile]
    slots: Tensor  # [lines, depth] position p of a line's path is the row slots[line, p - context]
    segments: Tensor  # [C + 1] where the key segments start, and where the last one ends
    items: Tensor  # [I, 2] (tile, segment), a tile's last ones first; whole: (tile, 0), the last tile first
    count: Tensor  # [1] how many items there are
    row_segments: Tensor  # [T, 2] first and last, not included, of segments with keys that the row sees
    scratch: Tensor  # [SCRATCH, T]

    @staticmethod
    def new(
        shape: PassShape, capacity: int, tile_rows: int, whole: bool, device: torch.device | str,
        cuts: Cuts = KEY_CUTS, *, shared: bool = False, path_rows: int | None = None,
    ) -> PassTables:  # fmt: skip
        """Tables to be filled by `lay`, for rows at positions below `capacity`, tiles of `tile_rows` rows,
        path tiles of `path_rows` where that is said."""
        path_rows = path_rows or tile_rows
        assert path_rows <= tile_rows, (path_rows, tile_rows)
        bounds = list(key_segments(capacity, cuts))
        assert not shared or not any(first % PAGE for first, _ in bounds), "segments of whole pages"
        # full tiles, and one that is not full a line, or a sequence
        path = min(shape.n_rows, shape.lines + (shape.n_rows - shape.lines) // path_rows)
        by_sequence = min(shape.n_rows, (shape.n_rows + shape.sequences * (tile_rows - 1)) // tile_rows)
        context = by_sequence if shared or (shape.lines > 1 and not whole) else 0
        # segments from the end of the context on, and all of them once more where rows share them
        narrowest = min(last - first for first, last in bounds)
        ragged = min(len(bounds), 1 + -(-(shape.depth - 1) // narrowest))
        most = path if whole else by_sequence * len(bounds) + (0 if shared else path * ragged)

        def table(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        edges = [first for first, _ in bounds] + [bounds[-1][1]]
        return PassTables(
            shape, whole, shared, path_rows, path, table(path + context, tile_rows),
            table(path + context, tile_rows), table(path + context, len(Tile)),
            table(shape.lines, shape.depth),
            torch.tensor(edges, dtype=torch.int32, device=device), table(most, 2), table(1),
            table(shape.n_rows, 2), table(SCRATCH, shape.n_rows),
        )  # fmt: skip

    @property
    def tile_rows(self) -> int:
        """Places for rows in a tile."""
        return self.rows.shape[1]

    @property
    def n_segments(self) -> int:
        """Key segments that a row may have keys in."""
        return len(self.segments) - 1

    @property
    def one_tile(self) -> bool:
        """Whether all rows lie in one path tile."""
        return self.path_tiles == 1


def unpack(tables: PassTables) -> Tensor:
    """In-flight visibility, bool [T, T], read back from the tables; equals `visible(rows)`.

    Raises ValueError when a row that is not padding is not in exactly one path tile."""
    n = tables.shape.n_rows
    seen = torch.zeros(n, n, dtype=torch.bool)
    found, slots = [], tables.slots.flatten().cpu()
    for tile in range(tables.path_tiles):
        columns = tables.tiles[tile].tolist()
        for row, limit in zip(tables.rows[tile].tolist(), tables.limits[tile].tolist(), strict=True):
            if row >= 0:
                found.append(row)
                path = slots[columns[Tile.FIRST_SLOT] :][: limit - columns[Tile.CONTEXT]]
                seen[row, path.long()] = True
    wanted = tables.row_segments[:, 1].nonzero().flatten().tolist()
    if sorted(found) != wanted:
        raise ValueError(f"path tiles hold rows {sorted(found)}, not each of {wanted} once")
    return seen
