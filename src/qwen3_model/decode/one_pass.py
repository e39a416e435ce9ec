"""One forward pass a cycle: it verifies this cycle's draft tree and drafts the next one.

Beside the tree's AR rows stand diffusion blocks, anchored at the nodes at which the walk is likeliest to end
(orthrus_kernels/anchors.py). The walk ends at one node, with a bonus token behind it; the block anchored
there proposes what follows. It did not know the bonus token: its first proposal stands in that token's place
and is dropped, so a block of B rows gives a tree B - 2 deep. Where no block stands at that node, the next
pass has no tree to verify. It keeps its shape: its nodes get a parent that does not exist, so that the walk
keeps the bonus token alone, and its blocks draft again.

The text is the target's whatever the anchors are; they decide how often a pass has a tree to verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from orthrus_kernels import PassShape, Rows
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import Record, State

from ..request import ONE_PASS_BLOCK
from .choice import CANDIDATES
from .controller import CHAIN
from .cycle import Cycle, Slots

# Rows of a pass that the default shape fills. Up to about as many the weights' bytes decide a pass's time on
# an H200, not its rows.
MOST_ROWS = 192
# Nodes of the default tree: many short blocks beat few long ones for a weak drafter, and a tree in which
# every node has one beats a larger one (embedded checkpoint, simulated on recorded proposals, 2026-11-26).
NODES = 19
_NOBODY = -2  # as a parent: a node that the walk does not find


@dataclass(frozen=True)
class Shape:
    """What a pass holds: the root, `nodes` below it, `anchors` blocks of `block` rows. width: candidates of a
    position."""

    nodes: int
    anchors: int
    block: int = ONE_PASS_BLOCK
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

    def cycle(self, slots: Slots) -> OnePassCycle:
        """A cycle of this shape."""
        return OnePassCycle(slots, self)

    @property
    def depth(self) -> int:
        """Of a node below the root, at most."""
        return self.block - 2


class OnePassCycle(Cycle):
    """One pass: a tree's AR rows and diffusion blocks, for one text."""

    kind = "one-pass"

    def __init__(self, slots: Slots, shape: Shape) -> None:
        n = shape.nodes + 1
        super().__init__(slots, 1, n, shape.depth + 1)
        self.shape, model, device = shape, slots.model, slots.state.device
        tree = [0] * n, list(range(-1, n - 1)), 0
        rows = Rows.tree_with_blocks(*tree, [0] * shape.anchors, shape.block, model.config.mask_token_id or 0)
        lines, depth = n + shape.anchors, shape.depth + shape.block
        passes = PassShape(len(rows), n, lines, depth, sequences=len(slots.state))
        self.check = model.new_pass(rows, slots.cache, slots.start, passes)
        self.pass_rows = [len(rows)]
        self.trees = Trees.new(1, n, device)
        self.anchors = torch.zeros(shape.anchors, dtype=torch.int32, device=device)
        # The draft for the next cycle: where its root stands (-1: nowhere), candidates and their scores.
        k = min(shape.width, model.config.vocab_size)
        self.ordered = shape.width == CANDIDATES and model.bigram is not None
        scored = (1, shape.depth, k, k) if self.ordered else (1, shape.depth, k)
        self.drafted_at = torch.full((1,), -1, dtype=torch.int32, device=device)
        self.ids = torch.zeros(1, shape.depth, k, dtype=torch.int64, device=device)
        self.next_scores = torch.zeros(scored, device=device)
        self.order = torch.zeros(scored, dtype=torch.int32, device=device) if self.ordered else None
        self.rows, self.behind = (
            torch.zeros(shape.depth, dtype=torch.int64, device=device) for _ in range(2)
        )

    def begin(self, tokens: list[int]) -> None:
        """Drop the draft of the last text: its root may stand where this one's does."""
        self.drafted_at.fill_(-1)

    def place(self) -> None:
        """The blocks belong to the text; the rows of its tree are given to it with every tree."""
        self.check.plan.sequences[self.nodes :] = self.seats

    def run(self) -> None:
        """The launches of a cycle."""
        slots, model, plan, ops = self.slots, self.model, self.check.plan, self.model.ops
        slot = self.seats.clamp(min=0).long()
        drafted = self.drafted_at == slots.start[slot]
        self.record[:, Record.DRAFTED].copy_(drafted)
        scores = torch.where(drafted, self.next_scores, float("-inf"))
        marks = None if self.clock is None else self.clock[1:]
        ops.grow(self.trees, slots.state, self.seats, scores, self.ids, self.order, marks)
        if self.clock is not None:  # its draft took no time of its own
            self.clock[:1].copy_(self.clock[1:2])
        ops.allot(plan, self.first, self.trees, slots.state, self.seats)
        ops.place_blocks(plan, self.trees.scores[0], self.anchors)
        ops.lay(plan, self.check.tables)
        states, keys, values = model.states(self.check, slots.cache)
        parents = torch.where(drafted, plan.parents[: self.nodes], _NOBODY)
        self.verify(parents, states[: self.nodes], keys, values)
        state, size = slots.state[slot][0], self.shape.block
        ops.follow(self.record[0], state, self.anchors, size, self.rows, self.behind, self.drafted_at)
        self._keep(model.ops.embedding(states, self.rows), state)

    def _keep(self, states: torch.Tensor, state: torch.Tensor) -> None:
        """The candidates of the block's states [D, E], behind the bonus token, which it has not seen."""
        choice, width = self.slots.choice, self.ids.shape[-1]
        owners = self.seats.expand(len(states)).contiguous()
        if self.order is not None:
            root = state[State.ROOT :][:1]
            scores, ids, order = choice.ranked(states, self.behind, root, owners, known=False)
            assert order is not None
            self.order.copy_(order)
        else:
            scores, ids = choice.candidates(states, self.behind, owners)
        self.next_scores.copy_(scores[..., :width].view(self.next_scores.shape))
        self.ids.copy_(ids[..., :width].view(self.ids.shape))
