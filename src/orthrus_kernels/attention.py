"""Dual-view attention over cached and in-flight keys, the same bits for every split, row index and neighbour.

Per row: softmax(q K^T * scale) V over the logical key sequence of the row's path (visibility.py). Keys are
cut at one constant list of absolute positions; each segment gives an fp32 partial (maximum, sum,
accumulator), and partials are folded in that order. The list never depends on context length, row count or
device: a token near an edge would get other bits than plain decoding gave it. The list is
`pass_tables.KEY_CUTS`, the kernels are in `attention_kernels.py`. Scores in fp32; probabilities
are rounded to the values' dtype before they multiply them, their sum is taken unrounded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .layout import Tile
from .pages import in_order
from .pass_tables import PassTables
from .plan import PassShape
from .tiles import ROW_TILE
from .visibility import row_sees


def attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: PassTables,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attend from every row of a pass; returns [T, H, D] in q's dtype, rows of padding undefined.

    q [T, H, D]; k, v [T, G, D]: in-flight keys and values of both views; k_cache, v_cache [P, G, PAGE, D]:
    committed ones, in the pages that `pages` [S, N] int32 says of each sequence (pages.py). No position at or
    past a sequence's context is looked up or read. H must be a multiple of G. tables: of `new_tables`,
    laid."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for tile, _ in tables.items[: tables.count].tolist():
        queries = tables.rows[tile][tables.rows[tile] >= 0]
        padded = q.new_zeros(ROW_TILE, *q.shape[1:])
        padded[: len(queries)] = q[queries]
        # a padded row sees position 0 and is dropped
        limit = torch.where(tables.rows[tile] >= 0, tables.limits[tile], 1)
        path = _Path.of(tables, tile)
        line = pages[path.sequence]
        attended = _attend_tile(padded, limit, path, k, v, k_cache, v_cache, line, scale, group)
        out[queries] = attended[: len(queries)]
    return out


def new_tables(
    shape: PassShape, capacity: int, heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device
) -> PassTables:
    """Tables for passes of a shape, of H query and G key heads of size D, whose rows stand below `capacity`;
    filled by `lay`. The twin takes all segments of a tile in turn."""
    return PassTables.new(shape, capacity, ROW_TILE, True, device)


@dataclass(frozen=True)
class _Path:
    """What the rows of a tile see, the context and then rows in flight."""

    sequence: int
    context: int
    slots: Tensor  # the rows in flight
    segments: list[tuple[int, int]]  # that hold keys of them

    @staticmethod
    def of(tables: PassTables, tile: int) -> _Path:
        line = tables.tiles[tile].tolist()
        context, edges = line[Tile.CONTEXT], tables.segments[line[Tile.BEGIN] : line[Tile.REACH] + 1].tolist()
        slots = tables.slots.flatten()[line[Tile.FIRST_SLOT] :][: line[Tile.END] - context]
        return _Path(line[Tile.SEQUENCE], context, slots, list(pairwise(edges)))


def _attend_tile(
    tile: Tensor, limit: Tensor, path: _Path, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
    pages: Tensor, scale: float, group: int,
) -> Tensor:  # fmt: skip
    """ROW_TILE queries [ROW_TILE, H, D] of one path; the `group` query heads of a key head are folded into
    rows, so keys are read once.
    """
    n, heads, d = tile.shape
    folded = (
        tile.float().view(n, heads // group, group, d).transpose(0, 1).reshape(heads // group, n * group, d)
    )
    state: tuple[Tensor, Tensor, Tensor] | None = None
    for first, last in path.segments:
        keys, values = (
            _logical(cache, pages, flight, path, first, last)
            for cache, flight in ((k_cache, k), (v_cache, v))
        )
        positions = torch.arange(first, last, device=tile.device)
        hidden = ~row_sees(positions, limit.repeat_interleave(group)[:, None])
        state = _fold(state, _partial(folded, keys, values, hidden, scale))
    assert state is not None
    _, total, acc = state
    return (acc / total).view(heads // group, n, group, d).transpose(0, 1).reshape(n, heads, d).to(tile.dtype)


def _logical(cache: Tensor, pages: Tensor, flight: Tensor, path: _Path, first: int, last: int) -> Tensor:
    """Keys (or values) of logical positions [first, last) of a path, [G, last - first, D]; zeros past its
    end.
    """
    if last <= path.context:
        return in_order(cache, pages, first, last)
    out = cache.new_zeros(cache.shape[1], last - first, cache.shape[3])
    cached = max(path.context - first, 0)
    out[:, :cached] = in_order(cache, pages, first, first + cached)
    slots = path.slots[max(first - path.context, 0) : last - path.context]
    out[:, cached : cached + len(slots)] = flight[slots].transpose(0, 1)
    return out


def _partial(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One segment's (maximum, sum, accumulator) in fp32; a row that sees nothing of it gives (-inf, 0, 0)."""
    scores = torch.bmm(q, keys.float().transpose(1, 2)) * scale
    scores = scores.masked_fill(hidden, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
    rounded = weights.to(values.dtype).float()
    return top, weights.sum(-1, keepdim=True), torch.bmm(rounded, values.float())


def _fold(
    state: tuple[Tensor, Tensor, Tensor] | None, segment: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the next segment's partial to what has been folded so far."""
    if state is None:
        return segment
    top = torch.maximum(state[0], segment[0])
    finite = top.masked_fill(top == float("-inf"), 0.0)  # a row that has seen nothing yet
    keep, add = torch.exp(state[0] - finite), torch.exp(segment[0] - finite)
    return top, state[1] * keep + segment[1] * add, state[2] * keep + segment[2] * add
