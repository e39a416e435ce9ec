"""The published cycle (arXiv 2605.12825, section 3.3), with chains or trees: a diffusion pass proposes, an AR
pass verifies. Without the draft it is plain decoding, one row a text, which every strategy must equal.

Strategy "lookup" needs no diffusion view: its chain is what followed the text's last tokens before. Of a tree
the same chain becomes a branch, where it is likelier than the tree's own nodes (orthrus_kernels/branch.py).

Proposals are ranked from the diffusion view's logits by the same settings and the same noise as the target's
choices. A tree takes the likeliest paths through the block's distributions (orthrus_kernels/draft_tree.py). A
chain is grown as a tree is, with one child a node, and has fixed rows of the pass. Trees of n nodes a text
are n on average: the likeliest nodes of all texts share the rows of the pass (orthrus_kernels/allot.py).

Behind the trees the verify pass may have rows for the prompts of other texts (prompt_rows.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from orthrus_kernels import PassShape, Rows
from orthrus_kernels.grow import Trees
from orthrus_kernels.layout import Record

from .controller import CHAIN, LOOKUP
from .cycle import Cycle, Slots, Step
from .prompt_rows import PromptRows
from .scheduler import MOST_PARTS

TREE_ROWS = 64  # of a block that a tree takes at most
MOST_TREE = 64  # nodes of a text's tree, the root included, where several texts share the rows


class TwoPassCycle(Cycle):
    """A draft pass and a verify pass, or the latter alone."""

    def __init__(self, slots: Slots, seats: int, nodes: int, block: int, riders: int = 0) -> None:
        """seats: texts at most. nodes: of a tree; CHAIN: one a position of the block; LOOKUP: a chain without
        a draft pass. block: rows of a draft, or of that chain; 0: no draft. riders: rows of the verify pass
        for prompts."""
        self.branches, self.block = nodes > CHAIN, block
        each = self.rows_each(nodes, block)
        levels = min(block, TREE_ROWS) if self.branches else each
        super().__init__(slots, seats, max(each, MOST_TREE) if self.branches and seats > 1 else each, levels)
        model, device, running = slots.model, slots.state.device, len(slots.state)
        rows = seats * each
        self.kind, self.pass_rows = "lookup" if nodes == LOOKUP else "plain", list[int]()
        if block and nodes != LOOKUP:
            self.kind, self.pass_rows = "two-pass", [seats * block]
        self.pass_rows.append(rows + riders)
        self.draft = None
        if self.kind == "two-pass":
            masks = Rows.batch([Rows.block(0, block, 0, model.config.mask_token_id, b) for b in range(seats)])
            self.depth = self.levels - 1
            wanted = torch.arange(seats * block, device=device).view(seats, block)[:, : self.depth].flatten()
            shape = PassShape(len(masks), 0, lines=seats, depth=block, sequences=running)
            self.draft = model.new_pass(masks, slots.cache, slots.start, shape, logits_of=wanted)
            self.found = torch.zeros(seats, self.depth, dtype=torch.int64, device=device)  # by lookup
            self.likely = torch.zeros(seats, self.depth, device=device)  # their scores
        chains = [Rows.chain([0] * each, 0, b) for b in range(seats)]
        lines, depth = (rows, block) if self.branches else (seats, each)
        last = None
        if riders:
            chains.append(Rows.chain([0] * riders, 0, seats))
            pieces = min(MOST_PARTS, running)
            lines, depth = lines + pieces, max(depth, riders)
            last = torch.arange(rows + pieces, device=device)
        shape = PassShape(rows + riders, rows + riders, lines, depth, sequences=running)
        self.check = model.new_pass(Rows.batch(chains), slots.cache, slots.start, shape, logits_of=last)
        self.of_trees = self.check.plan.head(rows)  # the plan of the trees' rows
        self.riders = PromptRows(slots, self.check, rows) if riders else None
        tokens = None if self.branches else self.of_trees.tokens.view(seats, self.nodes)  # as they are
        self.trees = Trees.new(seats, self.nodes, device, tokens)
        self.record[:, Record.DRAFTED] = int(block > 0)

    def place(self) -> None:
        """A block, and a chain, belongs to the text of its seat."""
        if self.draft is not None:
            self.draft.plan.sequences.copy_(self.seats.repeat_interleave(self.block))
        if not self.branches:
            self.of_trees.sequences.copy_(self.seats.repeat_interleave(self.nodes))

    @staticmethod
    def rows_each(nodes: int, block: int) -> int:
        """Rows of the verify pass a seat."""
        return nodes + 1 if nodes > CHAIN else max(block, 1)

    def run(self) -> Iterator[Step]:
        """The launches of a cycle."""
        slots, model, check, ops = self.slots, self.model, self.check, self.model.ops
        clock, seats = self.clock, len(self.seats)
        if self.kind == "lookup":
            found = self.of_trees.tokens.view(seats, self.nodes)[:, 1:]
            ops.lookup(slots.history, slots.state, self.seats, found, self.trees.scores[:, 1:], clock)
            clock = None
        elif self.draft is not None:
            plan = self.draft.plan
            ops.lay(plan, self.draft.tables, slots.root, clock)
            states, _, _ = model.states(self.draft, slots.cache)
            clock = None if clock is None else clock[1:]
            blocks = plan.positions, plan.sequences, plan.tokens
            positions, owners, tokens = (t.view(seats, self.block) for t in blocks)
            # the proposal of block row i takes the place of the row behind it
            behind, owners = positions[:, 1 : self.depth + 1], owners[:, : self.depth]
            ranked = slots.choice.ranked(states, behind, tokens[:, 0], owners, known=True)
            ops.grow(self.trees, slots.state, self.seats, *ranked, clock, not self.branches)
            clock = None
            if self.branches:
                ops.lookup(slots.history, slots.state, self.seats, self.found, self.likely)
                ops.branch(self.trees, self.seats, self.found, self.likely)
        if self.branches:
            self.allot(self.of_trees, self.first, self.trees, slots.state, self.seats)
            ops.lay(check.plan, check.tables)
        else:
            ops.lay(check.plan, check.tables, slots.root, clock)
        yield from self.ask(self.of_trees.tokens, self.of_trees.parents)
        states, keys, values = model.states(check, slots.cache)
        rows = len(self.of_trees.tokens)
        if self.riders is not None:  # a copy: graphs share the memory of all that is not kept
            self.riders.take(states[rows:].clone(), keys, values)
        yield from self.verify(self.of_trees.parents, states[:rows], keys, values)
