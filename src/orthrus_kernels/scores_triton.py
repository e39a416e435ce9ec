"""What a choice compares, in Triton: scores (bias, penalties, temperature), masses of the filters, and noise.

Shared by the three forms of the choice (choice_triton.py), which all order tokens by (score falling, id
rising) through the ordered-integer image of a score. Beside the twin in choice.py: scores are the same bits
(divisions round to nearest), random bits too; masses are multiples of 2^-40 of the likeliest token's, so that
their sums have no order, and may move an edge by a token within 2^-20 of it; the noise differs by a few units
in the last place, measured in tests/kernels/test_choice_kernels.py."""

from __future__ import annotations

from ._triton import tl, triton
from .layout import (
    FREQUENCY,
    MIN_P,
    PRESENCE,
    REPETITION,
    SEED_HIGH,
    SEED_LOW,
    SETTINGS_COLUMNS,
    TAKES_BIAS,
    TAKES_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from .logit_summary import LEAST, ordered, unordered
from .seen import GENERATED_ONCE


@triton.jit
def settings(numbers, slot):
    """(seed low, seed high, top-k, penalty, temperature, top-p, min-p) of a slot, as `settings_numbers` lays
    them out. The penalty is three: (repetition, frequency, presence)."""
    numbers += slot * SETTINGS_COLUMNS
    return (
        tl.load(numbers + SEED_LOW), tl.load(numbers + SEED_HIGH), tl.load(numbers + TOP_K),
        (
            tl.load(numbers + REPETITION).to(tl.float32, bitcast=True),
            tl.load(numbers + FREQUENCY).to(tl.float32, bitcast=True),
            tl.load(numbers + PRESENCE).to(tl.float32, bitcast=True),
        ),
        tl.load(numbers + TEMPERATURE).to(tl.float32, bitcast=True),
        tl.load(numbers + TOP_P).to(tl.float32, bitcast=True),
        tl.load(numbers + MIN_P).to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def scores_of(
    logits, bias, seen, o_v, m_v, takes, penalty, temperature,
    HAS_BIAS: tl.constexpr, HAS_SEEN: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """What is ordered and perturbed: logits with bias and penalties, over the temperature. Of a row that
    takes no bias or no penalty, neither table is read; adding -0 and subtracting 0 change no number."""
    b = tl.load(logits + o_v, mask=m_v, other=float("-inf"))
    if HAS_BIAS:
        b += tl.load(bias + o_v, mask=m_v & ((takes & TAKES_BIAS) != 0), other=-0.0)
    if HAS_SEEN:
        repetition, frequency, presence = penalty
        b_seen = tl.load(seen + o_v, mask=m_v & ((takes & TAKES_PENALTY) != 0), other=0)
        divided = tl.math.div_rn(b, tl.full(b.shape, repetition, tl.float32))
        b = tl.where(b_seen != 0, tl.where(b > 0, divided, b * repetition), b)
        b_generated = (b_seen // GENERATED_ONCE).to(tl.float32)
        b = b - frequency * b_generated
        b = b - tl.where(b_generated > 0, presence, 0.0)
    if SAMPLED:
        b = tl.math.div_rn(b, tl.full(b.shape, temperature, tl.float32))
    return b


@triton.jit
def mass(key, top):
    """exp(score - top) in multiples of 2^-40, int64."""
    return (tl.minimum(tl.exp(unordered(key) - top), 1.0) * 1099511627776.0).to(tl.int64)


@triton.jit
def target_mass(total, top_p):
    """The mass that top-p's first part must reach, of `total`."""
    return tl.maximum((total.to(tl.float32) * top_p).to(tl.int64), 1)


@triton.jit
def minus_log1p_minus(u):
    """-log(1 - u) for u in (0, 1) within 3 units in the last place. w = 1 - u is rounded; log(w) u / (1 - w)
    mends that, since 1 - w is exact (Kahan)."""
    w = 1.0 - u
    return tl.where(w == 1.0, u, -tl.log(w) * tl.math.div_rn(u, tl.where(w == 1.0, 1.0, 1.0 - w)))


@triton.jit
def _noise(bits):
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    return -tl.log(minus_log1p_minus(u))


@triton.jit
def _random_words(seed_low, seed_high, position, group):
    """Four words for tokens 4 group + [0, 4)."""
    zero = group * 0
    return tl.philox_impl(
        group.to(tl.uint32, bitcast=True), (zero + position).to(tl.uint32, bitcast=True),
        zero.to(tl.uint32, bitcast=True), zero.to(tl.uint32, bitcast=True),
        (zero + seed_low).to(tl.uint32, bitcast=True), (zero + seed_high).to(tl.uint32, bitcast=True),
    )  # fmt: skip


@triton.jit
def gumbel_from(seed_low, seed_high, position, first, BLOCK: tl.constexpr):
    """The twin's noise for tokens first + [0, BLOCK), first a multiple of 4: [BLOCK] fp32."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = _random_words(seed_low, seed_high, position, group)
    return _noise(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit
def gumbel_at(seed_low, seed_high, position, ids):
    """The twin's noise for tokens `ids` int32, fp32 of their shape."""
    a, b, c, d = _random_words(seed_low, seed_high, position, ids // 4)
    word = ids % 4
    return _noise(tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)))


@triton.jit
def better(b_best, b_id, b, o_v, kept):
    """Running (image, id) of each lane's best score: an earlier id stays where scores are equal."""
    key = tl.where(kept, ordered(b), LEAST)
    is_better = key > b_best
    return tl.where(is_better, key, b_best), tl.where(is_better, o_v, b_id)
