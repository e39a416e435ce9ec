"""The rows of a pass in the form the attention kernels read: small int32 tables, built once a pass.

Two kinds of row tiles, both of a constant height:

- **path tiles** hold rows of one path (visibility.py) and take its ragged end: the key segments from the one
  that holds the end of the context onwards, whose keys are gathered by slot(path, position);
- **context tiles** hold rows of any path of one sequence and take the segments that lie wholly inside the
  committed context, where all of them see the same keys. A draft tree with blocks has many short paths, and
  its rows would fill few of their tiles: 33 AR rows and 24 blocks of 6 are 177 rows in 12 context tiles of 16
  rows, but in about 40 path tiles. Rows of one path have none: their path tiles take every segment.

Tables with `room` can be moved along a sequence on the device (`move`): the host need not know the length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Tile
from .visibility import Path, Rows, paths

# (first position, width): narrow segments first, so that short contexts fill a GPU, wide ones later, so that
# few partials are written and combined: 4 at 1k, 22 at 16k, 34 at 40k, 62 at 128k. Every width is a multiple
# of 256, so any power-of-two key block up to that divides it. The fastest of four lists at 16k and 40k, 1 to
# 64 rows (H100, bench/LOG.md, 2026-11-25).
KEY_CUTS = ((0, 256), (1024, 512), (4096, 1024), (16384, 2048), (65536, 4096))

Cuts = Sequence[tuple[int, int]]


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
class PackedRows:
    """Tables of a pass, int32, for tiles of R rows (R = folded row tile // query heads of a key head).

    N tiles, the path tiles first; T rows; C segments that hold a key of the pass."""

    rows: Tensor  # [N, R] row index, -1 in a place that is not used
    limits: Tensor  # [N, R] the row sees logical positions below its limit; 0 where not used
    tiles: Tensor  # [N, columns of layout.Tile]
    slots: Tensor  # of all paths: position p of a tile's path is the row slots[first slot + p - context]
    segments: Tensor  # [C + 1] where the key segments start, and where the last one ends
    # [I, 2] (tile, segment) pairs that have keys, widest segments first. Tables with room hold all pairs:
    # -1 - tile in place of a tile that has no keys there.
    items: Tensor
    row_segments: Tensor  # [T] how many segments hold keys that the row sees
    path_tiles: int
    n_rows: int
    n_segments: int
    table: Tensor  # all of the above in one

    @property
    def tile_rows(self) -> int:
        """Places for rows in a tile."""
        return self.rows.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """What a launch follows from: passes of one shape differ in the numbers of their tables alone."""
        tables = self.rows, self.slots, self.segments, self.items
        return (*(len(t) for t in tables), self.tile_rows, self.path_tiles, self.n_rows, self.n_segments)

    def on(self, device: torch.device) -> PackedRows:
        """A copy of the tables on a device."""
        table = self.table.to(device, copy=True)

        def there(view: Tensor) -> Tensor:
            return table[view.storage_offset() :][: view.numel()].view(view.shape)

        return replace(
            self, table=table, rows=there(self.rows), limits=there(self.limits), tiles=there(self.tiles),
            slots=there(self.slots), segments=there(self.segments), items=there(self.items),
            row_segments=there(self.row_segments),
        )  # fmt: skip


def pack(
    rows: Rows, tile_rows: int, device: torch.device | str = "cpu", cuts: Cuts = KEY_CUTS, room: int = 0
) -> PackedRows:  # fmt: skip
    """Build the tables of a pass for tiles of `tile_rows` rows and copy them to `device` in one transfer.

    room: for tables that `move` may put where no row sees a position from `room` on; one sequence only.
    Raises ValueError for a pass without rows, or with room and several sequences or too little of it.
    """
    if not len(rows):
        raise ValueError("a pass needs at least one row")
    limits, tiles, slots = [0] * len(rows), _Tiles(tile_rows), list[int]()
    all_paths = paths(rows)
    for path in all_paths:
        for query, limit in zip(path.queries, path.limits, strict=True):
            limits[query] = limit
        tiles.add(path.queries, path.limits, path, len(slots))
        slots += path.slots
    path_tiles = len(tiles.meta)
    if room and (len(rows.contexts) > 1 or room < max(limits)):
        raise ValueError(f"room is for one sequence and at least {max(limits)} positions, not {room}")
    bounds = list(key_segments(max(room, *limits), cuts))
    for sequence, context in rows.contexts.items():
        mine = [i for i in range(len(rows)) if rows.sequences[i] == sequence]
        one_path = sum(path.sequence == sequence for path in all_paths) == 1
        if not one_path and (room or context >= bounds[0][1]):
            tiles.add(mine, [context] * len(mine), Path(sequence, context, [], mine, []), 0)
    in_context_tiles = {meta[Tile.SEQUENCE] for meta in tiles.meta[path_tiles:]}
    items = []
    for tile, meta in enumerate(tiles.meta):
        sequence, context, end = meta[Tile.SEQUENCE], meta[Tile.CONTEXT], meta[Tile.END]
        whole = sum(last <= context for _, last in bounds)
        reach = meta[Tile.REACH] = sum(first < end for first, _ in bounds)
        if tile < path_tiles:
            with_keys = range(whole if sequence in in_context_tiles else 0, reach)
        else:
            with_keys = range(whole)
        listed = range(len(bounds)) if room else with_keys
        items += [(tile if s in with_keys else -1 - tile, s) for s in listed]
    # Long segments first, so that none is left to run alone at the end; tiles of a segment side by side, so
    # that all but the first find its keys in the L2 cache.
    items.sort(
        key=lambda item: (bounds[item[1]][0] - bounds[item[1]][1], item[1], max(item[0], -1 - item[0]))
    )
    row_segments = [sum(first < limit for first, _ in bounds) for limit in limits]
    return tables_of(
        [i for tile in tiles.rows for i in tile], [i for tile in tiles.limits for i in tile], tiles.meta,
        slots, bounds, items, row_segments, tile_rows, path_tiles, device,
    )  # fmt: skip


def tables_of(
    rows: list[int], limits: list[int], meta: list[list[int]], slots: list[int],
    bounds: Sequence[tuple[int, int]], items: Sequence[tuple[int, int]], row_segments: list[int],
    tile_rows: int, path_tiles: int, device: torch.device | str,
) -> PackedRows:  # fmt: skip
    """PackedRows on a device from lists in its order; bounds: the key segments, first and last position."""
    table, tables = _copy(
        [
            rows, limits, [i for tile in meta for i in tile], slots,
            [first for first, _ in bounds] + [bounds[-1][1]], [i for item in items for i in item],
            row_segments,
        ],
        device,
    )  # fmt: skip
    return PackedRows(
        tables[0].view(-1, tile_rows), tables[1].view(-1, tile_rows), tables[2].view(-1, len(Tile)),
        tables[3], tables[4], tables[5].view(-1, 2), tables[6], path_tiles, len(row_segments), len(bounds),
        table,
    )  # fmt: skip


class _Tiles:
    """Tiles under construction."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.rows: list[list[int]] = []
        self.limits: list[list[int]] = []
        self.meta: list[list[int]] = []

    def add(self, queries: list[int], limits: list[int], path: Path, first_slot: int) -> None:
        """Cut the queries of a path into tiles."""
        starts = _chain_starts(path.slots)
        for first in range(0, len(queries), self.height):
            part, seen = queries[first : first + self.height], limits[first : first + self.height]
            unused = self.height - len(part)
            self.rows.append(part + [-1] * unused)
            self.limits.append(seen + [0] * unused)
            end = max(seen)
            chain = starts[end - path.context - 1] if end > path.context else 0
            row = path.slots[chain] if path.slots else 0
            columns = {
                Tile.SEQUENCE: path.sequence, Tile.CONTEXT: path.context, Tile.END: end,
                Tile.FIRST_SLOT: first_slot, Tile.REACH: 0, Tile.CHAIN: path.context + chain,
                Tile.CHAIN_ROW: row, Tile.LOWEST: min(seen),
            }  # fmt: skip
            self.meta.append([columns[column] for column in Tile])


def _chain_starts(slots: list[int]) -> list[int]:
    """For every index, from which index on the slots up to it follow one another."""
    starts: list[int] = []
    for i, slot in enumerate(slots):
        starts.append(starts[-1] if i and slots[i - 1] + 1 == slot else i)
    return starts


def _copy(lists: list[list[int]], device: torch.device | str) -> tuple[Tensor, list[Tensor]]:
    """One int32 tensor on the device and the lists as its views, each 16-byte aligned: an odd address
    would have Triton compile the kernels once more.
    """
    flat: list[int] = []
    starts = []
    for values in lists:
        starts.append(len(flat))
        flat += values + [0] * (-len(values) % 4)
    table = torch.tensor(flat, dtype=torch.int32).to(device)
    return table, [table[start : start + len(values)] for start, values in zip(starts, lists, strict=True)]


def move(packed: PackedRows, start: Tensor) -> None:
    """Put the tables of a pass, made with `room`, on a context of start [1] int32 committed tokens, in place:
    what `pack` makes of the same rows there. The plain twin of `move_triton`.
    """
    tiles, segments, n = packed.tiles, packed.segments, packed.n_segments
    delta = start - tiles[0, Tile.CONTEXT]
    packed.limits.add_(torch.where(packed.rows >= 0, delta, 0))
    tiles[:, [Tile.CONTEXT, Tile.END, Tile.CHAIN, Tile.LOWEST]] += delta
    tiles[:, Tile.REACH] = (segments[None, :n] < tiles[:, Tile.END, None]).sum(1)
    mine, at = packed.rows[: packed.path_tiles], packed.limits[: packed.path_tiles]
    packed.row_segments[mine[mine >= 0].long()] = (segments[:n] < at[mine >= 0][:, None]).sum(1).int()
    tile = torch.where(packed.items[:, 0] < 0, -1 - packed.items[:, 0], packed.items[:, 0])
    first, last = segments[:-1][packed.items[:, 1].long()], segments[1:][packed.items[:, 1].long()]
    inside = last <= start
    in_path = (first < tiles[tile.long(), Tile.END]) & ~(inside & (len(tiles) > packed.path_tiles))
    has_keys = torch.where(tile < packed.path_tiles, in_path, inside)
    packed.items[:, 0] = torch.where(has_keys, tile, -1 - tile)


def unpack(packed: PackedRows) -> Tensor:
    """In-flight visibility, bool [T, T], read back from the tables; equals `visible(rows)`.

    Raises ValueError when a row is not in exactly one path tile.
    """
    seen = torch.zeros(packed.n_rows, packed.n_rows, dtype=torch.bool)
    found = []
    for tile in range(packed.path_tiles):
        columns = packed.tiles[tile].tolist()
        context, first_slot = columns[Tile.CONTEXT], columns[Tile.FIRST_SLOT]
        for row, limit in zip(packed.rows[tile].tolist(), packed.limits[tile].tolist(), strict=True):
            if row >= 0:
                found.append(row)
                seen[row, packed.slots[first_slot : first_slot + limit - context].long()] = True
    if sorted(found) != list(range(packed.n_rows)):
        raise ValueError(f"path tiles hold rows {sorted(found)}, not each of {packed.n_rows} once")
    return seen
