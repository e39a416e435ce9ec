"""Pretraining: a tiny Qwen3 on source text, next-token cross-entropy."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .loop import Plan, Rows, train
from .network import Network
from .state import SHA_OF_TEXT, sha256_of


def compiled(function):
    """torch.compile on CUDA, where it pays; the function itself elsewhere."""
    return torch.compile(function) if torch.cuda.is_available() else function


def autocast(device: torch.device) -> torch.autocast:
    """bf16 arithmetic on CUDA, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def pretrain(
    network: Network, tokens: Tensor, plan: Plan, state: Path | None = None, resume: bool = False
) -> tuple[int, float]:
    """Train the AR view on a long text of token ids (on the network's device). Returns steps and seconds."""
    rows = Rows(tokens, plan.length, plan.seed)
    device = tokens.device

    @compiled
    def cross_entropy(ids: Tensor) -> Tensor:
        states, _ = network.ar(ids[:, :-1])
        return F.cross_entropy(network.head(states).float().flatten(0, 1), ids[:, 1:].flatten())

    def loss_of(step: int):
        with autocast(device):
            return cross_entropy(rows.batch(step, plan.batch)), lambda: ""

    weights = {name: w for name, w in network.named_parameters() if "_diff" not in name}
    about = {"tokens": len(tokens), SHA_OF_TEXT: sha256_of([tokens])}
    return train("pretrain", weights, loss_of, plan, about, state, resume)


@torch.no_grad()
def held_out_loss(network: Network, tokens: Tensor, length: int, batch: int = 16, most: int = 20) -> float:
    """Mean next-token loss in nats over a held-out text. Raises InputError when it is too short."""
    rows = Rows(tokens, length, 0)
    losses = []
    for step in range(max(min(most, rows.count // batch), 1)):
        ids = rows.batch(step, min(batch, rows.count))
        with autocast(tokens.device):
            logits = network.head(network.ar(ids[:, :-1])[0])
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).item())
    return sum(losses) / len(losses)
