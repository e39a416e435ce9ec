"""The choice with filters whose edge may lie anywhere: top-p or min-p alone, and top-k past what
choice_top_k_triton.py holds.

One program a row, which walks the vocabulary in blocks. Nothing is sorted: a filter keeps a first part of the
tokens in the order of (score falling, id rising), and an **edge** is the pair (key, id) of the last token
kept. The key is found by bisection on the ordered-integer image of the scores, with the weight of all tokens
from a key on: 1 each for top-k, their mass for top-p. Reads a row about 20 times from L2.

A row's bits: every reduction has no order, maxima, counts and sums of integers."""

from __future__ import annotations

from ._triton import tl, triton
from .layout import TAKES_EDGES, TAKES_MIN_P, TAKES_TOP_K, TAKES_TOP_P, slot_and_takes
from .logit_summary import finite_or_zero, ordered, unordered
from .scores_triton import (
    INFINITY,
    LEAST,
    MINUS_INFINITY,
    best_of,
    better,
    gumbel_from,
    mass,
    scores_of,
    settings,
    target_mass,
)

# Bisection first halves the interval of scores, which finds a likely edge fast, then that of their images,
# which ends after 32 steps whatever the scores are.
_VALUE_STEPS = tl.constexpr(16)


@triton.jit
def _keys(scores, o_v, V, edge, last):
    """Images of scores, and whether a token is no later than the edge (edge, last)."""
    key = ordered(tl.load(scores + o_v, mask=o_v < V, other=float("-inf")))
    return key, (o_v < V) & ((key > edge) | ((key == edge) & (o_v <= last)))


@triton.jit
def _weight_from(scores, V, edge, last, least, top, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """(weight, count) of tokens no later than an edge whose key is at least `least`."""
    b_weight = tl.zeros((BLOCK,), tl.int64)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, V, BLOCK):
        key, kept = _keys(scores, first + tl.arange(0, BLOCK), V, edge, last)
        kept &= key >= least
        b_count += kept.to(tl.int32)
        if MASS:
            b_weight += tl.where(kept, mass(key, top), 0)
    count = tl.sum(b_count, axis=0)
    weight = tl.sum(b_weight, axis=0) if MASS else count.to(tl.int64)
    return weight, count


@triton.jit
def _nth(scores, V, edge, last, wanted, n, BLOCK: tl.constexpr):
    """Id of the n-th token, counted from 1, whose key is `wanted`, among those no later than an edge."""
    before, found = 0, -1
    for first in tl.range(0, V, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        key, kept = _keys(scores, o_v, V, edge, last)
        tie = (kept & (key == wanted)).to(tl.int32)
        rank = before + tl.cumsum(tie, axis=0)
        found = tl.maximum(found, tl.max(tl.where((tie > 0) & (rank <= n), o_v, -1), axis=0))
        before += tl.sum(tie, axis=0)
    return found


@triton.jit
def _edge(scores, V, edge, last, top_key, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The edge of the shortest first part, of tokens no later than an edge, whose weight reaches `target`.

    target: at least 1, at most the weight of them all. top_key: the image of the largest score."""
    top = unordered(top_key)
    # Weight from `low` on reaches the target, weight from `high` on does not.
    low = tl.cast(MINUS_INFINITY, tl.int64)
    high = top_key.to(tl.int64) + 1
    above = tl.cast(0, tl.int64)
    n_low, n_high = V, 0
    step = 0
    while (high - low > 1) & (n_low - n_high > 1):
        v_high = unordered(high.to(tl.int32))
        v_low = tl.maximum(unordered(low.to(tl.int32)), v_high - 64.0)
        between = ordered(0.5 * v_low + 0.5 * v_high).to(tl.int64)
        middle = tl.where(step < _VALUE_STEPS, between, (low + high) >> 1)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        weight, count = _weight_from(scores, V, edge, last, middle.to(tl.int32), top, MASS, BLOCK)
        if weight >= target:
            low, n_low = middle, count
        else:
            high, n_high, above = middle, count, weight
        step += 1
    key = low.to(tl.int32)
    last_tie = V  # one token from low on, below high: it is kept
    if n_low - n_high > 1:  # ties: as many of the lowest ids as reach the target
        each = tl.cast(1, tl.int64)
        if MASS:
            each = tl.maximum(mass(key, top), 1)
        n = ((target - above + each - 1) // each).to(tl.int32)
        last_tie = _nth(scores, V, edge, last, key, n, BLOCK)
    return key, last_tie


@triton.jit
def _choose_by_edges_kernel(
    logits, s_t, positions, seen, s_seen, bias, scores, perturbed, choices, numbers, slots,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    MIN_P: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, NOISE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: row r. scores: room for [T, V]. KEEP: what is compared goes to perturbed [T, V]."""
    i_r = tl.program_id(0).to(tl.int64)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    tl.store(choices + i_r, 0, mask=slot < 0)
    if (takes & TAKES_EDGES) == 0:
        return
    seed_low, seed_high, top_k, penalty, temperature, top_p, min_p = settings(numbers, slot)
    if HAS_BIAS:
        bias += slot.to(tl.int64) * V
    logits += i_r * s_t
    scores += i_r * V
    if HAS_SEEN:
        seen += i_r * s_seen
    position = tl.load(positions + i_r).to(tl.int32)

    b_top = tl.full((BLOCK,), LEAST, tl.int32)
    for first in tl.range(0, V, BLOCK):
        o_v = first + tl.arange(0, BLOCK)
        b = scores_of(logits, bias, seen, o_v, o_v < V, takes, penalty, temperature, HAS_BIAS, HAS_SEEN, True)
        tl.store(scores + o_v, b, mask=o_v < V)
        b_top = tl.maximum(b_top, tl.where(o_v < V, ordered(b), LEAST))
    tl.debug_barrier()  # scores are read by other threads than wrote them
    top_key = tl.max(b_top, axis=0)
    top = unordered(top_key)
    usual = (top_key > MINUS_INFINITY) & (top_key < INFINITY)
    k_edge, k_last, p_edge, p_last = LEAST, V, LEAST, V
    if TOP_K:  # noqa: SIM102  when compiled; the rest when run
        if usual & ((takes & TAKES_TOP_K) != 0):
            k_edge, k_last = _edge(scores, V, LEAST, V, top_key, top_k.to(tl.int64), False, BLOCK)
    if TOP_P:  # noqa: SIM102
        if usual & ((takes & TAKES_TOP_P) != 0):
            total, _ = _weight_from(scores, V, k_edge, k_last, LEAST, top, True, BLOCK)
            target = target_mass(total, top_p)
            p_edge, p_last = _edge(scores, V, k_edge, k_last, top_key, target, True, BLOCK)

    b_best = tl.full((NOISE_BLOCK,), LEAST, tl.int32)
    b_id = tl.zeros((NOISE_BLOCK,), tl.int32)
    for first in tl.range(0, V, NOISE_BLOCK):
        o_v = first + tl.arange(0, NOISE_BLOCK)
        key, kept = _keys(scores, o_v, V, k_edge, k_last)
        kept &= (key > p_edge) | ((key == p_edge) & (o_v <= p_last))
        if MIN_P:
            share = tl.exp(unordered(key) - finite_or_zero(top))
            every = (not usual) | ((takes & TAKES_MIN_P) == 0)
            kept &= (share >= min_p) | (key == top_key) | every
        if KEEP:
            gone = tl.full((NOISE_BLOCK,), float("-inf"), tl.float32)
            tl.store(perturbed + i_r * V + o_v, gone, mask=(o_v < V) & (kept == 0))
        if tl.max(kept.to(tl.int32), axis=0) > 0:  # most blocks of a filtered row have nothing to perturb
            b = unordered(key) + gumbel_from(seed_low, seed_high, position, first, NOISE_BLOCK)
            b_best, b_id = better(b_best, b_id, b, o_v, kept)
            if KEEP:
                tl.store(perturbed + i_r * V + o_v, b, mask=kept)
    _, choice = best_of(b_best, b_id)
    tl.store(choices + i_r, choice.to(tl.int64))
