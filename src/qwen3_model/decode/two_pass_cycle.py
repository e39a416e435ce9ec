"""A cycle on the device with a pass that drafts and one that verifies; the latter alone is plain decoding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from orthrus_kernels import PassPlan, PassShape, Rows
from orthrus_kernels.layout import Record, State

from .budget import CHAIN
from .cycle import Cycle, Shared


class MovingPass:
    """A pass whose rows, a chain or a block, stand behind wherever the text has got to."""

    def __init__(self, shared: Shared, rows: Rows, logits_of: int | None = None) -> None:
        """rows: on an empty context. logits_of: of the first so many rows; None: of all."""
        self.plan = replace(PassPlan.of(rows, shared.model.device), start=shared.state[None, State.START])
        wanted = None if logits_of is None else range(logits_of)
        self.inputs = shared.model.pass_inputs(self.plan, shared.cache, wanted)
        self.lay = partial(shared.model.ops.lay, self.plan, self.inputs.tables)
        self.root = shared.state[None, State.ROOT]

    def move(self, clock: Tensor | None = None) -> None:
        """Put the rows behind the text, the root in row 0; clock: takes the time."""
        self.lay(self.root, clock)


class GrownPass:
    """The pass that verifies a draft tree, its shape fixed and its tree grown anew by every cycle."""

    def __init__(self, shared: Shared, nodes: int, depth: int) -> None:
        """nodes: below the root. depth: of a node, at most."""
        plan, n = PassPlan.of(Rows.tree([0] * (nodes + 1), [-1] + [0] * nodes, 0)), nodes + 1
        shape = PassShape(n, n, n, depth + 1, 1)
        self.plan = replace(plan.on(shared.model.device), shape=shape, start=shared.state[None, State.START])
        self.inputs = shared.model.pass_inputs(self.plan, shared.cache)
        self.scores = torch.zeros(n, device=shared.model.device)


class TwoPassCycle(Cycle):
    """Draft and verify passes, or the latter alone."""

    def __init__(self, shared: Shared, kind: int, block: int) -> None:
        """kind: of budget.py. block: rows of the draft, 0 without one."""
        rows = kind + 1 if kind > CHAIN else max(block, 1)
        super().__init__(shared, rows)
        self.kind, self.forwards = ("two-pass", 2) if block else ("plain", 1)
        model = self.model
        self.draft: MovingPass | None = None
        if block:
            masks = Rows.block(0, block, 0, model.config.mask_token_id)
            self.draft = MovingPass(shared, masks, logits_of=block - 1)
        self.check: MovingPass | GrownPass
        if kind > CHAIN:
            self.check = GrownPass(shared, kind, block - 1)
        else:
            self.check = MovingPass(shared, Rows.chain([0] * rows, 0))
        self.record[Record.DRAFTED] = 1 if block else 0

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        model, check, clock = self.model, self.check, self.clock
        plan, ops = check.plan, model.ops
        if self.draft is not None:
            self.draft.move(clock)
            states, _, _ = model.states(self.draft.inputs, self.cache)
            behind = self.draft.plan.positions[1:]
            if isinstance(check, GrownPass):
                drafted = None if clock is None else clock[1:]
                root = self.state[State.ROOT :][:1]
                scores, ids, order = self.choice.ranked(model, states, behind, root, known=True)
                ops.grow(plan, check.scores, self.state[None], scores, ids, order, drafted)
                ops.lay(plan, check.inputs.tables)
            else:  # the proposal of block row i takes the place of verify row i + 1
                self.choice(model, states, behind, plan.tokens[1:])
        if isinstance(check, MovingPass):
            check.move(clock if clock is None or self.draft is None else clock[1:])
        states, keys, values = model.states(check.inputs, self.cache)
        self.verify(plan.tokens, plan.positions, plan.parents, states, keys, values)
