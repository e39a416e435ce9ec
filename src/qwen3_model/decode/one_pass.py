"""One forward pass a cycle: it verifies this cycle's draft trees and drafts the next ones.

A cycle has a seat for each of its texts, and a tree for each seat. Beside the trees' AR rows stand diffusion
blocks, anchored at the nodes at which the walks are likeliest to end (orthrus_kernels/anchors.py). A walk
ends at one node, with a bonus token behind it; the block anchored there proposes what follows. It did not
know the bonus token: its first proposal stands in that token's place and is dropped, so a block of B rows
gives a tree B - 2 deep. Where no block stands at that node, the text's next cycle has no tree of it to
verify. The pass keeps its shape: that tree's nodes get a parent that does not exist, so that the walk keeps
the bonus token alone, and its blocks draft again. Drafts are kept by slot (drafts.py).

A text is the target's whatever the anchors are; they decide how often a pass has a tree to verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from orthrus_kernels import PassShape, Rows
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import Record

from ..request import LEAST_ONE_PASS_BLOCK, MOST_ONE_PASS_BLOCK, ONE_PASS_BLOCK
from .choice import CANDIDATES
from .controller import CHAIN
from .cycle import Cycle, Slots, Step

# Rows of a pass of one text that the default shape fills. Up to about as many the weights' bytes decide a
# pass's time on an H200, not its rows.
MOST_ROWS = 192
# Nodes of the default tree: many short blocks beat few long ones for a weak drafter, and a tree in which
# every node has one beats a larger one (embedded checkpoint, simulated on recorded proposals, 2026-11-26).
NODES = 19
_NOBODY = -2  # as a parent: a node that the walk does not find

Nodes = int | Literal["auto"]


@dataclass(frozen=True)
class Shape:
    """What a pass holds for each seat: the root, `nodes` below it, `anchors` blocks of `block` rows. chain:
    the tree is one."""

    nodes: int
    anchors: int
    block: int = ONE_PASS_BLOCK
    chain: bool = False

    @staticmethod
    def of(block: int, nodes: Nodes, rows: int | None = None) -> Shape:
        """For blocks of so many rows and trees of so many nodes, with as many blocks as `rows`, MOST_ROWS for
        None, leave room for, and one at least."""
        chain = nodes == CHAIN
        if nodes == "auto":
            nodes = NODES
        elif chain:
            nodes = block - 2
        room = (MOST_ROWS if rows is None else rows) - 1 - nodes
        return Shape(nodes, min(max(room // block, 1), nodes + 1), block, chain)

    @staticmethod
    def shared(asked: Sequence[tuple[int, Nodes]], rows: int) -> Shape | None:
        """For texts that ask for (block, nodes) and have so many rows each; None where those are too few.

        The block is the shortest that is asked for, and the tree the largest, both cut to the rows. "auto" is
        the tree in which every node has a block, but it has no fewer rows than a block. With 16 to 64 rows of
        a text no other tree with such blocks keeps more than 3 % more (simulated, bench/strong.py, of
        bench/results/trace-h100.json)."""
        block = min(*(size for size, _ in asked), (rows + 1) // 2)
        if block < LEAST_ONE_PASS_BLOCK:
            return None
        auto = min(NODES, max(rows // (block + 1), block) - 1)
        nodes = max(auto if number == "auto" else number for _, number in asked)
        return Shape.of(block, min(nodes, rows - 1 - block), rows)

    def cycle(self, slots: Slots, seats: int) -> OnePassCycle:
        """A cycle of this shape."""
        return OnePassCycle(slots, seats, self)

    @property
    def depth(self) -> int:
        """Of a node below the root, at most."""
        return self.block - 2


class OnePassCycle(Cycle):
    """One pass: the AR rows of a tree a seat, and diffusion blocks."""

    kind = "one-pass"

    def __init__(self, slots: Slots, seats: int, shape: Shape) -> None:
        n = shape.nodes + 1
        super().__init__(slots, seats, n, shape.depth + 1)
        self.shape, model, device = shape, slots.model, slots.state.device
        tree, blocks = ([0] * n, list(range(-1, n - 1)), 0), [0] * shape.anchors
        mask = model.config.mask_token_id or 0
        rows = Rows.batch([Rows.tree_with_blocks(*tree, blocks, shape.block, mask, b) for b in range(seats)])
        lines, depth = seats * (n + shape.anchors), shape.depth + shape.block
        passes = PassShape(len(rows), seats * n, lines, depth, sequences=len(slots.state))
        self.check = model.new_pass(rows, slots.cache, slots.start, passes)
        self.pass_rows = [len(rows)]
        self.trees = Trees.new(seats, n, device)
        self.anchors = slots.state.new_full((seats, shape.anchors), -1)  # nodes; -1: no block
        longest = min(model.config.block_size or 0, MOST_ONE_PASS_BLOCK) - 2
        width, ordered = min(CANDIDATES, model.config.vocab_size), model.bigram is not None
        self.drafts = slots.drafts_of(longest, width, ordered)
        self.rows, self.behind = (
            torch.zeros(seats, shape.depth, dtype=torch.int64, device=device) for _ in range(2)
        )

    def run(self) -> Iterator[Step]:
        """The launches of a cycle."""
        slots, model, plan, ops = self.slots, self.model, self.check.plan, self.model.ops
        state, seats, drafts, n = slots.state, self.seats, self.drafts, plan.shape.n_ar
        found, place = drafts.at[:-1] == slots.start, drafts.place(seats)  # by slot: its draft stands there
        drafted = found[seats.clamp(min=0).long()] & (seats >= 0)
        self.record[:, Record.DRAFTED].copy_(drafted)
        scores, ids, order = drafts.taken(place, self.shape.depth)
        drafted = drafted.view(-1, *[1] * (scores.dim() - 1))
        scores = torch.where(drafted, scores, float("-inf"))
        marks = None if self.clock is None else self.clock[1:]
        ops.grow(self.trees, state, seats, scores, ids, order, marks, self.shape.chain)
        if self.clock is not None:  # its draft took no time of its own
            self.clock[:1].copy_(self.clock[1:2])
        self.allot(plan, self.first, self.trees, state, seats)
        ops.place_blocks(plan, self.first, self.trees, seats, self.anchors)
        ops.lay(plan, self.check.tables)
        walked = found[plan.sequences[:n].clamp(min=0).long()]
        parents = torch.where(walked, plan.parents[:n], _NOBODY)
        yield from self.ask(plan.tokens[:n], parents)
        states, keys, values = model.states(self.check, slots.cache)
        yield from self.verify(parents, states[:n], keys, values)
        ops.follow(
            self.record, state, seats, self.anchors, self.shape.block, self.rows, self.behind, drafts.at
        )
        self._keep(model.ops.embedding(states, self.rows.flatten()), place)

    def _keep(self, states: torch.Tensor, place: torch.Tensor) -> None:
        """The candidates of the blocks' states [B * D, E], behind bonus tokens, which they have not seen."""
        choice, seats = self.slots.choice, self.seats
        owners = seats[:, None].expand(-1, self.rows.shape[1])
        roots = self.slots.root[seats.clamp(min=0).long()]
        self.drafts.keep(place, *choice.ranked(states, self.behind, roots, owners, known=False))
