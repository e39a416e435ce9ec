"""The two-pass cycle with a chain that is verified by rejection sampling (orthrus_kernels/rejection.py), for
comparison: what is the coupled noise of two_pass.py worth? The text is distributed as plain sampling's and is
not the same for a seed.

The prefill's token, and one decoded plainly where there is room for no other, are the coupled choice, whose
noise is independent of all that is drawn here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from orthrus_kernels import DraftTree, Rows
from orthrus_kernels.rejection import DRAFT, filtered_probabilities, reject, sample

from . import autoregressive, two_pass
from .state import Decoding, Run, check_finite


def cycles(decoding: Decoding) -> Iterator[Run]:
    """One such cycle after the other."""
    while True:
        yield cycle(decoding)


def cycle(decoding: Decoding) -> Run:
    """Draft a chain after the root, run it through the AR view, commit what is accepted."""
    count = min(decoding.block_size, decoding.remaining) - 1
    if count < 1:  # room for the bonus token only: nothing to propose
        return autoregressive.cycle(decoding)
    drafted = two_pass.draft(decoding, count)
    count = len(drafted)
    if not count:  # a damaged drafter
        return autoregressive.cycle(decoding)
    root = decoding.root
    proposals, draft = propose(decoding, drafted)
    rows = Rows.chain([decoding.root, *proposals], decoding.start)
    out = decoding.model.forward(rows, decoding.cache)
    target, positions = _distributions(decoding, out.logits, [proposals[:i] for i in range(count + 1)])
    chain = torch.tensor([proposals], device=target.device)
    kept, last = reject(chain, target[None], draft[None], positions[None], decoding.sampling.seed)
    accepted = int(kept)
    decoding.cache.commit(out.keys, out.values, range(accepted + 1))
    tokens = [*proposals[:accepted], int(last)]
    run = decoding.extend(tokens, out.logits[: accepted + 1], forwards=2)
    run.kind, run.nodes, run.path = "two-pass", count, range(accepted + 1)
    run.rows, run.choices = (decoding.block_size, count + 1), tokens
    if decoding.watched:
        scores = draft.gather(1, chain.T).log().cumsum(0)[:, 0].tolist()
        run.tree = DraftTree(
            [root, *proposals], list(range(-1, count)), list(range(count + 1)), [0.0, *scores]
        )
    return run


def propose(decoding: Decoding, logits: Tensor) -> tuple[list[int], Tensor]:
    """Sample a token from each row of the diffusion view's logits [count, V]; returns them and what they were
    drawn from, [count, V] fp64."""
    proposals: list[int] = []
    drawn_from = []
    # the penalty makes each proposal depend on those before it
    together = len(logits) if decoding.sampling.repetition_penalty == 1.0 else 1
    for rows in logits.split(together):
        paths = [[*proposals, *[0] * i] for i in range(len(rows))]
        probabilities, positions = _distributions(decoding, rows, paths)
        proposals += sample(probabilities, positions, decoding.sampling.seed, DRAFT).tolist()
        drawn_from.append(probabilities)
    return proposals, torch.cat(drawn_from)


def _distributions(decoding: Decoding, logits: Tensor, paths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What the token behind each path is drawn from, [T, V] fp64, and its position, [T]."""
    check_finite(logits)
    positions, sampling, seen = decoding.placed(logits, paths)
    return filtered_probabilities(logits, sampling, seen), positions
