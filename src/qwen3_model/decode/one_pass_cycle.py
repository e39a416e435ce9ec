"""A one-pass cycle on the device: the tree that the cycle before has drafted is verified, and the blocks
beside it draft the next one, in one pass. `one_pass.py` says what it does, in the host's loop.

It differs from that in three things, none of which reaches the text. Where nobody drafted a tree there is one
all the same, with its blocks, of nodes that the walk does not find. A pass with one token left drafts. And
the next tree is as deep as the block allows, even near the end of a text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels import PassPlan, PassShape, Rows
from orthrus_kernels.layout import Record, State

from .cycle import CANDIDATES, Cycle, Shared
from .one_pass import Shape

if TYPE_CHECKING:
    from ..model import Qwen3


_NOBODY = -2  # as a parent: a node that the walk does not find


class Draft:
    """What a cycle leaves for the next one to grow its tree from. Its memory outlives every graph: cycles of
    other forms of the choice read it too."""

    def __init__(self, model: Qwen3, shape: Shape) -> None:
        device, depth = model.device, shape.block - 2
        k = min(shape.width, model.config.vocab_size)
        self.at = torch.full((1,), -1, dtype=torch.int32, device=device)  # where its root stands, -1: nowhere
        self.ids = torch.zeros(depth, k, dtype=torch.int64, device=device)
        ordered = shape.width == CANDIDATES and model.bigram is not None
        scored = (depth, k, k) if ordered else (depth, k)
        self.scores = torch.zeros(scored, device=device)
        self.order = torch.zeros(scored, dtype=torch.int32, device=device) if ordered else None

    def forget(self) -> None:
        """Before a new text: its root may stand where the last one's did."""
        self.at.fill_(-1)


class OnePassCycle(Cycle):
    """One pass: a tree's AR rows and diffusion blocks."""

    kind, forwards = "one-pass", 1

    def __init__(self, shared: Shared, shape: Shape, draft: Draft) -> None:
        """draft: of this shape."""
        super().__init__(shared, shape.nodes + 1)
        self.shape, self.draft = shape, draft
        model, n, depth = self.model, shape.nodes + 1, shape.block - 2
        rows = Rows.tree_with_blocks(
            [0] * n, [-1] + [0] * (n - 1), 0, range(shape.anchors), shape.block, model.config.mask_token_id
        )
        lines, levels = n + shape.anchors, depth + shape.block
        self.plan = replace(
            PassPlan.of(rows, model.device), shape=PassShape(len(rows), n, lines, levels, 1),
            start=self.state[None, State.START],
        )  # fmt: skip
        self.inputs = model.pass_inputs(self.plan, self.cache)
        self.scores = torch.zeros(n, device=model.device)
        self.anchors = torch.zeros(shape.anchors, dtype=torch.int32, device=model.device)
        self.rows, self.behind = (torch.zeros(depth, dtype=torch.int64, device=model.device) for _ in "01")

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        model, draft, n, plan, ops = self.model, self.draft, len(self.scores), self.plan, self.model.ops
        drafted = draft.at == self.state[State.START :][:1]
        self.record[Record.DRAFTED :][:1].copy_(drafted)
        scores = torch.where(drafted, draft.scores, float("-inf"))
        marks = None if self.clock is None else self.clock[1:]
        ops.grow(plan, self.scores, self.state[None], scores, draft.ids, draft.order, marks)
        if self.clock is not None:  # its draft took no time of its own
            self.clock[:1].copy_(self.clock[1:2])
        ops.place_blocks(plan, self.scores, self.anchors)
        ops.lay(plan, self.inputs.tables)
        states, keys, values = model.states(self.inputs, self.cache)
        parents = torch.where(drafted, plan.parents[:n], _NOBODY)
        self.verify(plan.tokens[:n], plan.positions[:n], parents, states[:n], keys, values)
        ops.follow(self.record, self.state, self.anchors, self.shape.block, self.rows, self.behind, draft.at)
        self._keep(ops.embedding(states, self.rows))

    def _keep(self, states: Tensor) -> None:
        """The candidates of the block's states [D, E], behind the bonus token, which it has not seen."""
        model, draft = self.model, self.draft
        if draft.order is not None:
            root = self.state[State.ROOT :][:1]
            scores, ids, order = self.choice.ranked(model, states, self.behind, root, known=False)
            assert order is not None
            draft.order.copy_(order)
        else:
            scores, ids = self.choice.candidates(model, states, self.behind)
        width = draft.ids.shape[1]
        draft.scores.copy_(scores[:, :width])
        draft.ids.copy_(ids[:, :width])
