"""What a distillation minimises: the loss of a proposal, and how the offsets of a block are weighed.

Both losses compare the two views at one position. `kl` is the forward KL(p_AR || p_diffusion), the paper's.
`ce` is the cross-entropy of the token that the AR view finds likeliest there, which a greedy text goes on
with; in text that the base wrote greedily it is the text's own token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import InputError, quoted
from .network import Network

LOGITS_AT_ONCE = 2**25  # entries of one chunk of logits: 256 MiB in fp32 for each of the two views
OFFSET_WEIGHTS = ("decay", "survival")


@dataclass(frozen=True)
class Objective:
    """loss: a name of `LOSSES`. offset_weights: one of `OFFSET_WEIGHTS`, by `Blocks.offset_decay` or as
    `survival.py` measures."""

    loss: str = "kl"
    offset_weights: str = "decay"

    def check(self) -> None:
        """Raises InputError for a loss or weights that there are not."""
        if self.loss not in LOSSES:
            raise InputError(f"loss is {quoted(self.loss)}; {' or '.join(LOSSES)} was expected")
        if self.offset_weights not in OFFSET_WEIGHTS:
            raise InputError(
                f"offset weights is {quoted(self.offset_weights)}; {' or '.join(OFFSET_WEIGHTS)} was expected"
            )


OBJECTIVE = Objective()


def kl_chunk(network: Network, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_AR || p_diffusion) and whether the argmaxes agree, from states [n, E] before the final norm; both
    [n].
    """
    with torch.no_grad():
        log_p = torch.log_softmax(network.head(teacher).float(), -1)
    log_q = torch.log_softmax(network.head(student).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)


def ce_chunk(network: Network, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the AR view's likeliest token, the lowest id at equal ones, and whether the
    argmaxes agree: as `kl_chunk`."""
    with torch.no_grad():
        likeliest = network.head(teacher).float().argmax(-1)
    logits = network.head(student).float()
    return F.cross_entropy(logits, likeliest, reduction="none"), likeliest == logits.argmax(-1)


LOSSES: dict[str, Callable[[Network, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "kl": kl_chunk,
    "ce": ce_chunk,
}


def compared(network: Network, teacher: Tensor, student: Tensor, loss: str = "kl") -> tuple[Tensor, Tensor]:
    """A loss of `LOSSES` over any number of rows, chunk by chunk, logits recomputed for the gradient: a
    chunk's fit in memory."""
    size = max(LOGITS_AT_ONCE // network.config.vocab_size, 1)
    parts = [
        recompute(LOSSES[loss], network, t, s, use_reentrant=False)
        for t, s in zip(teacher.split(size), student.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
