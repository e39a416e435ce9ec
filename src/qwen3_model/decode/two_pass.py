"""The published cycle (arXiv 2605.12825, section 3.3), with a chain or a tree: a diffusion pass proposes, an
AR pass verifies. Without the draft it is plain decoding, one row a pass, which every strategy must equal.

Proposals are chosen, or ranked, from the diffusion view's logits by the same settings and the same noise as
the target's choices. A chain takes one token of each of the block's distributions; a tree of n nodes the
likeliest paths through them (orthrus_kernels/draft_tree.py)."""

from __future__ import annotations

import torch

from orthrus_kernels import PassShape, Rows
from orthrus_kernels.grow import MOST_DEPTH
from orthrus_kernels.layout import Record

from .controller import CHAIN
from .cycle import Cycle, Text


class TwoPassCycle(Cycle):
    """A draft pass and a verify pass, or the latter alone."""

    def __init__(self, text: Text, nodes: int, block: int, scored: bool = False) -> None:
        """nodes: of the tree; CHAIN: one a position of the block. block: rows of the draft; 0: no draft.
        scored: a chain has scores too, for a caller that watches."""
        rows = nodes + 1 if nodes > CHAIN else max(block, 1)
        super().__init__(text, rows)
        model, device = text.model, text.state.device
        self.kind, self.pass_rows = ("two-pass", [block, rows]) if block else ("plain", [rows])
        self.draft = None
        if block:
            masks = Rows.block(0, block, 0, model.config.mask_token_id)
            self.depth = min(block, MOST_DEPTH) - 1 if nodes > CHAIN else block - 1
            wanted = torch.arange(self.depth, device=device)
            self.draft = model.new_pass(masks, text.cache, text.start, logits_of=wanted)
        chain = Rows.chain([0] * rows, 0)
        self.grows, self.scored = nodes > CHAIN, scored and block > 0
        shape = PassShape(rows, rows, lines=rows, depth=block, sequences=1) if self.grows else None
        self.check = model.new_pass(chain, text.cache, text.start, shape)
        self.scores = torch.zeros(rows, device=device)
        self.record[:, Record.DRAFTED] = int(block > 0)

    def run(self) -> None:
        """The launches of a cycle."""
        text, model, check, ops = self.text, self.model, self.check, self.model.ops
        clock = self.clock
        if self.draft is not None:
            ops.lay(self.draft.plan, self.draft.tables, text.root, clock)
            states, _, _ = model.states(self.draft, text.cache)
            clock = None if clock is None else clock[1:]
            behind = self.draft.plan.positions[1 : self.depth + 1]
            if self.grows:
                scores, ids, order = text.choice.ranked(states, behind, text.root, known=True)
                ops.grow(check.plan, self.scores, text.state, scores, ids, order, clock)
            else:  # the proposal of block row i takes the place of verify row i + 1
                check.plan.tokens[1:] = text.choice.proposals(states, behind)
                if self.scored:
                    scores, _ = text.choice.candidates(states, behind)
                    self.scores[1:] = scores[:, 0].cumsum(0)
        if self.grows:
            ops.lay(check.plan, check.tables)
        else:
            ops.lay(check.plan, check.tables, text.root, clock)
        states, keys, values = model.states(check, text.cache)
        self.verify(check.plan.parents, states, keys, values)
