"""The choice of a token in Triton: `choose` and `log_probability` of choice.py on written logits.

One program a row, which walks the vocabulary in blocks: scores (bias, penalty, temperature), the edges of
top-k and top-p, then noise and argmax of what is kept. Nothing is sorted: tokens are in the order of (score
falling, id rising), a filter keeps a first part of it, and an **edge** is the pair (key, id) of the last
token kept. The key is found by bisection on the ordered-integer image of the scores, with the weight of all
tokens from a key on: 1 each for top-k, their mass for top-p. Reads a row once for greedy and unfiltered
choices, about 20 times from L2 for a filter.

A row's bits. Every reduction has no order, as in logit_summary.py: maxima, counts, and masses that are
multiples of 2^-40 of the likeliest token's. Beside the twin: scores are the same bits (divisions round to
nearest), random bits too; masses are rounded otherwise and may move an edge by a token within 2^-20 of it,
the noise differs by a few units in the last place, measured in tests/kernels/test_choice_kernels.py."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._triton import tl, triton
from .choice import Sampling
from .logit_summary import finite_or_zero, ordered, summary_of_logits, unordered
from .rows import NO_CONTRACTION

_BLOCK = 8192  # tokens a step: what one program keeps in flight
_NOISE_BLOCK = 2048  # tokens a step where noise is drawn: random bits take registers (8192: spills, sm_90)
_LEAST = tl.constexpr(-(1 << 31))  # below the image of every number
_MINUS_INFINITY = tl.constexpr(-2139095041)  # images of the infinities
_INFINITY = tl.constexpr(2139095040)
# Bisection first halves the interval of scores, which finds a likely edge fast, then that of their images,
# which ends after 32 steps whatever the scores are.
_VALUE_STEPS = tl.constexpr(16)


@triton.jit
def _minus_log1p_minus(u):
    """-log(1 - u) for u in (0, 1) within 3 units in the last place. w = 1 - u is rounded; log(w) u / (1 - w)
    mends that, since 1 - w is exact (Kahan)."""
    w = 1.0 - u
    return tl.where(w == 1.0, u, -tl.log(w) * tl.math.div_rn(u, tl.where(w == 1.0, 1.0, 1.0 - w)))


@triton.jit
def _gumbel(seed_low, seed_high, position, first, BLOCK: tl.constexpr):
    """The twin's noise for tokens first + [0, BLOCK), first a multiple of 4: [BLOCK] fp32."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    zero = group * 0
    a, b, c, d = tl.philox_impl(
        group.to(tl.uint32, bitcast=True), (zero + position).to(tl.uint32, bitcast=True),
        zero.to(tl.uint32, bitcast=True), zero.to(tl.uint32, bitcast=True),
        (zero + seed_low).to(tl.uint32, bitcast=True), (zero + seed_high).to(tl.uint32, bitcast=True),
    )  # fmt: skip
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    return -tl.log(_minus_log1p_minus(u))


@triton.jit
def _scores(
    logits, bias, seen, o_v, m_v, penalty, temperature,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """What is ordered and perturbed: logits with bias and penalty, over the temperature."""
    b = tl.load(logits + o_v, mask=m_v, other=float("-inf"))
    if HAS_BIAS:
        b += tl.load(bias + o_v, mask=m_v, other=0.0)
    if HAS_SEEN:
        b_seen = tl.load(seen + o_v, mask=m_v, other=0) != 0
        divided = tl.math.div_rn(b, tl.full(b.shape, penalty, tl.float32))
        b = tl.where(b_seen, tl.where(b > 0, divided, b * penalty), b)
    if SAMPLED:
        b = tl.math.div_rn(b, tl.full(b.shape, temperature, tl.float32))
    return b


@triton.jit
def _mass(key, top):
    """exp(score - top) in multiples of 2^-40, int64."""
    return (tl.minimum(tl.exp(unordered(key) - top), 1.0) * 1099511627776.0).to(tl.int64)


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
            b_weight += tl.where(kept, _mass(key, top), 0)
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
    low = tl.cast(_MINUS_INFINITY, tl.int64)
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
            each = tl.maximum(_mass(key, top), 1)
        n = ((target - above + each - 1) // each).to(tl.int32)
        last_tie = _nth(scores, V, edge, last, key, n, BLOCK)
    return key, last_tie


@triton.jit
def _better(b_best, b_id, b, o_v, kept):
    """Running (image, id) of each lane's best score: an earlier id stays where scores are equal."""
    key = tl.where(kept, ordered(b), _LEAST)
    better = key > b_best
    return tl.where(better, key, b_best), tl.where(better, o_v, b_id)


@triton.jit
def _choose_kernel(
    logits, s_t, positions, seen, s_seen, bias, scores, perturbed, choices, numbers,
    V,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, SAMPLED: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
    NOISE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program r: row r. scores: room for [T, V] where there are filters, which read them again. KEEP: what is
    compared goes to perturbed [T, V]. numbers: of the settings, as `choice_numbers` makes them."""
    seed_low, seed_high, top_k = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    penalty = tl.load(numbers + 3).to(tl.float32, bitcast=True)
    temperature = tl.load(numbers + 4).to(tl.float32, bitcast=True)
    top_p = tl.load(numbers + 5).to(tl.float32, bitcast=True)
    min_p = tl.load(numbers + 6).to(tl.float32, bitcast=True)
    i_r = tl.program_id(0).to(tl.int64)
    logits += i_r * s_t
    if HAS_SEEN:
        seen += i_r * s_seen
    b_best = tl.full((NOISE_BLOCK,), _LEAST, tl.int32)
    b_id = tl.zeros((NOISE_BLOCK,), tl.int32)
    FILTERS: tl.constexpr = SAMPLED and (TOP_K or TOP_P or MIN_P)
    position = tl.load(positions + i_r).to(tl.int32)

    if FILTERS:
        scores += i_r * V
        b_top = tl.full((BLOCK,), _LEAST, tl.int32)
        for first in tl.range(0, V, BLOCK):
            o_v = first + tl.arange(0, BLOCK)
            b = _scores(logits, bias, seen, o_v, o_v < V, penalty, temperature, HAS_BIAS, HAS_SEEN, SAMPLED)
            tl.store(scores + o_v, b, mask=o_v < V)
            b_top = tl.maximum(b_top, tl.where(o_v < V, ordered(b), _LEAST))
        tl.debug_barrier()  # scores are read by other threads than wrote them
        top_key = tl.max(b_top, axis=0)
        top = unordered(top_key)
        usual = (top_key > _MINUS_INFINITY) & (top_key < _INFINITY)
        k_edge, k_last, p_edge, p_last = _LEAST, V, _LEAST, V
        if TOP_K:  # noqa: SIM102  when compiled; the rest when run
            if usual & (top_k < V):
                k_edge, k_last = _edge(scores, V, _LEAST, V, top_key, top_k.to(tl.int64), False, BLOCK)
        if TOP_P:  # noqa: SIM102
            if usual:
                total, _ = _weight_from(scores, V, k_edge, k_last, _LEAST, top, True, BLOCK)
                target = tl.maximum((total.to(tl.float32) * top_p).to(tl.int64), 1)
                p_edge, p_last = _edge(scores, V, k_edge, k_last, top_key, target, True, BLOCK)
        for first in tl.range(0, V, NOISE_BLOCK):
            o_v = first + tl.arange(0, NOISE_BLOCK)
            key, kept = _keys(scores, o_v, V, k_edge, k_last)
            kept &= (key > p_edge) | ((key == p_edge) & (o_v <= p_last))
            if MIN_P:
                share = tl.exp(unordered(key) - finite_or_zero(top))
                kept &= (share >= min_p) | (key == top_key) | (not usual)
            if KEEP:
                gone = tl.full((NOISE_BLOCK,), float("-inf"), tl.float32)
                tl.store(perturbed + i_r * V + o_v, gone, mask=(o_v < V) & (kept == 0))
            if tl.max(kept.to(tl.int32), axis=0) > 0:  # most blocks of a filtered row have nothing to perturb
                b = unordered(key) + _gumbel(seed_low, seed_high, position, first, NOISE_BLOCK)
                b_best, b_id = _better(b_best, b_id, b, o_v, kept)
                if KEEP:
                    tl.store(perturbed + i_r * V + o_v, b, mask=kept)
    else:
        for first in tl.range(0, V, NOISE_BLOCK):
            o_v = first + tl.arange(0, NOISE_BLOCK)
            b = _scores(logits, bias, seen, o_v, o_v < V, penalty, temperature, HAS_BIAS, HAS_SEEN, SAMPLED)
            if SAMPLED:
                b += _gumbel(seed_low, seed_high, position, first, NOISE_BLOCK)
            b_best, b_id = _better(b_best, b_id, b, o_v, o_v < V)
            if KEEP:
                tl.store(perturbed + i_r * V + o_v, b, mask=o_v < V)
    choice = tl.min(tl.where(b_best == tl.max(b_best, axis=0), b_id, 0x7FFFFFFF), axis=0)
    tl.store(choices + i_r, choice.to(tl.int64))


def choose_triton(
    logits: Tensor, positions: Tensor, sampling: Sampling, seen: Tensor | None = None, *,
    out: Tensor | None = None, numbers: Tensor | None = None, bias: Tensor | None = None,
    perturbed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`choose` as one Triton launch; `out` [T] int64 takes the result, and perturbed [T, V] fp32 the scores
    that were compared, those of `candidate_scores`.

    numbers, bias: those of `choice_numbers` and `bias_table`, on the device already: a captured graph reads
    whatever lies there, for any settings with the same `choice_form`, with a bias or without one. Left out,
    they are copied there. Rows of logits and seen must be contiguous."""
    rows, v = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert positions.dtype == torch.int64 and positions.shape == out.shape == (rows,), positions.shape
    assert positions.is_contiguous() and out.is_contiguous() and out.dtype == torch.int64, out.dtype
    if sampling.repetition_penalty == 1.0:
        seen = None
    if seen is not None:
        assert seen.dtype == torch.bool and seen.shape == logits.shape and seen.stride(1) == 1, seen.shape
        seen = seen.view(torch.uint8)
    if rows == 0:
        return out
    if bias is None and sampling.logit_bias:
        bias = bias_table(tuple(sampling.logit_bias.items()), v, logits.device)
    if numbers is None:
        numbers = _numbers_on(
            logits.device, v, seed=sampling.seed, top_k=sampling.top_k, top_p=sampling.top_p,
            min_p=sampling.min_p, temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
    assert numbers.dtype == torch.int32 and numbers.shape == (8,), (numbers.dtype, numbers.shape)
    if perturbed is not None:
        assert perturbed.shape == (rows, v) and perturbed.is_contiguous(), (perturbed.shape, rows, v)
        assert perturbed.dtype == torch.float32, perturbed.dtype
    sampled, by_k, by_p, by_min = choice_form(sampling, v)
    block = max(triton.next_power_of_2(v), 64)
    scores = torch.empty(rows, v, device=logits.device) if sampling.filters else None
    _choose_kernel[(rows,)](
        logits=logits, s_t=logits.stride(0) if rows > 1 else v, positions=positions, seen=seen,
        s_seen=seen.stride(0) if seen is not None and rows > 1 else v, bias=bias, scores=scores,
        perturbed=perturbed, choices=out,
        numbers=numbers, V=v, HAS_BIAS=bias is not None, HAS_SEEN=seen is not None, SAMPLED=sampled,
        TOP_K=by_k, TOP_P=by_p, MIN_P=by_min, KEEP=perturbed is not None,
        BLOCK=min(_BLOCK, block), num_warps=16,
        NOISE_BLOCK=min(_NOISE_BLOCK if sampling.temperature > 0 else _BLOCK, block), **NO_CONTRACTION,
    )  # fmt: skip
    return out


def choice_form(sampling: Sampling, vocabulary: int) -> tuple[bool, bool, bool, bool]:
    """What a launch of the choice follows from: (sampled, by top-k, by top-p, by min-p)."""
    return sampling.temperature > 0, 0 < sampling.top_k < vocabulary, sampling.top_p < 1, sampling.min_p > 0


def choice_numbers(sampling: Sampling, vocabulary: int) -> Tensor:
    """The settings as the kernel reads them, [8] int32 on the CPU: seed low and high, top-k, and the bits of
    repetition penalty, temperature, top-p, min-p in fp32."""
    whole = [_signed32(sampling.seed), _signed32(sampling.seed >> 32), min(int(sampling.top_k), vocabulary)]
    parts = [sampling.repetition_penalty, sampling.temperature, sampling.top_p, sampling.min_p, 0.0]
    bits = torch.tensor(parts, dtype=torch.float32, device="cpu").view(torch.int32)
    return torch.cat([torch.tensor(whole, dtype=torch.int32, device="cpu"), bits])


@lru_cache(maxsize=16)
def _numbers_on(device: torch.device, vocabulary: int, **settings: float) -> Tensor:
    """`choice_numbers` on a device: copied once for a text, not once a choice."""
    return choice_numbers(Sampling(**settings), vocabulary).to(device)  # type: ignore[arg-type]


def _signed32(x: int) -> int:
    """The low 32 bits of x as an int32, which is what a kernel takes."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


@lru_cache(maxsize=16)
def bias_table(items: tuple[tuple[int, float], ...], vocabulary: int, device: torch.device) -> Tensor:
    """[V] fp32: the bias of every token."""
    bias = torch.zeros(vocabulary, dtype=torch.float32, device="cpu")
    for token, value in items:
        bias[token] += value
    return bias.to(device)


def log_probability_triton(logits: Tensor, ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`log_probability` in Triton for logits [T, V] fp32; `out` [T] fp32 takes the result. The log-sum-exp
    has the bits of `head`'s."""
    _, _, log_sum_exp = summary_of_logits(logits, 1)
    return torch.sub(logits.gather(1, ids[:, None])[:, 0], log_sum_exp, out=out)
