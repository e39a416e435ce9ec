"""Draft candidates: the k likeliest tokens of every diffusion row with their log-probabilities. Ties go to
the lowest id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import by_row_tile


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [T, V] -> (log-probabilities [T, k] fp32, token ids [T, k] int64), likeliest first.

    Raises ValueError when k is not in 1..V.
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_k: k is {k}, the vocabulary has {logits.shape[1]} tokens")
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
    return by_row_tile(lambda tile: torch.log_softmax(tile.float(), dim=-1), logits).gather(1, ids), ids
