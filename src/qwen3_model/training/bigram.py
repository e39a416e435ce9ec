"""The bigram correction of drafts, learnt behind distillation.

A diffusion row does not know the token in front of the position it proposes; a draft does, at each of its
nodes. A low-rank table adds to the logit of token y behind token x what the row missed: u_x . w_y. Loss:
the forward KL(p_AR || softmax(logits + u_x W^T)) over blocks as in distillation (distill.py), behind the
text's own tokens; nothing else learns. Row 0 of a block knows its token and gets none.
(A semi-autoregressive head of the kind is in DSpark; orthrus_kernels/rerank.py applies ours.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..bigram import MOST_RANK
from ..errors import InputError
from .distill import Blocks, Lessons, agreement_words
from .loop import Plan, train
from .network import Network
from .objective import LOGITS_AT_ONCE
from .pretrain import autocast
from .state import SHA_OF_BASE, SHA_OF_TEXT, sha256_of


def check_rank(rank: int, vocabulary: int) -> None:
    """Raises InputError for a rank out of bounds."""
    if not 1 <= rank <= min(MOST_RANK, vocabulary):
        raise InputError(f"bigram rank is {rank}; 1 to {min(MOST_RANK, vocabulary)} was expected")


def learn_bigram(
    network: Network, tokens: Tensor, plan: Plan, blocks: Blocks, rank: int,
    state: Path | None = None, resume: bool = False, start: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], int, float]:  # fmt: skip
    """Learn the tables of an Orthrus whose weights are loaded. Returns them, "before" (u) and "after" (w),
    each [V, rank] fp32, with steps and seconds. start: tables like them to go on from. Raises InputError."""
    check_rank(rank, network.config.vocab_size)
    network.requires_grad_(False)
    shape, device = (network.config.vocab_size, rank), tokens.device
    generator = torch.Generator().manual_seed(plan.seed)
    # u is not 0, or w would get no gradient; w is, so that the start changes nothing. Named as embeddings.
    before = nn.Parameter((torch.randn(shape, generator=generator) * rank**-0.5).to(device))
    after = nn.Parameter(torch.zeros(shape, device=device))
    if start is not None:
        before.data.copy_(start["before"])
        after.data.copy_(start["after"])
    lessons = Lessons(network, tokens, plan, blocks)

    def loss_of(step: int):
        with autocast(device):
            taught = lessons.step(step)
            loss, agrees = _kl(network, taught.teacher, taught.student, before[taught.before], after)
        shares = agrees.unflatten(0, (-1, blocks.sized(step).size - 1))
        return lessons.weighted(loss, step)[:, 1:].mean(), lambda: agreement_words(shares)

    weights = {"embed_before": before, "embed_after": after}
    mask = network.config.mask_token_id
    about = {"tokens": len(tokens), "mask_token_id": mask, "rank": rank, **dataclasses.asdict(blocks)}
    about |= {SHA_OF_TEXT: sha256_of([tokens]), SHA_OF_BASE: sha256_of(network.parameters())} if state else {}
    steps, spent = train("bigram", weights, loss_of, plan, about, state, resume)
    return {"before": before.detach(), "after": after.detach()}, steps, spent


def _kl(network: Network, teacher: Tensor, student: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """KL and agreement [n] of states [n, E] and u [n, R], chunk by chunk."""
    size = max(LOGITS_AT_ONCE // network.config.vocab_size, 1)
    parts = [
        recompute(_kl_chunk, network, *part, w, use_reentrant=False)
        for part in zip(teacher.split(size), student.split(size), u.split(size), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _kl_chunk(
    network: Network, teacher: Tensor, student: Tensor, u: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        log_p = torch.log_softmax(network.head(teacher).float(), -1)
        logits = network.head(student).float()
    log_q = torch.log_softmax(logits + (u @ w.T).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)
