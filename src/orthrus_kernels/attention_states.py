"""The state (maximum, sum, accumulator) of a row over some of its keys, in fp32: how it goes on with a block
of keys, how it lies in memory, and how the states of segments are folded. attention_kernels.py has the
formulas.

In memory accumulators are [C, T, H, D] and (maximum, sum) pairs [C, T, H, 2], of C segments."""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def step(b_s, b_v, b_max, b_sum, b_acc, scale):
    """One block of keys into the running (maximum, sum, accumulator). b_s: raw scores, -inf where hidden."""
    b_top, b_keep = _keep(b_max, tl.max(b_s, 1), scale)
    b_p = tl.exp2((b_s - _finite(b_top)[:, None]) * scale)
    b_sum = tl.fma(b_sum, b_keep, tl.sum(b_p, 1))
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision="ieee")
    return b_top, b_sum, b_acc


@triton.jit
def _finite(b_max):
    """0 in place of the maximum of nothing, so that -inf - -inf is not asked for."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


@triton.jit
def _keep(b_max, b_next, scale):
    """Maximum of two states of raw scores, and the factor that the first one's sum and accumulator take.

    Differences are scaled, not maxima subtracted from scaled scores: a fused multiply-add would leave the
    rounding error of a huge score in the exponent.
    """
    b_top = tl.maximum(b_max, b_next)
    return b_top, tl.exp2((b_max - _finite(b_top)) * scale)


@triton.jit
def empty(FOLDED: tl.constexpr, D: tl.constexpr):
    """(maximum, sum, accumulator) of no keys."""
    b_max = tl.full((FOLDED,), float("-inf"), tl.float32)
    return b_max, tl.zeros((FOLDED,), tl.float32), tl.zeros((FOLDED, D), tl.float32)


@triton.jit
def add(b_max, b_sum, b_acc, b_m, b_l, b_a, scale):
    """The next segment's state (b_m, b_l, b_a), folded into what has been folded so far."""
    b_top, b_keep = _keep(b_max, b_m, scale)
    b_add = tl.exp2((b_m - _finite(b_top)) * scale)
    b_sum = tl.fma(b_l, b_add, b_sum * b_keep)
    b_acc = tl.fma(b_a, b_add[:, None], b_acc * b_keep[:, None])
    return b_top, b_sum, b_acc


@triton.jit
def left(acc, stats, o_part, m_s, D: tl.constexpr):
    """The states that lie at o_part, of nothing where m_s does not hold."""
    # .cg: L1 may hold an older launch's partials
    b_m = tl.load(stats + o_part * 2, mask=m_s, other=float("-inf"), cache_modifier=".cg")
    b_l = tl.load(stats + o_part * 2 + 1, mask=m_s, other=0.0, cache_modifier=".cg")
    p_a = acc + o_part[:, None] * D + tl.arange(0, D)[None, :]
    return b_m, b_l, tl.load(p_a, mask=m_s[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def leave(acc, stats, o_part, m_s, b_max, b_sum, b_acc, D: tl.constexpr):
    """Put states to o_part, where m_s holds."""
    tl.store(acc + o_part[:, None] * D + tl.arange(0, D)[None, :], b_acc, mask=m_s[:, None])
    tl.store(stats + o_part * 2, b_max, mask=m_s)
    tl.store(stats + o_part * 2 + 1, b_sum, mask=m_s)


@triton.jit
def fold(acc, stats, o_first, m_m, stride_segment, n, scale, FOLDED: tl.constexpr, D: tl.constexpr,
          UNROLL: tl.constexpr):  # fmt: skip
    """The state of n partials each, folded in the order of the segments, the first at o_first."""
    b_max, b_sum, b_acc = empty(FOLDED, D)
    for first in range(0, n, UNROLL):
        for u in tl.static_range(UNROLL):  # a partial past n is empty: folding it changes nothing
            m_s = m_m & (first + u < n)
            o_part = o_first + (first + u) * stride_segment
            b_m, b_l, b_a = left(acc, stats, o_part, m_s, D)
            b_max, b_sum, b_acc = add(b_max, b_sum, b_acc, b_m, b_l, b_a, scale)
    return b_max, b_sum, b_acc


@triton.jit
def divided(b_sum, b_acc, m_m):
    """The output of folded states; an unused place has seen nothing."""
    b_scale = tl.div_rn(1.0, tl.where(m_m, b_sum, 1.0))
    return b_acc * b_scale[:, None]
