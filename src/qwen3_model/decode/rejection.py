"""The two-pass cycle with a chain that is verified by rejection sampling (orthrus_kernels/rejection.py), for
comparison: what is the coupled noise of a cycle worth? The text is distributed as plain sampling's and is
not the same for a seed. The host drives it, pass by pass.

The prompt's token, and one decoded plainly where there is room for no other, are the coupled choice, whose
noise is independent of all that is drawn here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels import DraftTree, Rows, alike
from orthrus_kernels.rejection import DRAFT, filtered_probabilities, reject, sample
from orthrus_kernels.seen import counts_of

from ..errors import InputError
from .cycle import NOT_NUMBERS
from .sequence import Run, Sequence

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..model import Network


def runs(model: Network, sequence: Sequence) -> Iterator[Run]:
    """The prompt's run, then what each such cycle adds, in a cache of its own. The caller adds a run to the
    sequence before it asks for the next one. Raises InputError when the target's logits are not numbers."""
    sequence.begin()
    cache = model.new_cache(sequence.limit)
    logits = model.prefill(sequence.tokens, cache)[None]
    _check(logits)
    token = _chosen(model, sequence, logits)
    yield Run([token], _logprobs(model, logits, [token]), 1, "prompt", rows=(len(sequence.tokens),))
    while True:
        count = min(sequence.block_size, sequence.remaining) - 1
        drafted = draft(model, cache, sequence, count) if count > 0 else None
        if drafted is None or not len(drafted):  # room for the bonus token only, or a damaged drafter
            yield plain(model, cache, sequence)
        else:
            yield cycle(model, cache, sequence, drafted)


def draft(model: Network, cache: KVCache, sequence: Sequence, count: int) -> Tensor:
    """Logits [<= count, V] of the positions behind the root, from a diffusion block: those in front of the
    first row that holds NaN or infinity."""
    mask = model.config.mask_token_id
    block = Rows.block(sequence.root, sequence.block_size, sequence.start, mask)
    logits = model.forward(block, cache, logits_of=range(count)).logits
    return logits[: int(logits.isfinite().all(-1).cumprod(0).sum())]


def plain(model: Network, cache: KVCache, sequence: Sequence) -> Run:
    """Decode the token after the root."""
    out = model.forward(Rows.chain([sequence.root], sequence.start), cache)
    _check(out.logits)
    token = _chosen(model, sequence, out.logits)
    cache.commit(out.keys, out.values, [0])
    return Run([token], _logprobs(model, out.logits, [token]), forwards=1)


def _chosen(model: Network, sequence: Sequence, logits: Tensor) -> int:
    """The coupled choice behind the text, of logits [1, V]."""
    positions, seen = placed(sequence, logits, [[]])
    return int(model.ops.choose(logits, positions, *alike(sequence.sampling, logits), seen))


def cycle(model: Network, cache: KVCache, sequence: Sequence, drafted: Tensor) -> Run:
    """Propose a chain from the draft's logits [count, V], run it through the AR view, commit what is
    accepted."""
    count, seed = len(drafted), sequence.sampling.seed
    proposals, drawn_from = propose(sequence, drafted)
    out = model.forward(Rows.chain([sequence.root, *proposals], sequence.start), cache)
    _check(out.logits)
    target, positions = _distributions(sequence, out.logits, [proposals[:i] for i in range(count + 1)])
    chain = torch.tensor([proposals], device=target.device)
    kept, last = reject(chain, target[None], drawn_from[None], positions[None], seed)
    accepted = int(kept)
    cache.commit(out.keys, out.values, range(accepted + 1))
    tokens = [*proposals[:accepted], int(last)]
    run = Run(
        tokens, _logprobs(model, out.logits, tokens), 2, "two-pass", count, range(accepted + 1),
        rows=(sequence.block_size, count + 1), choices=tokens,
    )  # fmt: skip
    if sequence.on_run is not None:
        scores = drawn_from.gather(1, chain.T).log().cumsum(0)[:, 0].tolist()
        nodes = list(range(-1, count)), list(range(count + 1))
        run.tree = DraftTree([sequence.root, *proposals], *nodes, [0.0, *scores])
    return run


def propose(sequence: Sequence, logits: Tensor) -> tuple[list[int], Tensor]:
    """Sample a token from each row of the diffusion view's logits [count, V]; returns them and what they were
    drawn from, [count, V] fp64."""
    proposals: list[int] = []
    drawn_from = []
    # penalties make each proposal depend on those before it
    together = 1 if sequence.sampling.penalises else len(logits)
    for rows in logits.split(together):
        paths = [[*proposals, *[0] * i] for i in range(len(rows))]
        probabilities, positions = _distributions(sequence, rows, paths)
        proposals += sample(probabilities, positions, sequence.sampling.seed, DRAFT).tolist()
        drawn_from.append(probabilities)
    return proposals, torch.cat(drawn_from)


def placed(sequence: Sequence, logits: Tensor, paths: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Positions [T] of the tokens to be chosen from logits [T, V], and what penalties see, int32 [T, V].

    paths[t]: the tokens between the text so far and the chosen token."""
    positions = torch.tensor([len(sequence.tokens) + len(path) for path in paths], device=logits.device)
    if not sequence.sampling.penalises:
        return positions, None
    told, vocabulary = sequence.tokens, logits.shape[1]
    seen = [counts_of([*told, *path], sequence.prompt, vocabulary) for path in paths]
    return positions, torch.stack(seen).to(logits.device)


def _distributions(sequence: Sequence, logits: Tensor, paths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What the token behind each path is drawn from, [T, V] fp64, and its position, [T]."""
    positions, seen = placed(sequence, logits, paths)
    return filtered_probabilities(logits, sequence.sampling, seen), positions


def _logprobs(model: Network, logits: Tensor, tokens: list[int]) -> list[float]:
    logits = logits[: len(tokens)]
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return (chosen - model.ops.log_sum_exp(logits)).tolist()


def _check(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise InputError(NOT_NUMBERS)
