"""Candidates of a draft, ranked anew behind each candidate before them: the bigram correction.

A block's positions know nothing of each other, and a draft knows the token in front of every node. A low-rank
table learnt behind distillation (qwen3_model/training/bigram.py) says what that token changes:

    score[p, a, c] = factor[o] * log_probability[p, c] + scale * u[token before] . w[candidate c]
    rest[p]        = factor[o] * log(1 - all candidates) + weight[o]

then normalised so that the candidates of a position and all that is not among them, the rest, sum to 1 again;
a is the candidate of position p - 1 of the same block that stands before, the block's root before position 0;
o is the position's offset in its block. Scores stay log-probabilities not above 0, which the tree's order
needs (draft_tree.py). Factors and weights are the **calibration** (qwen3_model/training/calibration.py): a
view learnt as probabilities is too modest about a target that says its likeliest token, and what a draft
promises, anchors and the rows of texts go by these scores. One set is for temperature 0, one for all above.
Factors of 1 and weights of 0 change nothing.

The tables say the same of a pair of tokens wherever it stands. A **gate** lets the view's state say which
pairs are meant: the last R' columns of the tables are weighed by numbers of the position,

    change[p, a, c] = u[a] . w[c] + (A e[a] * (1 + gate[p] + place[o])) . (B e[c])        gate[p] = G h[p]

where e are embedding rows and h[p] is the state behind the final norm from which position p's candidates were
drawn. A selector (qwen3_model/selector.py) brings A, B, G and place; u, A e and w, B e stand side by side in
the tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import tl, triton

LEAST_REST = 1e-6  # of probability that is not among the candidates
_GATED_AT_ONCE = 64  # columns of the tables: 32 registers a thread of the candidates' rows
_MOST = 1e30  # a change beyond it, or none at all, comes of damaged tables


def changes(
    fronts: Tensor, ids: Tensor, before: Tensor, after: Tensor, gate: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What tables [V, R] add to candidates ids [B, P, K] behind tokens fronts [B, P, A]: [B, P, A, K] fp32.
    gate [B, P, R'], places [P, R']: of the positions, where the last R' columns are weighed."""
    front = F.embedding(fronts, before).float()  # whose gradient is fast where tokens are the same
    if gate is not None and places is not None:
        weighed = front[..., -gate.shape[-1] :] * (1 + gate + places)[:, :, None]
        front = torch.cat([front[..., : -gate.shape[-1]], weighed], -1)
    return torch.einsum("bpar,bpcr->bpac", front, F.embedding(ids, after).float())


def rerank(
    log_probabilities: Tensor, ids: Tensor, roots: Tensor, before: Tensor, after: Tensor, calibration: Tensor,
    scales: Tensor, temperatures: Tensor, slots: Tensor, known: bool, gate: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rank K candidates of P positions behind each candidate before them, in each of B blocks.

    log_probabilities [B, P, K] fp32, of candidates ids [B, P, K] int64, likeliest first. roots [B], of
    whole numbers: the token in front of each block's position 0. before, after [V, R]: the tables u and w.
    calibration [2, D, 2] fp32: at temperature 0 and above, factor and weight of offsets 0 to D - 1. scales
    [S] fp32: 1 / temperature of each slot; temperatures [S] fp32. slots [B] int32: the blocks' texts; -1:
    padding, whose root and settings are not read. known: the drafter has seen the root, and position 0,
    offset 0 of its block, keeps its order; else it is offset 1, as the root stands at offset 0. gate [B, P,
    R'] fp32: of each position, with places [D, R'] fp32 by offset; None: no column of the tables is
    weighed. Returns scores [B, P, K, K] fp32, likeliest first at equal ones in the old order, and which
    candidate each is, [B, P, K, K] int32."""
    b, p, k = ids.shape
    fronts = torch.where(slots >= 0, roots, 0).long()[:, None, None].expand(b, 1, k)
    fronts = torch.cat([fronts, ids[:, :-1]], 1)  # [B, P, K]
    scale = torch.where(slots >= 0, scales[slots.clamp(min=0).long()], 0.0)[:, None, None, None]
    offset = int(not known)
    placed = None if places is None else places[offset : offset + p]
    change = changes(fronts, ids, before, after, gate, placed) * scale
    change = change.nan_to_num(0.0).clamp(-_MOST, _MOST)
    if known:
        change[:, 0] = 0
    above = torch.where(slots >= 0, temperatures[slots.clamp(min=0).long()], 0.0) > 0
    factor, weight = calibration[above.long(), offset : offset + p].unbind(-1)  # [B, P]
    log_probabilities = torch.where(log_probabilities.isnan(), float("-inf"), log_probabilities)
    scores = (factor[..., None] * log_probabilities)[:, :, None] + change
    scores = torch.where(scores.isnan(), float("-inf"), scores)  # damaged logits: impossible
    rest = factor * (1 - log_probabilities.exp().sum(-1)).clamp(min=LEAST_REST).log() + weight
    rest = rest[:, :, None, None].expand(b, p, k, 1)
    scores = scores - torch.cat([scores, rest], -1).logsumexp(-1, keepdim=True)
    scores, order = scores.clamp(max=0.0).sort(dim=-1, descending=True, stable=True)
    return scores.contiguous(), order.int()


@triton.jit
def _rerank_kernel(
    log_probabilities, ids, roots, s_root, before, after, calibration, scales, s_scale, temperatures,
    s_temperature, slots, s_slot, gate, places, scores, order,
    P, K, R, D,
    GATED: tl.constexpr, KNOWN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr, LEAST_REST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One (position of a block, candidate before it). R columns of the tables are not weighed, and GATED
    behind them are, BLOCK_G at a time."""
    i_p, i_a = tl.program_id(0), tl.program_id(1)
    i_b, place = i_p // P, i_p % P
    slot = tl.load(slots + i_b * s_slot)
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_k, m_r = o_k < K, o_r < R
    b_log = tl.load(log_probabilities + i_p * K + o_k, mask=m_k, other=float("-inf"))
    b_id = tl.load(ids + i_p * K + o_k, mask=m_k, other=0)
    front = tl.load(roots + i_b * s_root, mask=slot >= 0, other=0).to(tl.int64)
    if place > 0:
        front = tl.load(ids + (i_p - 1) * K + i_a)
    offset = place + (0 if KNOWN else 1)
    p_u, p_w = before + front * (R + GATED), after + b_id[:, None] * (R + GATED)
    b_u = tl.load(p_u + o_r, mask=m_r, other=0.0).to(tl.float32)
    b_w = tl.load(p_w + o_r[None, :], mask=m_k[:, None] & m_r[None, :], other=0.0)
    b_change = tl.sum(b_u[None, :] * b_w.to(tl.float32), axis=1)
    for first in tl.static_range(0, GATED, BLOCK_G):
        o_g = first + tl.arange(0, BLOCK_G)
        m_g = o_g < GATED
        b_gate = 1 + tl.load(gate + i_p * GATED + o_g, mask=m_g, other=0.0)
        b_gate += tl.load(places + offset * GATED + o_g, mask=m_g, other=0.0)
        b_u = tl.load(p_u + R + o_g, mask=m_g, other=0.0).to(tl.float32) * b_gate
        b_w = tl.load(p_w + R + o_g[None, :], mask=m_k[:, None] & m_g[None, :], other=0.0)
        b_change += tl.sum(b_u[None, :] * b_w.to(tl.float32), axis=1)
    b_change *= tl.load(scales + slot * s_scale, mask=slot >= 0, other=0.0)
    b_change = tl.where(b_change == b_change, b_change, 0.0)
    b_change = tl.minimum(tl.maximum(b_change, -MOST), MOST)
    if KNOWN:
        b_change = tl.where(place == 0, 0.0, b_change)
    above = tl.load(temperatures + slot * s_temperature, mask=slot >= 0, other=0.0) > 0
    p_offset = calibration + (tl.where(above, D, 0) + offset) * 2
    factor, weight = tl.load(p_offset), tl.load(p_offset + 1)
    b_log = tl.where(b_log == b_log, b_log, float("-inf"))
    b_score = tl.where(m_k, factor * b_log + b_change, float("-inf"))
    b_score = tl.where(b_score == b_score, b_score, float("-inf"))  # damaged logits: impossible
    rest = factor * tl.log(tl.maximum(1 - tl.sum(tl.exp(b_log), axis=0), LEAST_REST)) + weight
    most = tl.maximum(tl.max(b_score, axis=0), rest)
    total = tl.sum(tl.exp(b_score - most), axis=0) + tl.exp(rest - most)
    b_score = tl.minimum(b_score - (most + tl.log(total)), 0.0)
    # Sorted as numbers of one tensor: scores compared pair by pair in two layouts may have been computed
    # twice, not alike to the last bit. Bits of numbers not below 0 are in their order.
    b_key = ((0.0 - b_score).to(tl.int32, bitcast=True).to(tl.int64) << 8) | o_k
    b_key = tl.sort(tl.where(m_k, b_key, 0x7FFFFFFFFFFFFFFF))
    p_out = (i_p * K + i_a) * K + o_k
    tl.store(scores + p_out, 0.0 - (b_key >> 8).to(tl.int32).to(tl.float32, bitcast=True), mask=m_k)
    tl.store(order + p_out, (b_key & 255).to(tl.int32), mask=m_k)


def rerank_triton(
    log_probabilities: Tensor, ids: Tensor, roots: Tensor, before: Tensor, after: Tensor, calibration: Tensor,
    scales: Tensor, temperatures: Tensor, slots: Tensor, known: bool, gate: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rerank` in one launch. Equal up to the rounding of sums and logarithms. roots, scales, temperatures
    and slots may be columns of tables."""
    b, p, k = ids.shape
    gated = 0 if gate is None else gate.shape[-1]
    r = before.shape[1] - gated
    assert log_probabilities.shape == ids.shape and k <= 64 and r <= 256, (log_probabilities.shape, k, r)
    assert before.shape == after.shape and before.dtype == after.dtype, (before.shape, after.shape)
    assert (log_probabilities.dtype, ids.dtype) == (torch.float32, torch.int64), ids.dtype
    assert roots.dtype in (torch.int32, torch.int64), roots.dtype
    assert slots.dtype == torch.int32, slots.dtype
    assert {t.dtype for t in (calibration, scales, temperatures)} == {torch.float32}, "fp32"
    assert calibration.shape == (2, calibration.shape[1], 2), calibration.shape
    assert p + (not known) <= calibration.shape[1], (p, known, calibration.shape)
    assert roots.shape == slots.shape == (b,), (roots.shape, slots.shape, b)
    every = [log_probabilities, ids, before, after, calibration]
    if gate is not None and places is not None:
        every += [gate, places]
        assert gate.dtype == places.dtype == torch.float32, (gate.dtype, places.dtype)
        assert gate.shape == (b, p, gated) and places.shape == (calibration.shape[1], gated), places.shape
    assert all(t.is_contiguous() for t in every), [t.stride() for t in every]
    scores = torch.empty(b, p, k, k, dtype=torch.float32, device=ids.device)
    order = torch.empty(b, p, k, k, dtype=torch.int32, device=ids.device)
    _rerank_kernel[(b * p, k)](
        log_probabilities=log_probabilities, ids=ids, roots=roots, s_root=roots.stride(0), before=before,
        after=after, calibration=calibration, scales=scales, s_scale=scales.stride(0),
        temperatures=temperatures, s_temperature=temperatures.stride(0), slots=slots, s_slot=slots.stride(0),
        gate=gate, places=places, scores=scores, order=order, P=p, K=k, R=r, D=calibration.shape[1],
        GATED=gated, KNOWN=known, BLOCK_K=triton.next_power_of_2(k), BLOCK_R=triton.next_power_of_2(r),
        BLOCK_G=min(triton.next_power_of_2(max(gated, 1)), _GATED_AT_ONCE), LEAST_REST=LEAST_REST,
        MOST=_MOST, num_warps=1,
    )  # fmt: skip
    return scores, order
