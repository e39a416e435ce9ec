"""The published cycle (arXiv 2605.12825, section 3.3), with a chain or a tree: a diffusion pass proposes, an
AR pass verifies.

Proposals are chosen, or ranked, from the diffusion view's logits by the same settings and the same noise as
the target's choices, which makes the two agree as often as they can; the text is the target's whatever they
are. A chain takes one token of each of the block's distributions; a tree of `tree_nodes` nodes the likeliest
paths through them (orthrus_kernels/draft_tree.py)."""

from __future__ import annotations

from torch import Tensor

from orthrus_kernels import DraftTree, Rows, draft_tree, verify

from . import autoregressive
from .device import CANDIDATES
from .state import Decoding, Run


def cycle(decoding: Decoding) -> Run:
    """Draft a block after the root, verify it, commit what the target agrees with and the bonus token."""
    count = min(decoding.block_size, decoding.remaining) - 1
    if count < 1:  # room for the bonus token only: nothing to propose
        return autoregressive.cycle(decoding)
    logits = draft(decoding, count)
    tree = grow(decoding, logits) if decoding.tree_nodes else chain(decoding, logits)
    return verify_tree(decoding, tree)


def draft(decoding: Decoding, count: int) -> Tensor:
    """Logits [count, V] of the positions behind the root, from a diffusion block."""
    config = decoding.model.config
    block = Rows.block(decoding.root, decoding.block_size, decoding.start, config.mask_token_id)
    return decoding.model.forward(block, decoding.cache, logits_of=range(count)).logits


def chain(decoding: Decoding, logits: Tensor) -> DraftTree:
    """The token chosen at each position, one below the other."""
    proposals = _choices(decoding, logits)
    n = len(proposals) + 1
    return DraftTree([decoding.root, *proposals], list(range(-1, n - 1)), list(range(n)), [0.0] * n)


def grow(decoding: Decoding, logits: Tensor) -> DraftTree:
    """The likeliest paths of `tree_nodes` nodes."""
    positions, sampling, seen = decoding.placed(logits, [[0] * i for i in range(len(logits))])
    k = min(CANDIDATES, logits.shape[1])
    log_probabilities, ids = decoding.model.ops.candidates(logits, positions, sampling, k, seen)
    return draft_tree(decoding.root, log_probabilities, ids, decoding.tree_nodes)


def _choices(decoding: Decoding, logits: Tensor) -> list[int]:
    count = len(logits)
    if decoding.sampling.repetition_penalty == 1.0:
        return decoding.choose(logits, [[0] * i for i in range(count)])
    proposals: list[int] = []  # the penalty makes each proposal depend on those before it
    for row in logits:
        proposals += decoding.choose(row[None], [proposals])
    return proposals


def verify_tree(decoding: Decoding, tree: DraftTree) -> Run:
    """Run the tree through the AR view, commit the path that the target walks and choose the bonus token."""
    rows = Rows.tree(tree.tokens, tree.parents, decoding.start)
    out = decoding.model.forward(rows, decoding.cache, repeats=not decoding.tree_nodes)
    choices = decoding.choose(out.logits, tree.paths())
    path, bonus = verify(tree.tokens, tree.parents, choices)
    decoding.cache.commit(out.keys, out.values, path)
    tokens = [tree.tokens[i] for i in path[1:]] + [bonus]
    return decoding.extend(tokens, out.logits[path], forwards=2, nodes=len(tree) - 1)
