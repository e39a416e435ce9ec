"""The draft tree grown on the device, with the tables of the pass that verifies it: one launch, one program.

`draft_tree` says which nodes a tree has; the tables are those of packed.py in a layout of fixed size
(`tree_tables`), so that a captured graph takes any tree of as many nodes. A **path tile** holds a line of
first children: a node goes below its parent, in the same tile, if it is the likeliest candidate there, and
else opens a tile, whose slots begin with those of its parent. So a tile has at least one node, and there are
at most as many tiles as nodes. Rows behind the context lie in its last key segment or the one after it, which
are the two that a path tile may have keys in; all nodes share the context tiles. A one-pass cycle has the
tiles of its blocks between the two, which `place_blocks_triton` fills (blocks_triton.py).

The frontier of the search lies in registers, an entry a place that is known and not taken, by the order in
which places became known; a step takes the best entry, the first of equals, and offers two more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import tl, triton
from .clock import mark
from .draft_tree import DraftTree
from .layout import (
    STATE_ROOT,
    STATE_START,
    TILE_CHAIN,
    TILE_CHAIN_ROW,
    TILE_COLUMNS,
    TILE_CONTEXT,
    TILE_END,
    TILE_FIRST_SLOT,
    TILE_LOWEST,
    TILE_REACH,
    Tile,
)
from .packed import KEY_CUTS, Cuts, PackedRows, key_segments, tables_of

MOST_DEPTH = 64  # of a node: 6 bits
_ITEMS = 128  # a step


@dataclass(frozen=True)
class TreeTables:
    """The pass over a tree of N - 1 nodes and its root, refilled for every tree, and over blocks.

    packed: the tables, N path tiles of the tree first, then those of the blocks. The first items are (path
    tile, segment) pairs, two a tile."""

    packed: PackedRows
    ids: Tensor  # [2, T] int64: tokens and positions, those of the N nodes first
    parents: Tensor  # [N] int32
    scores: Tensor  # [N] fp32: of the path to each node, as in `DraftTree`
    path_tile: Tensor  # [N] int32: which one holds each node
    depth: int  # of a node, at most

    @property
    def block_tiles(self) -> int:
        """Path tiles that hold blocks."""
        return self.packed.path_tiles - len(self.parents)


def tree_tables(
    nodes: int, depth: int, tile_rows: int, room: int, device: torch.device, cuts: Cuts = KEY_CUTS,
    blocks: int = 0, block_size: int = 0, mask_token: int = 0,
) -> TreeTables:  # fmt: skip
    """Room for the tables of trees of up to `nodes` nodes below the root and `depth` below it, where no row
    sees a position from `room` on, for tiles of `tile_rows` rows; with `blocks` diffusion blocks of
    `block_size` rows, each in tiles of its own.

    Raises ValueError for a tree that is empty or too deep."""
    if not 1 <= nodes <= 4095 or not 1 <= depth < MOST_DEPTH:
        raise ValueError(
            f"a tree of {nodes} nodes and {depth} deep: 1 to 4095, 1 to {MOST_DEPTH - 1} expected"
        )
    n, bounds = nodes + 1, list(key_segments(room, cuts))
    all_rows = n + blocks * block_size
    of_blocks: list[int] = []
    for first in range(n, all_rows, block_size or 1):
        own = [*range(first, first + block_size)]
        of_blocks += own + [-1] * (-block_size % tile_rows)
    path_tiles, context_tiles = n + len(of_blocks) // tile_rows, -(-all_rows // tile_rows)
    in_context = [*range(all_rows)] + [-1] * (-all_rows % tile_rows)
    path_items = [item for tile in range(path_tiles) for item in ((-1 - tile, 0), (-1 - tile, 0))]
    wide_first = sorted(range(len(bounds)), key=lambda s: (bounds[s][0] - bounds[s][1], s))
    items = [(-1 - path_tiles - tile, s) for s in wide_first for tile in range(context_tiles)]
    packed = tables_of(
        [-1] * (n * tile_rows) + of_blocks + in_context, [0] * ((path_tiles + context_tiles) * tile_rows),
        [[0] * len(Tile) for _ in range(path_tiles + context_tiles)],
        [0] * (n * (depth + 1) + blocks * (depth + block_size)), bounds, [*path_items, *items],
        [0] * all_rows, tile_rows, path_tiles, device,
    )  # fmt: skip
    ids = torch.full((2, all_rows), mask_token, dtype=torch.int64, device=device)
    parents, path_tile = (torch.zeros(n, dtype=torch.int32, device=device) for _ in "01")
    return TreeTables(packed, ids, parents, torch.zeros(n, device=device), path_tile, depth)


def plant(tables: TreeTables, tree: DraftTree, start: int) -> None:
    """Fill the tables, which are on the CPU and without blocks, with a tree behind `start` committed tokens.
    The plain twin of `grow_triton`, which grows the tree too."""
    packed, n = tables.packed, len(tree)
    depth = tables.depth + 1  # slots of a tile
    firsts, lasts = packed.segments[:-1].tolist(), packed.segments[1:].tolist()
    whole = sum(last <= start for last in lasts)
    packed.rows[: packed.path_tiles], packed.limits[: packed.path_tiles] = -1, 0
    first_children: set[int] = set()
    seen_parents: set[int] = set()
    place: list[tuple[int, int]] = []  # (tile, place) of each node
    tiles = 0
    for node, (parent, d) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        if parent not in seen_parents:
            first_children.add(node)
            seen_parents.add(parent)
        below = place[parent][1] + 1 if node in first_children and parent >= 0 else packed.tile_rows
        if below < packed.tile_rows:
            tile = place[parent][0]
        else:
            tile, below = tiles, 0
            tiles += 1
            packed.tiles[tile, Tile.FIRST_SLOT], packed.tiles[tile, Tile.LOWEST] = tile * depth, start + d + 1
            if parent >= 0:
                above = place[parent][0] * depth
                packed.slots[tile * depth : tile * depth + d] = packed.slots[above : above + d].clone()
        place.append((tile, below))
        packed.slots[tile * depth + d] = node
        packed.rows[tile, below], packed.limits[tile, below] = node, start + d + 1
        reach = sum(first < start + d + 1 for first in firsts)
        packed.row_segments[node] = reach
        _put(packed.tiles[tile], {
            Tile.SEQUENCE: 0, Tile.CONTEXT: start, Tile.END: start + d + 1, Tile.REACH: reach,
            Tile.CHAIN: start + d, Tile.CHAIN_ROW: node,
        })  # fmt: skip
    for tile in range(packed.path_tiles, len(packed.tiles)):
        _put(packed.tiles[tile], {
            Tile.SEQUENCE: 0, Tile.CONTEXT: start, Tile.END: start, Tile.FIRST_SLOT: 0, Tile.REACH: whole,
            Tile.CHAIN: start, Tile.CHAIN_ROW: 0, Tile.LOWEST: start,
        })  # fmt: skip
    packed.limits[packed.path_tiles :] = torch.where(packed.rows[packed.path_tiles :] >= 0, start, 0)
    for i, (tile, segment) in enumerate(packed.items.tolist()):
        tile = max(tile, -1 - tile)
        if i < 2 * packed.path_tiles:
            tile, segment = i // 2, min(whole + i % 2, len(firsts) - 1)
            has_keys = (
                tile < tiles
                and whole + i % 2 < len(firsts)
                and firsts[segment] < packed.tiles[tile, Tile.END]
            )
        else:
            has_keys = lasts[segment] <= start
        packed.items[i] = torch.tensor([tile if has_keys else -1 - tile, segment], dtype=torch.int32)
    tables.ids[0, :n], tables.ids[1, :n] = torch.tensor(tree.tokens), start + torch.tensor(tree.depths)
    tables.parents[:n] = torch.tensor(tree.parents, dtype=torch.int32)
    tables.scores[:n] = torch.tensor(tree.scores)
    tables.path_tile[:n] = torch.tensor([tile for tile, _ in place], dtype=torch.int32)


def _put(tile: Tensor, columns: dict[Tile, int]) -> None:
    for column, value in columns.items():
        tile[column] = value


@triton.jit
def _grow_kernel(
    start_root, log_probabilities, order, candidates, tokens, positions, parents, scores, path_tile,
    rows, limits, tiles, slots, segments, items, row_segments, clock,
    N, DEPTH, K, N_ITEMS, BLOCK_TILES, CONTEXT_TILES, N_SEGMENTS,
    TILE: tl.constexpr, SEGMENTS: tl.constexpr, FRONTIER: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, ORDERED: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """N nodes, the root one of them. BLOCK_TILES: of blocks, between its path tiles and the context tiles.
    ORDERED: scores behind each candidate before, and their order.
    Powers of two: FRONTIER >= 2 N, SLOTS > DEPTH, SEGMENTS of them all."""
    if CLOCK:
        mark(clock, 0)
    start, root = tl.load(start_root + STATE_START), tl.load(start_root + STATE_ROOT)
    o_b, o_f, o_s, o_d = (
        tl.arange(0, BLOCK), tl.arange(0, FRONTIER), tl.arange(0, SEGMENTS), tl.arange(0, SLOTS)
    )  # fmt: skip
    b_first = tl.load(segments + o_s, mask=o_s < N_SEGMENTS, other=0x7FFFFFFF)
    b_last = tl.load(segments + 1 + o_s, mask=o_s < N_SEGMENTS, other=0x7FFFFFFF)
    whole = tl.sum((b_last <= start).to(tl.int32), axis=0)  # segments wholly inside the context
    behind = tl.min(tl.where(b_first > start, b_first, 0x7FFFFFFF), axis=0)  # where the next one starts
    for i in range(0, N * TILE, BLOCK):
        tl.store(rows + i + o_b, tl.full((BLOCK,), -1, tl.int32), mask=i + o_b < N * TILE)
        tl.store(limits + i + o_b, tl.zeros((BLOCK,), tl.int32), mask=i + o_b < N * TILE)
    tl.debug_barrier()

    # An entry: scores of its node and of its parent; (parent, rank, parent's depth) and (which candidate the
    # parent is, tile, place) packed.
    b_score = tl.full((FRONTIER,), float("-inf"), tl.float32)
    b_base = tl.zeros((FRONTIER,), tl.float32)
    b_node = tl.zeros((FRONTIER,), tl.int32)
    b_place = tl.zeros((FRONTIER,), tl.int32)
    known, n_tiles = 0, 1
    tl.store(tokens, root.to(tl.int64))
    tl.store(positions, start.to(tl.int64))
    tl.store(parents, -1)
    tl.store(scores, 0.0)
    tl.store(path_tile, 0)
    tl.store(rows, 0)
    tl.store(limits, start + 1)
    tl.store(slots, 0)
    tl.store(row_segments, whole + 1)
    tl.store(tiles + TILE_FIRST_SLOT, 0)
    tl.store(tiles + TILE_LOWEST, start + 1)
    tl.store(tiles + TILE_END, start + 1)
    tl.store(tiles + TILE_CHAIN_ROW, 0)
    score, depth, tile, place, node, which = 0.0, 0, 0, 0, 0, 0
    for count in range(1, N):
        # the first child of the node taken last
        if depth < DEPTH:
            is_new = o_f == known
            row = (depth * K + which) * K if ORDERED else depth * K
            b_score = tl.where(is_new, score + tl.load(log_probabilities + row), b_score)
            b_base = tl.where(is_new, score, b_base)
            b_node = tl.where(is_new, (node << 16) | depth, b_node)
            b_place = tl.where(is_new, (which << 20) | (tile << 8) | place, b_place)
            known += 1
        best = tl.max(b_score, axis=0)
        at = tl.min(tl.where(b_score == best, o_f, FRONTIER), axis=0)
        is_best = o_f == at
        base = tl.sum(tl.where(is_best, b_base, 0.0), axis=0)
        packed_node = tl.sum(tl.where(is_best, b_node, 0), axis=0)
        packed_place = tl.sum(tl.where(is_best, b_place, 0), axis=0)
        parent, rank, above = packed_node >> 16, (packed_node >> 8) & 255, packed_node & 255
        tile, place = (packed_place >> 8) & 4095, packed_place & 255
        row = (above * K + (packed_place >> 20)) * K if ORDERED else above * K
        b_score = tl.where(is_best, float("-inf"), b_score)
        # its next sibling; where nothing is left that is possible, a node is taken again, as a leaf
        possible = best > float("-inf")
        if (rank + 1 < K) & possible:
            is_new = o_f == known
            sibling = base + tl.load(log_probabilities + row + rank + 1)
            b_score = tl.where(is_new, sibling, b_score)
            b_base = tl.where(is_new, base, b_base)
            b_node = tl.where(is_new, (parent << 16) | ((rank + 1) << 8) | above, b_node)
            b_place = tl.where(is_new, packed_place, b_place)
            known += 1
        score, depth, node = best, above + 1, count
        if (rank > 0) | (place + 1 == TILE) | (possible == 0):
            tl.debug_barrier()  # the parent's slots are read by other threads than wrote them
            b_slot = tl.load(slots + tile * (DEPTH + 1) + o_d, mask=o_d < depth, other=0)
            tile, place = n_tiles, 0
            n_tiles += 1
            tl.store(slots + tile * (DEPTH + 1) + o_d, b_slot, mask=o_d < depth)
            tl.store(tiles + TILE_COLUMNS * tile + TILE_FIRST_SLOT, tile * (DEPTH + 1))
            tl.store(tiles + TILE_COLUMNS * tile + TILE_LOWEST, start + depth + 1)
        else:
            place += 1
        end = start + depth + 1
        which = rank
        if ORDERED:
            which = tl.load(order + row + rank)
        tl.store(tokens + node, tl.load(candidates + above * K + which))
        tl.store(positions + node, end.to(tl.int64) - 1)
        tl.store(parents + node, parent)
        tl.store(scores + node, score)
        tl.store(path_tile + node, tile)
        tl.store(slots + tile * (DEPTH + 1) + depth, node)
        tl.store(rows + tile * TILE + place, node)
        tl.store(limits + tile * TILE + place, end)
        tl.store(row_segments + node, whole + 1 + (behind < end).to(tl.int32))
        tl.store(tiles + TILE_COLUMNS * tile + TILE_END, end)
        tl.store(tiles + TILE_COLUMNS * tile + TILE_CHAIN_ROW, node)

    tl.debug_barrier()  # what follows is read by other threads than wrote it
    for i in range(0, N + CONTEXT_TILES, BLOCK):
        o_t = i + o_b
        m_t, of_path = o_t < N + CONTEXT_TILES, o_t < N
        p_t = tiles + TILE_COLUMNS * tl.where(of_path, o_t, o_t + BLOCK_TILES)
        b_end = tl.where(of_path, tl.load(p_t + TILE_END, mask=m_t & of_path, other=0), start)
        b_reach = tl.where(of_path, whole + 1 + (behind < b_end).to(tl.int32), whole)
        used = m_t & ((o_t < n_tiles) | (o_t >= N))
        tl.store(p_t + TILE_CONTEXT, tl.zeros((BLOCK,), tl.int32) + start, mask=used)
        tl.store(p_t + TILE_END, b_end, mask=used)
        tl.store(p_t + TILE_REACH, b_reach, mask=used)
        tl.store(p_t + TILE_CHAIN, tl.where(of_path, b_end - 1, start), mask=used)
        tl.store(p_t + TILE_LOWEST, tl.zeros((BLOCK,), tl.int32) + start, mask=used & (o_t >= N))
    for i in range((N + BLOCK_TILES) * TILE, (N + BLOCK_TILES + CONTEXT_TILES) * TILE, BLOCK):
        m_p = i + o_b < (N + BLOCK_TILES + CONTEXT_TILES) * TILE
        b_row = tl.load(rows + i + o_b, mask=m_p, other=-1)
        tl.store(limits + i + o_b, tl.where(b_row >= 0, start, 0), mask=m_p)
    tl.debug_barrier()
    for i in range(0, N_ITEMS, BLOCK):
        o_i = i + o_b
        of_path = o_i < 2 * N
        m_i = (o_i < N_ITEMS) & (of_path | (o_i >= 2 * (N + BLOCK_TILES)))
        b_tile = tl.load(items + 2 * o_i, mask=m_i, other=0)
        b_tile = tl.where(of_path, o_i // 2, tl.where(b_tile < 0, -1 - b_tile, b_tile))
        b_there = tl.load(items + 2 * o_i + 1, mask=m_i, other=0)
        b_there = tl.where(of_path, tl.minimum(whole + o_i % 2, N_SEGMENTS - 1), b_there)
        reaches = tl.load(segments + b_there, mask=m_i, other=0) < tl.load(
            tiles + TILE_COLUMNS * b_tile + TILE_END, mask=m_i & of_path, other=0
        )
        in_path = (o_i // 2 < n_tiles) & (whole + o_i % 2 < N_SEGMENTS) & reaches
        in_context = tl.load(segments + b_there + 1, mask=m_i, other=0) <= start
        has_keys = tl.where(of_path, in_path, in_context)
        tl.store(items + 2 * o_i, tl.where(has_keys, b_tile, -1 - b_tile), mask=m_i)
        tl.store(items + 2 * o_i + 1, b_there, mask=m_i)
    if CLOCK:
        mark(clock, 1)


def grow_triton(
    tables: TreeTables, state: Tensor, log_probabilities: Tensor, candidates: Tensor,
    clock: Tensor | None = None, order: Tensor | None = None,
) -> None:  # fmt: skip
    """Grow the tree and fill its tables. One launch.

    state [>= 2] int32: where the root stands and its token. log_probabilities [P, K] fp32, likeliest first,
    of candidates [P, K] int64 at the positions behind the root; with order: both [P, K, K], order int32, of
    `rerank`. Where there are fewer possible paths than
    nodes, some come twice: the walk takes the first of equal siblings. clock [2] int32: takes the times of
    begin and end (clock.py)."""
    packed, n = tables.packed, len(tables.parents)
    depth, k = candidates.shape
    scored = (depth, k) if order is None else (depth, k, k)
    assert depth == tables.depth and log_probabilities.shape == scored and k < 256, candidates.shape
    assert order is None or (order.shape == scored and order.dtype == torch.int32 and order.is_contiguous())
    assert (log_probabilities.dtype, candidates.dtype) == (torch.float32, torch.int64), candidates.dtype
    assert log_probabilities.is_contiguous() and candidates.is_contiguous(), candidates.stride()
    assert packed.tile_rows <= 256, packed.tile_rows
    _grow_kernel[(1,)](
        start_root=state, log_probabilities=log_probabilities, order=order, candidates=candidates,
        tokens=tables.ids[0], positions=tables.ids[1], parents=tables.parents, scores=tables.scores,
        path_tile=tables.path_tile, rows=packed.rows, limits=packed.limits, tiles=packed.tiles,
        slots=packed.slots, segments=packed.segments, items=packed.items, row_segments=packed.row_segments,
        clock=clock, N=n, DEPTH=depth, K=k, N_ITEMS=len(packed.items), BLOCK_TILES=tables.block_tiles,
        CONTEXT_TILES=len(packed.tiles) - packed.path_tiles, N_SEGMENTS=packed.n_segments,
        TILE=packed.tile_rows,
        SEGMENTS=triton.next_power_of_2(packed.n_segments), FRONTIER=triton.next_power_of_2(2 * n),
        SLOTS=triton.next_power_of_2(depth + 1), BLOCK=_ITEMS,
        ORDERED=order is not None, CLOCK=clock is not None, num_warps=1,
    )  # fmt: skip
