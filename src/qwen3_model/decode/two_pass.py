"""The published cycle (arXiv 2605.12825, section 3.3), with a chain or a tree: a diffusion pass proposes, an
AR pass verifies.

Proposals are chosen, or ranked, from the diffusion view's logits by the same settings and the same noise as
the target's choices, which makes the two agree as often as they can; the text is the target's whatever they
are. A chain takes one token of each of the block's distributions; a tree of `tree_nodes` nodes the likeliest
paths through them (orthrus_kernels/draft_tree.py); "auto" what pays most, cycle by cycle (controller.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from orthrus_kernels import DraftTree, Rows, draft_tree, verify
from orthrus_kernels.choice import correction_scale, penalise

from . import autoregressive
from .controller import CHAIN, PLAIN, TWIN_TIMES, Controller, Times
from .cycle import CANDIDATES
from .state import Decoding, Run


def cycles(decoding: Decoding) -> Iterator[Run]:
    """One cycle after the other, each of the kind that `tree_nodes` says."""
    if decoding.tree_nodes != "auto":
        while True:
            yield cycle(decoding, decoding.tree_nodes)
    controller = Controller(Times(TWIN_TIMES))
    while True:
        kind = controller.next()
        run = cycle(decoding, kind)
        controller.observe(kind, run.path if run.nodes else None)
        yield run


def cycle(decoding: Decoding, kind: int) -> Run:
    """Draft a block after the root, verify a chain of it or a tree of `kind` nodes, commit what the target
    agrees with and the bonus token. Without a draft where the kind says so."""
    count = min(decoding.block_size, decoding.remaining) - 1
    if count < 1 or kind == PLAIN:  # room for the bonus token only: nothing to propose
        return autoregressive.cycle(decoding)
    began = time.perf_counter()
    logits = draft(decoding, count)
    if not len(logits):
        tree = alone(decoding)
        drafted = grown = now(logits)
    elif kind == CHAIN:
        tree = chain(decoding, logits)
        drafted = grown = now(logits)
    else:
        drafted = now(logits)
        tree = grow(decoding, logits, kind)
        grown = now(logits)
    run = verify_tree(decoding, tree)
    run.seconds = drafted - began, grown - drafted, now(logits) - grown
    return run


def now(x: Tensor) -> float:
    """Seconds, when all that was launched on x's device is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def draft(decoding: Decoding, count: int) -> Tensor:
    """Logits [count, V] of the positions behind the root, from a diffusion block; fewer where it is damaged
    (`sound`)."""
    config = decoding.model.config
    block = Rows.block(decoding.root, decoding.block_size, decoding.start, config.mask_token_id)
    return sound(decoding.model.forward(block, decoding.cache, logits_of=range(count)).logits)


def sound(logits: Tensor) -> Tensor:
    """The rows [<= T, V] of a draft's logits in front of the first one that holds NaN or infinity: a drafter
    that is damaged, or that overflows its dtype, proposes less and never ends a text."""
    return logits[: int(logits.isfinite().all(-1).cumprod(0).sum())]


def alone(decoding: Decoding) -> DraftTree:
    """The tree of the root."""
    return DraftTree([decoding.root], [-1], [0], [0.0])


def chain(decoding: Decoding, logits: Tensor) -> DraftTree:
    """The token chosen at each position, one below the other."""
    proposals = _choices(decoding, logits)
    n = len(proposals) + 1
    scores = _scores(decoding, logits, proposals) if decoding.watched else [0.0] * n
    return DraftTree([decoding.root, *proposals], list(range(-1, n - 1)), list(range(n)), scores)


def _scores(decoding: Decoding, logits: Tensor, proposals: list[int]) -> list[float]:
    """A chain's scores; nothing in a cycle but who watches it needs them."""
    positions, sampling, seen = decoding.placed(logits, [proposals[:i] for i in range(len(proposals))])
    k = min(CANDIDATES, logits.shape[1])
    log_probabilities, _ = decoding.model.ops.candidates(logits, positions, sampling, k, seen)
    return [0.0, *log_probabilities[:, 0].cumsum(0).tolist()]


def grow(
    decoding: Decoding, logits: Tensor, nodes: int, width: int = CANDIDATES, known: bool = True
) -> DraftTree:
    """The likeliest `nodes` nodes, of `width` candidates a position. known: the block has seen the root.
    Fewer candidates than CANDIDATES are those of the block itself, without a bigram correction."""
    # the root stands for tokens that are not known yet: a penalty has seen it already
    paths = [[decoding.root] * i for i in range(len(logits))]
    positions, sampling, seen = decoding.placed(logits, paths)
    k = min(CANDIDATES, logits.shape[1])
    log_probabilities, ids = decoding.model.ops.candidates(logits, positions, sampling, k, seen)
    # when sampling, probabilities are shares among the candidates: first all of them
    log_probabilities, ids = log_probabilities[:, :width].contiguous(), ids[:, :width].contiguous()
    repeated = order = None
    tables = decoding.model.bigram
    if tables is not None and seen is None and width >= CANDIDATES:
        root = torch.tensor([decoding.root], dtype=torch.int32, device=ids.device)
        scale = torch.tensor([correction_scale(sampling)], device=ids.device)
        log_probabilities, order = decoding.model.ops.rerank(
            log_probabilities, ids, root, tables.before, tables.after, scale, known
        )
    if seen is not None:  # a node's own path is seen too, and differs from node to node
        step = penalise(logits, sampling, torch.ones_like(seen)) - penalise(logits, sampling, seen)
        step = step.gather(1, ids).nan_to_num(0.0) / (sampling.temperature or 1.0)
        repeated = (log_probabilities + step).clamp(max=0.0)
    return draft_tree(decoding.root, log_probabilities, ids, nodes, repeated, order)


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
    is_chain = tree.parents == list(range(-1, len(tree) - 1))  # the shape of a tree hardly comes again
    out = decoding.model.forward(rows, decoding.cache, repeats=is_chain)
    choices = decoding.choose(out.logits, tree.paths())
    path, bonus = verify(tree.tokens, tree.parents, choices)
    decoding.cache.commit(out.keys, out.values, path)
    tokens = [tree.tokens[i] for i in path[1:]] + [bonus]
    run = decoding.extend(tokens, out.logits[path], forwards=2)
    run.kind, run.nodes, run.path = "two-pass", len(tree) - 1, path
    run.rows, run.tree, run.choices = (decoding.block_size, len(tree)), tree, choices
    return run
