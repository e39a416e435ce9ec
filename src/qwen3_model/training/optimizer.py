"""The optimizers of the trainings, and their schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

WARM_UP = 0.02  # of the run
FLOOR = 0.01  # of the peak learning rate, at the end


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, at AdamW's update size) for the matrices, AdamW for embeddings, head and
    norms.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in named:
        inner = weight.dim() == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inner else others).append(weight)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        found.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = lr
    return found


def set_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Cosine with a linear warm-up; `share` is the part of the run that is done, 0 to 1."""
    rate = min(
        share / WARM_UP + 0.01, FLOOR + (1 - FLOOR) * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
