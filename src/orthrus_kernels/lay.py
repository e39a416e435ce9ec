"""The one builder of a pass's tables (pass_tables.py), the plain twin; the kernel is in `lay_triton.py`.

Both know what a row sees from the rules of visibility.py, and from nothing else."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial

import torch
from torch import Tensor

from .clock import mark_here
from .layout import Tile
from .pages import PAGE
from .pass_tables import PassTables
from .plan import PassPlan
from .visibility import row_above, row_begin, row_limit

Tiles = dict[int, tuple[list[int], list[int], dict[Tile, int]]]  # rows, limits and columns by number


def lay(plan: PassPlan, tables: PassTables, root: Tensor | None = None, clock: Tensor | None = None) -> None:
    """Fill the tables with what the rows of the plan see.

    root [S] int32, any stride: the rows of each sequence are a chain or one block, wherever the sequence has
    got to. Before all else its first row's token becomes root, and positions follow from `start`. clock,
    int32: takes the time of the launch in all its places (clock.py)."""
    if clock is not None:
        mark_here(clock)
    if root is not None:
        plan.stand(root)
    sequences, start, edges = plan.sequences.tolist(), plan.start.tolist(), tables.segments.tolist()
    up, limits = _rules(plan)
    slots, line_of = _lines(up, plan.blocks.tolist(), sequences)
    heads = [sequences[line[-1]] for line in slots]
    inside = [bisect_right(edges, context) - 1 for context in start]  # segments wholly in the context
    least = 0 if tables.shared else 1
    tiled = [tables.path_tiles < len(tables.rows) and heads.count(s) > least for s in range(len(start))]
    begin = [bisect_right(edges, row_begin(limit)) - 1 for limit in limits]
    reach = [bisect_left(edges, limit) for limit in limits]
    tiles: Tiles = {}
    for tile, mine in enumerate(_path_tiles(line_of, tables.path_rows)):
        s, line, end = sequences[mine[0]], line_of[mine[0]], limits[mine[-1]]
        run = end - start[s] - 1  # place in the line from which on the slots follow one another
        while run and slots[line][run - 1] == slots[line][run] - 1:
            run -= 1
        tiles[tile] = mine, [limits[i] for i in mine], {
            Tile.SEQUENCE: s, Tile.CONTEXT: start[s], Tile.END: end, Tile.LOWEST: limits[mine[0]],
            Tile.FIRST_SLOT: line * tables.slots.shape[1], Tile.CHAIN: start[s] + run,
            Tile.CHAIN_ROW: slots[line][run], Tile.REACH: reach[mine[-1]],
            Tile.BEGIN: max(inside[s], begin[mine[0]]) if tiled[s] else begin[mine[0]],
        }  # fmt: skip
    tile = tables.path_tiles
    for s in [s for s, has_some in enumerate(tiled) if has_some]:
        mine = [i for i, sequence in enumerate(sequences) if sequence == s]
        here = start[s] // PAGE * PAGE if tables.shared else start[s]
        columns = {
            Tile.SEQUENCE: s, Tile.CONTEXT: here, Tile.END: here, Tile.LOWEST: here, Tile.FIRST_SLOT: 0,
            Tile.CHAIN: here, Tile.CHAIN_ROW: 0,
            Tile.REACH: bisect_left(edges, here) if tables.shared else inside[s],
            Tile.BEGIN: min(inside[s], *(begin[row] for row in mine)),
        }  # fmt: skip
        for first in range(0, len(mine), tables.tile_rows):
            part = mine[first : first + tables.tile_rows]
            tiles[tile] = part, [limits[row] for row in part], columns
            tile += 1
    _write(tables, slots, tiles)
    tables.row_segments.copy_(torch.tensor([begin, reach]).T)


def _write(tables: PassTables, slots: list[list[int]], tiles: Tiles) -> None:
    """The slots of each line, the tiles by number, and the work list."""
    numbers = partial(torch.tensor, dtype=torch.int32, device=tables.rows.device)
    places = [line * tables.slots.shape[1] + i for line, path in enumerate(slots) for i in range(len(path))]
    tables.slots.view(-1)[places] = numbers([row for path in slots for row in path])
    index, height = list(tiles), tables.tile_rows
    rows = [rows + [-1] * (height - len(rows)) for rows, _, _ in tiles.values()]
    ends = [ends + [0] * (height - len(ends)) for _, ends, _ in tiles.values()]
    columns = [[of[column] for column in Tile] for _, _, of in tiles.values()]
    tables.rows.fill_(-1)[index] = numbers(rows).view(-1, height)
    tables.limits.zero_()[index] = numbers(ends).view(-1, height)
    tables.tiles.zero_()[index] = numbers(columns).view(-1, len(Tile))
    if tables.whole:
        items = [(tile, 0) for tile in reversed(tiles)]
    else:
        first = tables.path_tiles if tables.shared else 0
        takes = [(tile, _in_order(of)) for tile, (_, _, of) in tiles.items() if tile >= first]
        rounds = range(max((len(segments) for _, segments in takes), default=0))
        items = [(tile, segments[i]) for i in rounds for tile, segments in takes if i < len(segments)]
    tables.items[: len(items)] = numbers(items).view(-1, 2)
    tables.count.fill_(len(items))


def _in_order(tile: dict[Tile, int]) -> list[int]:
    """The segments of a tile as its items come: from the last on, which are the widest. But the very last
    one, whose end is gathered and keeps a GPU waiting, takes a turn of its own in each sequence: others are
    streamed meanwhile."""
    segments = list(reversed(range(tile[Tile.BEGIN], tile[Tile.REACH])))
    if segments:
        segments.insert(tile[Tile.SEQUENCE] % ((len(segments) + 1) // 2), segments.pop(0))
    return segments


def _rules(plan: PassPlan) -> tuple[list[int], list[int]]:
    """The row above each row, and its limit; -1 and 0 for padding."""
    parents, blocks, positions = plan.parents.tolist(), plan.blocks.tolist(), plan.positions.tolist()
    sequences, n = plan.sequences.tolist(), len(plan.tokens)
    up, limits = [-1] * n, [0] * n
    block_end = 0
    for i in reversed(range(n)):
        if sequences[i] >= 0:
            before, after = (
                blocks[j] if 0 <= j < n and sequences[j] == sequences[i] else -1 for j in (i - 1, i + 1)
            )
            if blocks[i] != after:
                block_end = positions[i] + 1
            up[i] = row_above(i, parents[i], blocks[i], before)
            limits[i] = row_limit(positions[i], blocks[i], block_end)
    return up, limits


def _lines(up: list[int], blocks: list[int], sequences: list[int]) -> tuple[list[list[int]], list[int]]:
    """The slots of each line, and the line of each row, -1 for padding."""
    slots: list[list[int]] = []
    line_of, depth = [-1] * len(up), [0] * len(up)
    followed: set[int] = set()  # rows whose line has gone on
    for row, above in enumerate(up):
        if sequences[row] < 0:
            continue
        depth[row] = 0 if above < 0 else depth[above] + 1
        if above >= 0 and blocks[above] == blocks[row] and above not in followed:
            followed.add(above)
            line_of[row] = line_of[above]
        else:
            line_of[row] = len(slots)
            slots.append(slots[line_of[above]][: depth[row]] if above >= 0 else [])
        slots[line_of[row]].append(row)
    return slots, line_of


def _path_tiles(line_of: list[int], height: int) -> list[list[int]]:
    """The rows of each path tile; tiles are numbered by their first rows."""
    tiles: list[list[int]] = []
    last: dict[int, list[int]] = {}  # of each line
    for row, line in enumerate(line_of):
        if line >= 0:
            if line not in last or len(last[line]) == height:
                last[line] = []
                tiles.append(last[line])
            last[line].append(row)
    return tiles
