"""Greedy text of the training network, and how much of it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..comparison import GRAM
from ..errors import InputError
from .loop import Rows
from .network import Network
from .pretrain import autocast

OWN_PROMPT, OWN_TOKENS = 128, 256  # tokens of a piece of text and of its continuation
OWN_REPEATED = 4  # rollouts are slow: each is trained on as often
KEYS_AT_ONCE, MOST_AT_ONCE = 2**33, 8192  # bytes of keys and values of a rollout's texts; their number
CPU_SHARE = 4  # a machine has less memory to spare than a GPU: so much less of it


@torch.no_grad()
def rollout(network: Network, prompts: Tensor, count: int) -> Tensor:
    """Greedy text behind prompts [B, P] of equal length, on the network's device: [B, P + count]."""
    text, step, past = prompts, prompts, None
    with autocast(prompts.device):
        for _ in range(count):
            states, past = network.ar(step, past)
            step = network.head(states[:, -1:]).argmax(-1)
            text = torch.cat([text, step], 1)
    return text


def lengths(text: Tensor, end_tokens: Sequence[int]) -> Tensor:
    """Tokens up to the first end token of each row of text [B, T], that one included: [B]; T where there is
    none.
    """
    ended = torch.isin(text, torch.tensor(list(end_tokens), device=text.device, dtype=text.dtype))
    return (ended.int().cumsum(1) == 0).sum(1).add(1).clamp(max=text.shape[1])


def repeats(text: Tensor, gram: int = GRAM) -> Tensor:
    """Whether the run of `gram` tokens that ends at a token has been there before in its row: text [B, T] ->
    [B, T] bool.
    """
    runs = text.unfold(1, gram, 1)
    same = torch.ones(len(text), runs.shape[1], runs.shape[1], dtype=torch.bool, device=text.device)
    for i in range(gram):
        same &= runs[:, :, None, i] == runs[:, None, :, i]
    found = torch.zeros(text.shape, dtype=torch.bool, device=text.device)
    found[:, gram - 1 :] = same.tril(-1).any(-1)
    return found


def distinct_share(text: Tensor, ends: Tensor, gram: int = GRAM) -> float:
    """Share of different runs of `gram` tokens among all runs in the first ends[b] tokens of each row, mean
    over the rows that have one; 1 if none has.
    """
    place = torch.arange(text.shape[1], device=text.device)
    old = (repeats(text, gram) & (place < ends[:, None])).sum(1)
    runs = ends - gram + 1
    shares = (1 - old / runs)[runs > 0]
    return shares.mean().item() if len(shares) else 1.0


def check_own_text(share: float, context: int) -> None:
    """Raises InputError for a share of own text outside [0, 1], or a context too short for a continuation."""
    if not 0 <= share <= 1:
        raise InputError(f"the share of the base's own text is {share}; 0 to 1 was expected")
    if share and context < OWN_PROMPT + OWN_TOKENS:
        raise InputError(
            f"own text takes {OWN_PROMPT + OWN_TOKENS} tokens a piece, the base has a context of {context}: "
            "leave out --own-text"
        )


def with_own_text(
    network: Network, tokens: Tensor, share: float, end: int | None, seed: int
) -> tuple[Tensor, float]:
    """A long text, and behind it greedy continuations of pieces of it, each `OWN_REPEATED` times, so that
    they are `share` of the whole, or less where the text is too short: what decoding will meet. A piece
    counts with its continuation. At 1 they stand in the text's place, about as long as it. Returns the share
    that was reached too.
    """
    if share == 0:
        return tokens, 0.0
    rows = Rows(tokens, OWN_PROMPT, seed)
    wanted = (share / (1 - share) if share < 1 else 1.0) * len(tokens) / OWN_REPEATED
    pieces = min(max(round(wanted / (OWN_PROMPT + OWN_TOKENS)), 1), rows.count)
    passes = -(-pieces // texts_at_once(network, OWN_PROMPT + OWN_TOKENS))
    batches = [rows.batch(i, -(-pieces // passes))[:, :-1] for i in range(passes)]
    own = torch.cat([rollout(network, batch, OWN_TOKENS) for batch in batches])
    if end is not None:
        own = torch.cat([own, own.new_full((len(own), 1), end)], 1)
    written = [own.flatten().to(tokens.dtype)] * OWN_REPEATED
    whole = torch.cat(written if share == 1 else [tokens, *written])
    return whole, OWN_REPEATED * own.numel() / len(whole)


def texts_at_once(network: Network, tokens: int) -> int:
    """How many texts of so many tokens a rollout writes side by side: as many as `KEYS_AT_ONCE` holds the
    keys of."""
    c = network.config
    on_gpu = network.frequencies.device.type == "cuda"
    width = 2 if on_gpu else 4  # bytes of a number, as `autocast` has it
    text = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width * tokens
    return min(max((KEYS_AT_ONCE if on_gpu else KEYS_AT_ONCE // CPU_SHARE) // text, 1), MOST_AT_ONCE)
