"""A one-pass cycle on the device: the tree that the cycle before has drafted is verified, and the blocks
beside it draft the next one, in one pass. `one_pass.py` says what it does, in the host's loop.

It differs from that in three things, none of which reaches the text. Where nobody drafted a tree there is one
all the same, with its blocks, of nodes that the walk does not find. A pass with one token left drafts. And
the next tree is as deep as the block allows, even near the end of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthrus_kernels.attention_triton import tile_rows
from orthrus_kernels.blocks_triton import follow_triton, place_blocks_triton
from orthrus_kernels.grow_triton import grow_triton, tree_tables
from orthrus_kernels.layout import Record, State

from ..pass_inputs import PassInputs
from .cycle import CANDIDATES, Cycle, Shared
from .one_pass import Shape

if TYPE_CHECKING:
    from ..model import Qwen3


_NOBODY = -2  # as a parent: a node that the walk does not find


class Draft:
    """What a cycle leaves for the next one to grow its tree from. Its memory outlives every graph: cycles of
    other rooms read it too."""

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

    def __init__(self, shared: Shared, shape: Shape, room: int, draft: Draft) -> None:
        """room: no row sees a position from it on. draft: of this shape."""
        super().__init__(shared, shape.nodes + 1)
        self.shape, self.draft = shape, draft
        model, c = self.model, self.model.config
        height = tile_rows(c.num_attention_heads, c.num_key_value_heads, c.head_dim, model.dtype)
        depth = shape.block - 2
        self.tables = tree_tables(
            shape.nodes, depth, height, room, model.device,
            blocks=shape.anchors, block_size=shape.block, mask_token=c.mask_token_id,
        )  # fmt: skip
        self.inputs = PassInputs(self.tables.ids, self.tables.packed, shape.nodes + 1, None)
        self.anchors = torch.zeros(shape.anchors, dtype=torch.int32, device=model.device)
        self.rows, self.behind = (torch.zeros(depth, dtype=torch.int64, device=model.device) for _ in "01")

    def run(self) -> None:
        """The launches of a cycle; nothing comes from the host."""
        model, draft, n = self.model, self.draft, self.shape.nodes + 1
        drafted = draft.at == self.state[State.START :][:1]
        self.record[Record.DRAFTED :][:1].copy_(drafted)
        scores = torch.where(drafted, draft.scores, float("-inf"))
        marks = None if self.clock is None else self.clock[1:]
        grow_triton(self.tables, self.state, scores, draft.ids, marks, draft.order)
        if self.clock is not None:  # its draft took no time of its own
            self.clock[:1].copy_(self.clock[1:2])
        place_blocks_triton(self.tables, self.state, self.anchors)
        states, keys, values = model.states(self.inputs, self.cache)
        parents = torch.where(drafted, self.tables.parents, _NOBODY)
        self.verify(self.tables.ids[:, :n], parents, states[:n], keys, values)
        follow_triton(
            self.record, self.state, self.anchors, self.shape.block, self.rows, self.behind, draft.at
        )
        self._keep(model.ops.embedding(states, self.rows))

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
