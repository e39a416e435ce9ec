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


@dataclass(frozen=True)
class Texts:
    """Greedy texts behind prompts of equal length.

    text [B, T]: prompts and texts; `count` blocks stand at the positions from `start` on, which holds the
    prompts' last token. ends [B]: tokens behind the prompts up to the first end token, that one with them."""

    text: Tensor
    start: int
    count: int
    ends: Tensor


def greedy_texts(network: Network, prompts: Tensor, new_tokens: int) -> Texts:
    """Of prompts [B, P] on the network's device, a block longer than `new_tokens`."""
    text = rollout(network, prompts, new_tokens + network.config.block_size)
    ends = lengths(text[:, prompts.shape[1] :], network.config.eos_token_ids)
    return Texts(text, prompts.shape[1] - 1, new_tokens, ends)


@torch.no_grad()
def agreements(network: Network, texts: Texts) -> tuple[Tensor, Tensor]:
    """Whether the proposals of the block at each position are the text's, and whether the text has not ended
    before them: both [B, count, K - 1] bool."""
    text, start, size = texts.text, texts.start, network.config.block_size
    with autocast(text.device):
        proposals = _proposals(network, text, start, texts.count)
    agrees = torch.stack(
        [proposals[:, i] == text[:, start + i + 1 : start + i + size] for i in range(texts.count)], dim=1
    )
    place = torch.arange(texts.count, device=text.device)[:, None]
    place = place + torch.arange(size - 1, device=text.device)
    return agrees, place < texts.ends[:, None, None]


@torch.no_grad()
def estimate(network: Network, prompts: Tensor, new_tokens: int = 256) -> Estimate:
    """prompts [B, P]: token ids of equal length, on the network's device. Their last token is the first
    cycle's root. A text ends with its first end token or after `new_tokens`, as in decoding.
    """
    texts = greedy_texts(network, prompts, new_tokens)
    agrees, known = agreements(network, texts)
    ends = texts.ends.clamp(max=new_tokens)
    runs = agrees.int().cumprod(-1).sum(-1).tolist()
    cycles = tokens = 0
    for row, end in zip(runs, ends.tolist(), strict=True):
        at = 0
        while at < end:
            kept = min(row[at] + 1, end - at)
            cycles, tokens, at = cycles + 1, tokens + kept, at + kept
    by_offset = (agrees & known).sum((0, 1)) / known.sum((0, 1)).clamp(min=1)
    new = texts.text[:, prompts.shape[1] :][:, :new_tokens]
    return Estimate(tokens / cycles, by_offset.tolist(), distinct_share(new, ends))


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
