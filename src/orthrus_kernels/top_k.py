"""Draft candidates: the k likeliest tokens of every diffusion row with their log-probabilities. Ties go to
the lowest id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logit_summary import summary_of_logits
from .tiles import by_row_tile


def top_k_triton(
    logits: Tensor, k: int, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`top_k` in Triton for logits [T, V] fp32 and k up to 128; `out` takes both results. A row's bits do not
    depend on the rows beside it: logit_summary.py says why."""
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_k: k is {k}, the vocabulary has {logits.shape[1]} tokens")
    values, ids, log_sum_exp = summary_of_logits(logits, k)
    if out is None:
        return values - log_sum_exp[:, None], ids
    torch.sub(values, log_sum_exp[:, None], out=out[0])
    return out[0], out[1].copy_(ids)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [T, V] -> (log-probabilities [T, k] fp32, token ids [T, k] int64), likeliest first.

    Raises ValueError when k is not in 1..V.
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_k: k is {k}, the vocabulary has {logits.shape[1]} tokens")
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
    return by_row_tile(lambda tile: torch.log_softmax(tile.float(), dim=-1), logits).gather(1, ids), ids
