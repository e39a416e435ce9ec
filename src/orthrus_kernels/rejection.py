"""Rejection sampling of a draft chain: the usual way to verify at a temperature above 0, for comparison.

Leviathan et al., "Fast inference from transformers via speculative decoding", ICML 2023 (arXiv 2211.17192),
Algorithm 1. Proposal x_i is a sample of the drafter's q_i; the target has p_i at its place. It is accepted
with probability min(1, p_i(x_i) / q_i(x_i)). In place of the first one rejected comes a sample of
norm(max(p_i - q_i, 0)), behind a chain accepted whole one of the target's next p. The tokens are distributed
as plain samples of the target are. For a seed they are others than `choose` gives, and depend on the drafter.

The three kinds of draw are streams of their own of the counter-based noise: a proposal and the number that
decides on it must be independent, which coupled noise is not. After a rejection the positions behind it are
drafted again with the same draws; nothing that was emitted had depended on those.

Probabilities are fp64. There is no kernel for this, only torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import filtered_scores, gumbel, random_bits
from .sampling import Sampling

DRAFT, ACCEPT, REST = 1, 2, 3  # streams; 0 is that of `choose`


def filtered_probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """What a sampled choice is drawn from, [T, V] fp64; arguments as for `choose`, temperature above 0."""
    return torch.softmax(filtered_scores(logits, sampling, seen).double(), dim=-1)


def sample(weights: Tensor, positions: Tensor, seed: int, stream: int) -> Tensor:
    """A token id of every row of weights [T, V], with a chance in proportion to its weight; [T] int64.

    positions [T]: those that the tokens will take. Gumbel-max, as in choice.py."""
    return (weights.log() + gumbel(seed, positions, weights.shape[1], stream)).argmax(-1)


def reject(
    proposals: Tensor, target: Tensor, draft: Tensor, positions: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Decide on C chains of N proposals each; returns how many are accepted and the token behind them, both
    [C] int64.

    proposals [C, N]: samples of draft [C, N, V] in stream DRAFT; target [C, N + 1, V]: the target's at the
    proposals' places and behind the last; positions [C, N + 1] of these places."""
    kept = accepts(proposals, target[:, :-1], draft, positions[:, :-1], seed)
    count = kept.long().cumprod(-1).sum(-1)
    chains = torch.arange(len(count), device=count.device)
    nothing = torch.zeros_like(draft[:, :1])  # behind the last proposal: what is left is all of p
    rest = residual(target[chains, count], torch.cat([draft, nothing], 1)[chains, count])
    return count, sample(rest, positions[chains, count], seed, REST)


def accepts(proposals: Tensor, target: Tensor, draft: Tensor, positions: Tensor, seed: int) -> Tensor:
    """Whether each proposal is accepted, were it its turn: u < p(x) / q(x). bool [C, N]; shapes as for
    `reject`, target [C, N, V]."""
    p, q = (of.gather(-1, proposals[..., None])[..., 0] for of in (target, draft))
    first = torch.zeros(1, dtype=torch.int64, device=positions.device)
    bits = random_bits(seed, positions.flatten(), first, ACCEPT).view(positions.shape)
    u = (bits.double() + 0.5) * 2.0**-32
    return u * q < p


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """max(p - q, 0), not normalised, [C, V]. Where rounding leaves nothing of it, p and q are equal."""
    rest = (target - draft).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)
