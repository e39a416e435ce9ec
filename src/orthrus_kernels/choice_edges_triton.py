"""The edge of filters that may lie anywhere: of top-p alone, and of top-k past what choice_top_k_triton.py
holds.

Nothing is sorted: a filter keeps a first part of the tokens in the order of (score falling, id rising), and
an **edge** is the place in this order, `in_order`, of the last token kept. Many programs a row count tokens
by bins of 1/32 below the largest score. A token's mass is known within 1/32 from its bin, so the counts bound
where an edge lies: in one bin for top-k, in a few for top-p. One more sweep writes the tokens of these bins
to a list and sums the masses of the others. One program a row halves the list until the edge is found: the
weight of all tokens from a place on is 1 each for top-k, their mass for top-p.

A row's bits: every reduction that a choice follows from has no order: maxima, counts and sums of integers.
The bounds are sums of floats, with a margin far above their rounding; they say which tokens are listed, and
the edge is the same whatever else is listed. The list is in any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .layout import TAKES_EDGES, TAKES_TOP_K, TAKES_TOP_P, Takes, slot_and_takes
from .logit_summary import INFINITY, LEAST, MINUS_INFINITY, in_order, ordered, unordered
from .rows import NO_CONTRACTION
from .scores_triton import mass, scores_of, settings, target_mass

_TILE = 1024  # tokens a program: a row of Qwen3's vocabulary fills an H100
_LIST_BLOCK = 8192  # listed tokens a step of the search
BINS = 1024  # down to 32 below the largest score, where masses are 0; the last bin holds all below
_BINS = tl.constexpr(BINS)
_A_UNIT = tl.constexpr(32)  # bins for a difference of scores of 1
# Of the bounds: an exponential is right within 2^-18 of itself; sums, masses and top-p's target are within
# 2^-20 of the total.
_MARGIN, _SLACK = tl.constexpr(2.0**-10), tl.constexpr(2.0**-18)
# Halving goes by scores first, which finds a likely edge fast, then by places, which ends after 64 steps
# whatever the scores are.
_VALUE_STEPS = tl.constexpr(16)
FIRST_PLACE = tl.constexpr(-2139095041 << 32)  # behind every token, one of score -inf too
_NO_PLACE = tl.constexpr((1 << 63) - 1)

# What a row's kernels leave to those behind them, int64.
_FIRST, _LAST = tl.constexpr(0), tl.constexpr(1)  # bins in which top-p's edge lies
_K_BIN = tl.constexpr(2)  # the bin in which top-k's edge lies; BINS: no top-k
_K_LISTED = tl.constexpr(3)  # listed tokens that top-k keeps
_LISTED = tl.constexpr(4)  # tokens in the list
_ABOVE = tl.constexpr(5)  # mass of the tokens before bin _FIRST
_UNLISTED = tl.constexpr(6)  # mass of the tokens that top-k keeps and that are not in the list
COLUMNS = 8
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def is_usual(top_key):
    """Whether the image of the largest score is that of a finite number."""
    return (top_key > MINUS_INFINITY) & (top_key < INFINITY)


@triton.jit
def _searched(numbers, slots, tops, i_r, tiles, BLOCK_TILES: tl.constexpr):
    """(whether an edge of row i_r is to be found, slot, takes, image of the largest score)."""
    slot, takes = slot_and_takes(numbers, slots, i_r)
    o = tl.arange(0, BLOCK_TILES)
    searched = ((takes & TAKES_EDGES) != 0) & ((takes & (TAKES_TOP_K | TAKES_TOP_P)) != 0)
    top_key = tl.max(tl.load(tops + i_r * tiles + o, mask=searched & (o < tiles), other=LEAST), axis=0)
    return searched & is_usual(top_key), slot, takes, top_key


@triton.jit
def _scores(
    logits, s_t, seen, s_seen, bias, numbers, slot, takes, i_r, o_v, V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr,
):  # fmt: skip
    """Scores of tokens o_v of row i_r; -inf past the vocabulary."""
    _, _, _, penalty, temperature, _, _ = settings(numbers, slot)
    if HAS_BIAS:
        bias += slot.to(tl.int64) * V
    if HAS_SEEN:
        seen += i_r * s_seen
    return scores_of(
        logits + i_r * s_t, bias, seen, o_v, o_v < V, takes, penalty, temperature, HAS_BIAS, HAS_SEEN, True
    )


@triton.jit
def _bin(score, top):
    """The bin of a score that is at most `top`, finite: never lower for a lower score."""
    return tl.minimum((top - score) * _A_UNIT, _BINS - 1.0).to(tl.int32)


@triton.jit
def _tops_kernel(
    logits, s_t, seen, s_seen, bias, tops, counts, state, numbers, slots,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile, row): the image of the tile's largest score to tops int32 [T, tiles]; zeros to counts
    int32 [T, BINS] and state int64 [T, COLUMNS]."""
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    if (takes & TAKES_EDGES) == 0:
        return
    o_v = i_n * TILE + tl.arange(0, TILE)
    b = _scores(
        logits, s_t, seen, s_seen, bias, numbers, slot, takes, i_r, o_v, V, HAS_BIAS, HAS_SEEN
    )  # fmt: skip
    tl.store(tops + i_r * tl.num_programs(0) + i_n, tl.max(tl.where(o_v < V, ordered(b), LEAST), axis=0))
    if i_n == 0:
        tl.store(counts + i_r * _BINS + tl.arange(0, _BINS), tl.zeros((_BINS,), tl.int32))
        tl.store(state + i_r * _COLUMNS + tl.arange(0, _COLUMNS), tl.zeros((_COLUMNS,), tl.int64))


@triton.jit
def _count_kernel(
    logits, s_t, seen, s_seen, bias, tops, counts, numbers, slots,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Program (tile, row): adds the tile's tokens to the counts of the row's bins."""
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    searched, slot, takes, top_key = _searched(numbers, slots, tops, i_r, tl.num_programs(0), BLOCK_TILES)
    if searched == 0:
        return
    o_v = i_n * TILE + tl.arange(0, TILE)
    b = _scores(
        logits, s_t, seen, s_seen, bias, numbers, slot, takes, i_r, o_v, V, HAS_BIAS, HAS_SEEN
    )  # fmt: skip
    b_count = tl.histogram(_bin(b, unordered(top_key)), _BINS, mask=o_v < V)
    tl.atomic_add(counts + i_r * _BINS + tl.arange(0, _BINS), b_count, mask=b_count > 0, sem="relaxed")


@triton.jit
def _bounds_kernel(
    tops, counts, state, numbers, slots, V, tiles, BLOCK_TILES: tl.constexpr
):  # fmt: skip
    """Program r: the bins of row r in which its edges lie."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.arange(0, _BINS)
    searched, slot, takes, _ = _searched(numbers, slots, tops, i_r, tiles, BLOCK_TILES)
    if searched == 0:
        return
    _, _, top_k, _, _, top_p, _ = settings(numbers, slot)
    has_k = (takes & TAKES_TOP_K) != 0
    has_p = (takes & TAKES_TOP_P) != 0
    k = tl.where(has_k, top_k, V)
    b_n = tl.load(counts + i_r * _BINS + o)
    b_upto = tl.cumsum(b_n, axis=0)
    k_bin = tl.where(has_k, tl.sum((b_upto < k).to(tl.int32), axis=0), _BINS)
    b_kept = tl.minimum(tl.maximum(k - (b_upto - b_n), 0), b_n).to(tl.float32)
    b_most = b_kept * tl.exp(o.to(tl.float32) * (-1.0 / _A_UNIT))
    b_least = tl.where(o < _BINS - 1, b_kept * tl.exp((o + 1).to(tl.float32) * (-1.0 / _A_UNIT)), 0.0)
    b_head, b_sure_head = tl.cumsum(b_most, axis=0), tl.cumsum(b_least, axis=0)
    b_rest, b_sure_rest = tl.sum(b_most, axis=0) - b_head, tl.sum(b_least, axis=0) - b_sure_head
    # A first part has the share top_p where head / top_p >= rest / (1 - top_p): near 1 the rest decides.
    slack = tl.sum(b_most, axis=0) * _SLACK
    before = b_head * (1.0 - top_p) + slack < b_sure_rest * top_p * (1.0 - _MARGIN)
    reached = b_sure_head * (1.0 - top_p) >= b_rest * top_p * (1.0 + _MARGIN) + slack
    first = tl.where(has_p, tl.sum(before.to(tl.int32), axis=0), k_bin)
    last = tl.where(has_p, tl.sum((reached == 0).to(tl.int32), axis=0), k_bin)
    last = tl.minimum(tl.minimum(last, k_bin), _BINS - 1)
    k_listed = tl.sum(tl.where((o >= first) & ((o <= last) | (o == k_bin)), b_kept, 0.0).to(tl.int32), axis=0)
    state += i_r * _COLUMNS
    tl.store(state + _FIRST, first.to(tl.int64))
    tl.store(state + _LAST, last.to(tl.int64))
    tl.store(state + _K_BIN, k_bin.to(tl.int64))
    tl.store(state + _K_LISTED, k_listed.to(tl.int64))


@triton.jit
def _list_kernel(
    logits, s_t, seen, s_seen, bias, tops, state, listed, numbers, slots,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Program (tile, row): the places of the tile's tokens in the bins of edges to listed int64 [T, V]; adds
    the masses of the others."""
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    searched, slot, takes, top_key = _searched(numbers, slots, tops, i_r, tl.num_programs(0), BLOCK_TILES)
    if searched == 0:
        return
    o_v = i_n * TILE + tl.arange(0, TILE)
    b = _scores(
        logits, s_t, seen, s_seen, bias, numbers, slot, takes, i_r, o_v, V, HAS_BIAS, HAS_SEEN
    )  # fmt: skip
    key, top = ordered(b), unordered(top_key)
    state += i_r * _COLUMNS
    first, last, k_bin = tl.load(state + _FIRST), tl.load(state + _LAST), tl.load(state + _K_BIN)
    b_bin = _bin(b, top)
    wanted = (o_v < V) & (((b_bin >= first) & (b_bin <= last)) | (b_bin == k_bin))
    place = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    n = tl.sum(wanted.to(tl.int32), axis=0)
    if n > 0:
        at = i_r * V + tl.atomic_add(state + _LISTED, n.to(tl.int64), sem="relaxed")
        tl.store(listed + at + place, in_order(key, o_v), mask=wanted)
    unlisted = tl.where((o_v < V) & (b_bin < k_bin) & (wanted == 0), mass(key, top), 0)
    tl.atomic_add(state + _UNLISTED, tl.sum(unlisted, axis=0), sem="relaxed")
    tl.atomic_add(state + _ABOVE, tl.sum(tl.where(b_bin < first, unlisted, 0), axis=0), sem="relaxed")


@triton.jit
def _weight_from(listed, n, least, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """(weight, count) of listed tokens from place `least` on."""
    b_weight = tl.zeros((BLOCK,), tl.int64)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for begin in tl.range(0, n, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        place = tl.load(listed + o, mask=o < n, other=FIRST_PLACE)
        kept = (o < n) & (place >= least)
        b_count += kept.to(tl.int32)
        if MASS:
            b_weight += tl.where(kept, mass((place >> 32).to(tl.int32), top), 0)
    count = tl.sum(b_count, axis=0)
    weight = tl.sum(b_weight, axis=0) if MASS else count.to(tl.int64)
    return weight, count


@triton.jit
def _edge(listed, n, low, first, top, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The place of the listed token at which the weight reaches `target`: at least 1, at most the weight from
    place `low` on. No listed token lies before bin `first`."""
    high = _below(first - 1, top) + (1 << 32)
    n_low, n_high = n, 0
    step = 0
    while (high > low + 1) & (n_low - n_high > 1):
        v_high = unordered((high >> 32).to(tl.int32))
        v_low = tl.maximum(unordered((low >> 32).to(tl.int32)), v_high - 64.0)
        between = ordered(0.5 * v_low + 0.5 * v_high).to(tl.int64) << 32
        middle = tl.where(step < _VALUE_STEPS, between, (low >> 1) + (high >> 1))
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        weight, count = _weight_from(listed, n, middle, top, MASS, BLOCK)
        if weight >= target:
            low, n_low = middle, count
        else:
            high, n_high = middle, count
        step += 1
    b_edge = tl.full((BLOCK,), _NO_PLACE, tl.int64)
    for begin in tl.range(0, n, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        place = tl.load(listed + o, mask=o < n, other=FIRST_PLACE)
        b_edge = tl.minimum(b_edge, tl.where((o < n) & (place >= low), place, _NO_PLACE))
    return tl.min(b_edge, axis=0)


@triton.jit
def _below(bins, top):
    """A place before all tokens of later bins, and behind all those of bins before the one before."""
    return ordered(tl.minimum(top - bins.to(tl.float32) / _A_UNIT, top)).to(tl.int64) << 32


@triton.jit
def _lowest(last, top):
    """A place behind all tokens of bins up to `last`."""
    return tl.where(last < _BINS - 1, _below(last + 2, top), FIRST_PLACE)


@triton.jit
def _edge_kernel(
    tops, state, listed, edges, row_tops, numbers, slots,
    V, tiles,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: the place of the last token that row r keeps to edges int64 [T], the image of its largest
    score to row_tops int32 [T]."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_TILES)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    if (takes & TAKES_EDGES) == 0:
        return
    _, _, _, _, _, top_p, _ = settings(numbers, slot)
    top_key = tl.max(tl.load(tops + i_r * tiles + o, mask=o < tiles, other=LEAST), axis=0)
    top, usual = unordered(top_key), is_usual(top_key)
    listed += i_r * V
    state += i_r * _COLUMNS
    first, last, k_bin = tl.load(state + _FIRST), tl.load(state + _LAST), tl.load(state + _K_BIN)
    n = tl.load(state + _LISTED).to(tl.int32)
    edge = tl.cast(FIRST_PLACE, tl.int64)
    if TOP_K:  # noqa: SIM102  when compiled; the rest when run
        if usual & ((takes & TAKES_TOP_K) != 0):
            edge = _edge(listed, n, _lowest(k_bin, top), first, top, tl.load(state + _K_LISTED), False, BLOCK)
    if TOP_P:  # noqa: SIM102
        if usual & ((takes & TAKES_TOP_P) != 0):
            own, own_count = _weight_from(listed, n, edge, top, True, BLOCK)
            total = own + tl.load(state + _UNLISTED)
            target = tl.minimum(target_mass(total, top_p), total) - tl.load(state + _ABOVE)
            edge = tl.maximum(edge, _lowest(last, top))
            edge = _edge(listed, n, edge, first, top, target, True, BLOCK)
    tl.store(edges + i_r, edge)
    tl.store(row_tops + i_r, top_key)


def edges_of(shared: dict[str, Any], takes: Takes) -> tuple[Tensor, Tensor]:
    """(edges int64 [T], images of the largest scores int32 [T]) of the rows that take edges; of others they
    hold anything. shared: what all kernels of a choice take (choice_triton.py); takes: of all rows."""
    logits = shared["logits"]
    rows, v = logits.shape
    tile = min(_TILE, max(triton.next_power_of_2(v), 64))
    tiles = triton.cdiv(v, tile)
    tops = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)
    counts = torch.empty(rows, BINS, dtype=torch.int32, device=logits.device)
    state = torch.empty(rows, COLUMNS, dtype=torch.int64, device=logits.device)
    listed = torch.empty(rows, v, dtype=torch.int64, device=logits.device)
    edges, row_tops = state.new_empty(rows), counts.new_empty(rows)

    block_tiles = triton.next_power_of_2(tiles)
    sweep: dict[str, Any] = {**shared, "tops": tops, "TILE": tile}
    del sweep["positions"]
    row = dict(tops=tops, state=state, numbers=shared["numbers"], slots=shared["slots"], V=v, tiles=tiles,
               BLOCK_TILES=block_tiles, **NO_CONTRACTION)  # fmt: skip
    _tops_kernel[(tiles, rows)](**sweep, counts=counts, state=state, num_warps=4)
    if takes & (Takes.TOP_K | Takes.TOP_P):
        _count_kernel[(tiles, rows)](**sweep, counts=counts, BLOCK_TILES=block_tiles, num_warps=4)
        _bounds_kernel[(rows,)](**row, counts=counts, num_warps=4)
        _list_kernel[(tiles, rows)](**sweep, state=state, listed=listed, BLOCK_TILES=block_tiles, num_warps=4)
    _edge_kernel[(rows,)](
        **row, listed=listed, edges=edges, row_tops=row_tops, TOP_K=bool(takes & Takes.TOP_K),
        TOP_P=bool(takes & Takes.TOP_P), BLOCK=min(_LIST_BLOCK, max(triton.next_power_of_2(v), 64)),
        num_warps=16,
    )  # fmt: skip
    return edges, row_tops
