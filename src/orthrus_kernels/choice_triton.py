"""The choice of a token in Triton: `choose`, `candidates`, `log_sum_exp` of choice.py on written logits.

Two algorithms, by a row's own settings alone: with top-k up to 128 the k best tokens first
(choice_top_k_triton.py); otherwise the best of all tokens kept, by many programs a row (here), once the edge
of a filter is found (choice_edges_triton.py). What no row of the table's form takes is not launched. In a
mixed pass each kernel returns at once from rows that do not take it. Scores and noise are one definition
(scores_triton.py). A row's bits: every reduction, in both, is a maximum or a sum of integers, which have
no order; a candidate's log-probability is a sum within its row, of constant shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import tl, triton
from .choice_edges_triton import FIRST_PLACE, edges_of, is_usual
from .choice_top_k_triton import GROUP, _choose_top_k_kernel, _group_best_kernel
from .layout import (
    TAKES_EDGES,
    TAKES_GREEDY,
    TAKES_MIN_P,
    TAKES_SAMPLED,
    Settings,
    Takes,
    slot_and_takes,
)
from .logit_summary import (
    LEAST,
    MOST,
    best_of,
    finite_or_zero,
    in_order,
    ordered,
    summary_of_logits,
    unordered,
)
from .rows import NO_CONTRACTION
from .sampling_table import SamplingTable
from .scores_triton import better, gumbel_from, scores_of, settings

_TILE = 4096  # tokens a program where a row has several
_NOISE_BLOCK = 2048  # tokens a step where noise is drawn: random bits take registers (8192: spills, sm_90)
_BY_TILES = Takes.GREEDY | Takes.SAMPLED | Takes.EDGES


@triton.jit
def _tile_best_kernel(
    logits, s_t, positions, seen, s_seen, bias, edges, row_tops, perturbed, keys, ids, numbers, slots,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, SAMPLED: tl.constexpr, EDGES: tl.constexpr,
    MIN_P: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (tile, row): image and id int32 of the tile's best token to keys and ids [T, tiles]. SAMPLED:
    some rows are, the others greedy. EDGES: some of these keep the tokens up to their place in edges [T] and
    have their largest score in row_tops [T]. KEEP: what is compared goes to perturbed [T, V]."""
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    if (takes & (TAKES_GREEDY | TAKES_SAMPLED | TAKES_EDGES)) == 0:
        return
    seed_low, seed_high, _, penalty, temperature, _, min_p = settings(numbers, slot)
    sampled = (takes & TAKES_GREEDY) == 0
    filtered = (takes & TAKES_EDGES) != 0
    if EDGES:
        edge = tl.load(edges + i_r, mask=filtered, other=FIRST_PLACE)
        top_key = tl.load(row_tops + i_r, mask=filtered, other=0)
        top = finite_or_zero(unordered(top_key))
        every = (not is_usual(top_key)) | ((takes & TAKES_MIN_P) == 0)
    temperature = tl.where(sampled, temperature, 1.0)  # dividing by 1 changes no number
    if HAS_BIAS:
        bias += slot.to(tl.int64) * V
    logits += i_r * s_t
    if HAS_SEEN:
        seen += i_r * s_seen
    position = tl.load(positions + i_r).to(tl.int32)
    b_best = tl.full((BLOCK,), LEAST, tl.int32)
    b_id = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(i_n * TILE, (i_n + 1) * TILE, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        b = scores_of(
            logits, bias, seen, o_v, o_v < V, takes, penalty, temperature, HAS_BIAS, HAS_SEEN, SAMPLED
        )
        kept, noisy = o_v < V, sampled
        if EDGES:
            key = ordered(b)
            kept &= in_order(key, o_v) >= edge
            if MIN_P:
                kept &= (tl.exp(b - top) >= min_p) | (key == top_key) | every
            b = tl.where(kept, b, float("-inf"))
            noisy &= tl.max(kept.to(tl.int32), axis=0) > 0  # most blocks of a filtered row keep nothing
        if SAMPLED:  # noqa: SIM102  when compiled; the rest when run
            if noisy:
                b += gumbel_from(seed_low, seed_high, position, first, BLOCK)
        b_best, b_id = better(b_best, b_id, b, o_v, kept)
        if KEEP:
            tl.store(perturbed + i_r * V + o_v, b, mask=o_v < V)
    key, id = best_of(b_best, b_id)
    at = i_r * tl.num_programs(0) + i_n
    tl.store(keys + at, key)
    tl.store(ids + at, id)


@triton.jit
def _row_best_kernel(keys, ids, choices, numbers, slots, tiles, BLOCK: tl.constexpr):
    """Program r: row r, the best of its tiles."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    tl.store(choices + i_r, 0, mask=slot < 0)
    if (takes & (TAKES_GREEDY | TAKES_SAMPLED | TAKES_EDGES)) == 0:
        return
    b_key = tl.load(keys + i_r * tiles + o, mask=o < tiles, other=LEAST)
    b_id = tl.load(ids + i_r * tiles + o, mask=o < tiles, other=0x7FFFFFFF)
    _, choice = best_of(b_key, b_id)
    tl.store(choices + i_r, choice.to(tl.int64))


@triton.jit
def _log_probabilities_kernel(
    scores, ids, sums, numbers, slots, K, GREEDY: tl.constexpr, BLOCK: tl.constexpr
):
    """Program r: scores [T, K] of row r become log-probabilities, shares among the K where there is noise;
    of a padding row zeros, ids too. sums [T]: log-sum-exp of greedy rows."""
    i_r, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    at = i_r * K + o
    b = tl.load(scores + at, mask=(o < K) & (slot >= 0), other=float("-inf"))
    top = finite_or_zero(tl.max(tl.where(b == b, b, float("-inf")), axis=0))
    total = tl.sum(tl.exp(b - top), axis=0)
    b_share = b - top - tl.log(tl.where(total == 0, 1.0, total))
    if GREEDY:
        b_share = tl.where((takes & TAKES_GREEDY) != 0, b - tl.load(sums + i_r), b_share)
    tl.store(scores + at, tl.where(slot < 0, 0.0, b_share), mask=o < K)
    tl.store(ids + at, tl.zeros((BLOCK,), tl.int64), mask=(o < K) & (slot < 0))


def choose_triton(
    logits: Tensor, positions: Tensor, table: SamplingTable, slots: Tensor, seen: Tensor | None = None, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`choose` in Triton; `out` [T] int64 takes the result. Rows of logits and seen must be contiguous. What
    is launched follows from `table.form` alone, which has to cover every row's slot."""
    rows = len(logits)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    assert out.is_contiguous() and out.dtype == torch.int64 and out.shape == (rows,), (out.dtype, out.shape)
    if rows == 0:
        return out
    shared, form = _arguments(logits, positions, table, slots, seen), table.form
    if form.takes & _BY_TILES:
        _by_tiles(shared, form.takes, choices=out)
    if form.takes & Takes.BEST:
        _top_k(shared, form.takes, form.room, choices=out)
    return out


def candidates_triton(
    logits: Tensor, positions: Tensor, table: SamplingTable, slots: Tensor, k: int, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`candidates` in Triton; k up to 128, arguments as for `choose_triton`."""
    rows, v = logits.shape
    if not 1 <= k <= min(v, MOST):
        raise ValueError(f"candidates: k is {k}, must be in 1..{MOST}, the vocabulary has {v} tokens")
    shared, (takes, room) = _arguments(logits, positions, table, slots, seen), table.form
    choices, sums = positions.new_empty(rows), None
    if takes & _BY_TILES:
        perturbed = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _by_tiles(shared, takes, choices, perturbed)
        scores, ids, sums = summary_of_logits(perturbed, k)  # of other rows it means nothing
    else:
        scores, ids = logits.new_empty(rows, k), positions.new_empty(rows, k)
    if takes & Takes.BEST:
        _top_k(shared, takes, max(room, triton.next_power_of_2(k)), choices, (scores, ids))
    if rows:
        _log_probabilities_kernel[(rows,)](
            scores=scores, ids=ids, sums=sums, numbers=table.numbers, slots=slots, K=k,
            GREEDY=bool(takes & Takes.GREEDY), BLOCK=triton.next_power_of_2(k), num_warps=1,
            **NO_CONTRACTION,
        )  # fmt: skip
    return scores, ids


def _arguments(
    logits: Tensor, positions: Tensor, table: SamplingTable, slots: Tensor, seen: Tensor | None
) -> dict[str, Any]:
    """What all algorithms take, checked."""
    rows, v = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert positions.dtype == torch.int64 and positions.shape == (rows,), (positions.dtype, positions.shape)
    assert slots.dtype == torch.int32 and slots.shape == (rows,), (slots.dtype, slots.shape)
    assert positions.is_contiguous() and slots.is_contiguous(), (positions.stride(), slots.stride())
    numbers, takes = table.numbers, table.form.takes
    assert numbers.is_contiguous() and numbers.shape[1] == len(Settings) and v == table.vocabulary, v
    bias = table.bias if takes & Takes.BIAS else None
    seen = seen if takes & Takes.PENALTY else None
    if seen is not None:
        assert seen.dtype == torch.int32 and seen.shape == logits.shape and seen.stride(1) == 1, seen.shape
    return dict(
        logits=logits, s_t=logits.stride(0) if rows > 1 else v, positions=positions, seen=seen,
        s_seen=seen.stride(0) if seen is not None and rows > 1 else v, bias=bias, numbers=numbers,
        slots=slots, V=v, HAS_BIAS=bias is not None, HAS_SEEN=seen is not None, **NO_CONTRACTION,
    )  # fmt: skip


def _by_tiles(shared: dict[str, Any], takes: Takes, choices: Tensor, perturbed: Tensor | None = None) -> None:
    logits = shared["logits"]
    rows, v = logits.shape
    tile = min(_TILE, max(triton.next_power_of_2(v), 64))
    tiles = triton.cdiv(v, tile)
    keys, ids = torch.empty(2, rows, tiles, dtype=torch.int32, device=logits.device)
    edges, row_tops = edges_of(shared, takes) if takes & Takes.EDGES else (None, None)
    _tile_best_kernel[(tiles, rows)](
        **shared, edges=edges, row_tops=row_tops, perturbed=perturbed, keys=keys, ids=ids,
        SAMPLED=bool(takes & (Takes.SAMPLED | Takes.EDGES)), EDGES=edges is not None,
        MIN_P=bool(takes & Takes.MIN_P), KEEP=perturbed is not None, TILE=tile,
        BLOCK=min(_NOISE_BLOCK, tile), num_warps=8,
    )  # fmt: skip
    _row_best_kernel[(rows,)](
        keys=keys, ids=ids, choices=choices, numbers=shared["numbers"], slots=shared["slots"], tiles=tiles,
        BLOCK=triton.next_power_of_2(tiles), num_warps=1,
    )  # fmt: skip


def _top_k(
    shared: dict[str, Any],
    takes: Takes,
    room: int,
    choices: Tensor,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:
    logits = shared["logits"]
    rows, v = logits.shape
    tile = min(_TILE, max(triton.next_power_of_2(v), GROUP))
    tiles = triton.cdiv(v, tile)
    groups = tiles * (tile // GROUP)
    keys = torch.empty(rows, groups, dtype=torch.int32, device=logits.device)
    without_noise = {name: value for name, value in shared.items() if name != "positions"}
    _group_best_kernel[(tiles, rows)](
        **without_noise, best=keys, groups=groups, BLOCK=tile, GROUP=GROUP, num_warps=4
    )
    _choose_top_k_kernel[(rows,)](
        **shared, best=keys, choices=choices, candidate_scores=best and best[0],
        candidate_ids=best and best[1], groups=groups, TOP_P=bool(takes & Takes.TOP_P),
        MIN_P=bool(takes & Takes.MIN_P), CANDIDATES=best[0].shape[1] if best else 0, BLOCK_K=room,
        BLOCK_GROUPS=triton.next_power_of_2(groups), GROUP=GROUP, num_warps=8,
    )  # fmt: skip


def likeliest_triton(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`likeliest` in Triton, k up to 128, with the sums of `log_sum_exp_triton`."""
    return summary_of_logits(logits, k)


def log_sum_exp_triton(logits: Tensor) -> Tensor:
    """`log_sum_exp` in Triton for logits [T, V] fp32, with the bits of `head`'s."""
    return summary_of_logits(logits, 1)[2]
