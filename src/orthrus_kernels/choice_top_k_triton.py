"""The choice among the k likeliest tokens, k up to 128: what samplers ask for most.

Two launches. Programs (tile, row) leave the best score of every group of 64 tokens. Then one program a row
takes the best token k times: the best group's, whose best is then the next one of it. Filters and noise see
these k tokens only, sorted: top-p's edge is a sum over those in front. The tokens kept are those that the
search for edges (choice_edges_triton.py) keeps, and so is the choice.

A row's bits: maxima and sums of integers, which have no order; one shape whatever the pass."""

from __future__ import annotations

from ._triton import tl, triton
from .layout import TAKES_BEST, TAKES_MIN_P, TAKES_TOP_P, slot_and_takes
from .logit_summary import (
    INFINITY,
    LEAST,
    MINUS_INFINITY,
    best_of,
    finite_or_zero,
    in_order,
    ordered,
    unordered,
)
from .scores_triton import (
    gumbel_at,
    mass,
    scores_of,
    settings,
    target_mass,
)

GROUP = 64  # tokens
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _group_best_kernel(
    logits, s_t, seen, s_seen, bias, best, numbers, slots,
    V, groups,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (tile, row). best int32 [T, groups]: images, groups counted in whole tiles."""
    i_n, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    if (takes & TAKES_BEST) == 0:
        return
    _, _, _, penalty, temperature, _, _ = settings(numbers, slot)
    if HAS_BIAS:
        bias += slot.to(tl.int64) * V
    o_v = i_n * BLOCK + tl.arange(0, BLOCK)
    b = scores_of(
        logits + i_r * s_t, bias, seen + i_r * s_seen if HAS_SEEN else seen, o_v, o_v < V, takes, penalty,
        temperature, HAS_BIAS, HAS_SEEN, True,
    )  # fmt: skip
    b_key = tl.where(o_v < V, ordered(b), LEAST)
    o_g = i_n * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(best + i_r * groups + o_g, tl.max(tl.reshape(b_key, (BLOCK // GROUP, GROUP)), axis=1))


@triton.jit
def _choose_top_k_kernel(
    logits, s_t, positions, seen, s_seen, bias, best, choices, candidate_scores, candidate_ids, numbers,
    slots,
    V, groups,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program r: row r. CANDIDATES: so many of the tokens kept, best first, with what was compared go to
    candidate_scores fp32 and candidate_ids int64 [T, CANDIDATES]; -inf where fewer are kept. 0: choose."""
    i_r = tl.program_id(0).to(tl.int64)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    tl.store(choices + i_r, 0, mask=slot < 0)
    if (takes & TAKES_BEST) == 0:
        return
    seed_low, seed_high, top_k, penalty, temperature, top_p, min_p = settings(numbers, slot)
    if HAS_BIAS:
        bias += slot.to(tl.int64) * V
    logits += i_r * s_t
    if HAS_SEEN:
        seen += i_r * s_seen
    o_g, o_k = tl.arange(0, BLOCK_GROUPS), tl.arange(0, BLOCK_K)
    b_best = tl.load(best + i_r * groups + o_g, mask=o_g < groups, other=LEAST)

    b_key, b_id = tl.full((BLOCK_K,), LEAST, tl.int32), tl.full((BLOCK_K,), _NO_TOKEN, tl.int32)
    last_key, last_id = _NO_TOKEN, -1
    for j in tl.range(0, top_k):
        wanted, group = best_of(b_best, o_g)
        o_v = group * GROUP + tl.arange(0, GROUP)
        b = scores_of(logits, bias, seen, o_v, o_v < V, takes, penalty, temperature, HAS_BIAS, HAS_SEEN, True)
        key = ordered(b)
        # taken are those no later than the last one, in the order of (score falling, id rising)
        left = (o_v < V) & ((key < last_key) | ((key == last_key) & (o_v > last_id)))
        token = tl.min(tl.where(left & (key == wanted), o_v, _NO_TOKEN), axis=0)
        following = tl.max(tl.where(left & (o_v != token), key, LEAST), axis=0)
        b_best = tl.where(o_g == group, following, b_best)
        b_key, b_id = tl.where(o_k == j, wanted, b_key), tl.where(o_k == j, token, b_id)
        last_key, last_id = wanted, token

    kept = o_k < top_k
    top_key = tl.max(b_key, axis=0)
    top = unordered(top_key)
    usual = (top_key > MINUS_INFINITY) & (top_key < INFINITY)
    if TOP_P:
        b_mass = tl.where(kept, mass(tl.where(kept & usual, b_key, 0), finite_or_zero(top)), 0)
        before = tl.cumsum(b_mass, axis=0) - b_mass
        every = (not usual) | ((takes & TAKES_TOP_P) == 0)
        kept &= (before < target_mass(tl.sum(b_mass, axis=0), top_p)) | every
    if MIN_P:
        share = tl.exp(unordered(b_key) - finite_or_zero(top))
        every = (not usual) | ((takes & TAKES_MIN_P) == 0)
        kept &= (share >= min_p) | (b_key == top_key) | every
    b = unordered(b_key) + gumbel_at(seed_low, seed_high, tl.load(positions + i_r).to(tl.int32), b_id)
    b_perturbed = tl.where(kept, ordered(b), LEAST)
    if CANDIDATES:
        # A token's place is the number of those in front of it; no two are equal.
        LAST: tl.constexpr = -(1 << 63)
        b_order = tl.where(o_k < top_k, in_order(b_perturbed, b_id), LAST + (BLOCK_K - o_k).to(tl.int64))
        place = tl.sum((b_order[None, :] > b_order[:, None]).to(tl.int32), axis=1)
        out = i_r * CANDIDATES + place
        tl.store(candidate_scores + out, tl.where(kept, b, float("-inf")), mask=place < CANDIDATES)
        tl.store(candidate_ids + out, tl.where(o_k < top_k, b_id, 0).to(tl.int64), mask=place < CANDIDATES)
    else:
        _, choice = best_of(b_perturbed, b_id)
        tl.store(choices + i_r, choice.to(tl.int64))
