"""A quick estimate of acceptance during training: greedy rollouts, a block at every position, cycles
simulated on the table. A chain is the likeliest token of each position: the bigram correction is learnt
later.

`orthrus verify` measures the real thing; this takes seconds for a hundred prompts on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Network, diffusion_blocks
from .pretrain import autocast
from .rollout import distinct_share, lengths, rollout

LOGITS_AT_ONCE = 2**27  # entries of the logits of the blocks that run together


@dataclass(frozen=True)
class Estimate:
    """What a chain would accept, and what the text is like."""

    tokens_per_cycle: float  # ratio of sums over all prompts
    by_offset: list[float]  # agreement of the proposal at offset 1, 2, ... with the greedy text
    distinct_8grams: float  # share of different runs of 8 tokens in the greedy text, mean over texts


@torch.no_grad()
def estimate(network: Network, prompts: Tensor, new_tokens: int = 256) -> Estimate:
    """prompts [B, P]: token ids of equal length, on the network's device. Their last token is the first
    cycle's root. A text ends with its first end token or after `new_tokens`, as in decoding.
    """
    size, start = network.config.block_size, prompts.shape[1] - 1
    text = rollout(network, prompts, new_tokens + size)
    with autocast(prompts.device):
        proposals = _proposals(network, text, start, new_tokens)
    agrees = torch.stack(
        [proposals[:, i] == text[:, start + i + 1 : start + i + size] for i in range(new_tokens)], dim=1
    )  # [B, anchors, K - 1]
    new = text[:, start + 1 :]
    ends = lengths(new, network.config.eos_token_ids)
    runs = agrees.int().cumprod(-1).sum(-1).tolist()
    cycles = tokens = 0
    for row, end in zip(runs, ends.clamp(max=new_tokens).tolist(), strict=True):
        at = 0
        while at < end:
            kept = min(row[at] + 1, end - at)
            cycles, tokens, at = cycles + 1, tokens + kept, at + kept
    place = torch.arange(new_tokens, device=text.device)[:, None] + torch.arange(size - 1, device=text.device)
    known = (place < ends[:, None, None]).float()
    by_offset = (agrees * known).sum((0, 1)) / known.sum((0, 1)).clamp(min=1)
    distinct = distinct_share(new[:, :new_tokens], ends.clamp(max=new_tokens))
    return Estimate(tokens / cycles, by_offset.tolist(), distinct)


def _proposals(network: Network, text: Tensor, start: int, count: int) -> Tensor:
    """Argmax proposals of the block at each of `count` positions from `start` on: [B, count, K - 1]."""
    config = network.config
    at_once = min(max(LOGITS_AT_ONCE // (len(text) * config.block_size * config.vocab_size), 1), 16)
    _, context = network.ar(text)
    found = []
    for first in range(start, start + count, at_once):
        anchors = torch.arange(first, min(first + at_once, start + count), device=text.device)
        ids, positions, mask = diffusion_blocks(
            text, anchors.expand(len(text), -1), config.block_size, config.mask_token_id
        )
        states = network.diffusion(ids, positions, context, mask).unflatten(1, (-1, config.block_size))
        found.append(network.head(states[:, :, :-1]).argmax(-1))
    return torch.cat(found, 1)
