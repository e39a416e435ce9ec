"""One forward pass a cycle: it verifies this cycle's draft tree and drafts the next one.

Beside the tree's AR rows stand diffusion blocks, anchored at the nodes at which the walk is likeliest to end
(orthrus_kernels/anchors.py). The walk ends at one node, with a bonus token behind it; the block anchored
there proposes what follows. It did not know the bonus token: its first proposal stands in that token's place
and is dropped, so a block of B rows gives a tree B - 2 deep. Where no block stands at that node, the next
tree is its root alone, with a block: a pass of one token, as in plain decoding, that drafts again.

The text is the target's whatever the anchors are; they decide how often a pass has a tree to verify."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from orthrus_kernels import DraftTree, Rows, choose_anchors, verify

from .controller import CHAIN
from .state import Decoding, Run
from .two_pass import CANDIDATES, alone, grow, now, sound

MOST_ROWS = 192  # of a pass: about what an H200 reads the weights for in any case
BLOCK, LEAST_BLOCK, MOST_BLOCK = 8, 3, 64  # rows of a block: by default, and what it may have
# Nodes that "auto" takes: many short blocks beat few long ones for a weak drafter, and a tree in which every
# node has one beats a larger one (embedded checkpoint, simulated on its recorded proposals, 2026-11-26).
NODES = 19


@dataclass(frozen=True)
class Shape:
    """What a pass holds: the root, `nodes` below it, `anchors` blocks of `block` rows. width: candidates of a
    position."""

    nodes: int
    anchors: int
    block: int
    width: int = CANDIDATES

    @staticmethod
    def of(block: int, nodes: int | Literal["auto"]) -> Shape:
        """For blocks of so many rows and trees of so many nodes, with as many blocks as MOST_ROWS leaves room
        for, and one at least."""
        nodes, width = NODES if nodes == "auto" else nodes, CANDIDATES
        if nodes == CHAIN:
            nodes, width = block - 2, 1
        anchors = min(max((MOST_ROWS - 1 - nodes) // block, 1), nodes + 1)
        return Shape(nodes, anchors, block, width)


def cycles(decoding: Decoding) -> Iterator[Run]:
    """One pass after the other, the first without a draft."""
    shape, tree = Shape.of(decoding.block_size, decoding.tree_nodes), alone(decoding)
    while True:
        run, tree = cycle(decoding, shape, tree)
        yield run


def cycle(decoding: Decoding, shape: Shape, tree: DraftTree) -> tuple[Run, DraftTree]:
    """Verify `tree` and draft behind it in one pass, commit the walk; returns the next tree with the run."""
    began, config, n = time.perf_counter(), decoding.model.config, len(tree)
    anchors = choose_anchors(tree.parents, tree.scores, shape.anchors if decoding.remaining > 1 else 0)
    rows = Rows.tree_with_blocks(
        tree.tokens, tree.parents, decoding.start, anchors, shape.block, config.mask_token_id or 0
    )
    out = decoding.model.forward(rows, decoding.cache, repeats=False)
    choices = decoding.choose(out.logits[:n], tree.paths())
    path, bonus = verify(tree.tokens, tree.parents, choices)
    decoding.cache.commit(out.keys, out.values, path)
    run = decoding.extend([tree.tokens[i] for i in path[1:]] + [bonus], out.logits[path], forwards=1)
    run.kind, run.nodes, run.path = "one-pass", n - 1, path
    run.rows, run.tree, run.choices = (len(rows),), tree, choices
    verified = now(out.logits)
    following = alone(decoding)
    depth = min(shape.block - 2, decoding.remaining - 1)
    if path[-1] in anchors and depth > 0:
        first = n + anchors.index(path[-1]) * shape.block + 1  # row 0's proposal is the bonus token's place
        proposals = sound(out.logits[first : first + depth])
        if len(proposals):
            following = grow(decoding, proposals, shape.nodes, shape.width, known=False)
    run.seconds = 0.0, now(out.logits) - verified, verified - began
    return run, following
