"""A cycle on the device with a pass that drafts and one that verifies; the latter alone is plain decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels import PackedRows, Rows
from orthrus_kernels.attention_triton import tile_rows
from orthrus_kernels.grow_triton import TreeTables, grow_triton, tree_tables
from orthrus_kernels.layout import Record, State
from orthrus_kernels.move_triton import move_triton

from ..pass_inputs import PassInputs
from .controller import CHAIN
from .cycle import Cycle, Shared

if TYPE_CHECKING:
    from ..model import Qwen3


class MovingPass:
    """A pass whose rows stand behind wherever the text has got to."""

    def __init__(self, model: Qwen3, rows: Rows, room: int, logits_of: int | None = None) -> None:
        """rows: on an empty context. logits_of: of the first so many rows; None: of all."""
        c, device = model.config, model.device
        packed = model.ops.prepare_rows(
            rows, c.num_attention_heads, c.num_key_value_heads, c.head_dim, model.dtype, device, room=room
        )
        assert isinstance(packed, PackedRows)
        wanted = None if logits_of is None else torch.arange(logits_of, device=device)
        self.packed, self.ids = packed, torch.tensor([rows.tokens, rows.positions], device=device)
        self.inputs = PassInputs(self.ids, packed, rows.n_ar, wanted)
        self.depths = self.ids[1].clone()

    def move(self, state: Tensor, clock: Tensor | None = None) -> None:
        """Put the rows behind the text, the root in row 0; clock: takes the time."""
        move_triton(
            self.packed, state[State.START :][:1], state[State.ROOT :][:1], self.ids, self.depths, clock
        )


class GrownPass:
    """The pass that verifies a draft tree, its shape fixed and its tree grown anew by every cycle."""

    def __init__(self, model: Qwen3, nodes: int, depth: int, room: int) -> None:
        """nodes: below the root."""
        c = model.config
        height = tile_rows(c.num_attention_heads, c.num_key_value_heads, c.head_dim, model.dtype)
        self.tables: TreeTables = tree_tables(nodes, depth, height, room, model.device)
        self.ids, self.parents = self.tables.ids, self.tables.parents
        self.inputs = PassInputs(self.ids, self.tables.packed, nodes + 1, None)


class TwoPassCycle(Cycle):
    """Draft and verify passes, or the latter alone."""

    def __init__(self, shared: Shared, kind: int, room: int, block: int) -> None:
        """kind: of controller.py. room: no row sees a position from it on. block: rows of the draft, 0
        without one."""
        rows = kind + 1 if kind > CHAIN else max(block, 1)
        super().__init__(shared, rows)
        self.kind, self.forwards = ("two-pass", 2) if block else ("plain", 1)
        model = self.model
        self.draft: MovingPass | None = None
        if block:
            masks = Rows.block(0, block, 0, model.config.mask_token_id)
            self.draft = MovingPass(model, masks, room, logits_of=block - 1)
        self.check: MovingPass | GrownPass
        if kind > CHAIN:
            self.check = GrownPass(model, kind, block - 1, room)
            self.parents = self.check.parents
        else:
            chain = Rows.chain([0] * rows, 0)
            self.check = MovingPass(model, chain, room)
            self.parents = torch.tensor(chain.parents, dtype=torch.int32, device=model.device)
        self.record[Record.DRAFTED] = 1 if block else 0

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        model, check, clock = self.model, self.check, self.clock
        if self.draft is not None:
            self.draft.move(self.state, clock)
            states, _, _ = model.states(self.draft.inputs, self.cache)
            behind = self.draft.ids[1, 1:]
            if isinstance(check, GrownPass):
                drafted = None if clock is None else clock[1:]
                root = self.state[State.ROOT :][:1]
                scores, ids, order = self.choice.ranked(model, states, behind, root, known=True)
                grow_triton(check.tables, self.state, scores, ids, drafted, order)
            else:  # the proposal of block row i takes the place of verify row i + 1
                self.choice(model, states, behind, check.ids[0, 1:])
        if isinstance(check, MovingPass):
            check.move(self.state, clock if clock is None or self.draft is None else clock[1:])
        states, keys, values = model.states(check.inputs, self.cache)
        self.verify(check.ids, self.parents, states, keys, values)
