"""Pieces of prompts in the rows of a pass: all rows of a chunk (prompt.py), or the last ones of a verify pass
(two_pass.py), behind the trees of the texts that decode.

Every row is accepted: its keys and values are committed at its own position. There is a fixed number of rows,
so that one CUDA graph serves any pieces, whatever their tokens and wherever they stand. Rows behind the
pieces are padding: they belong to no sequence, and nothing reads what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orthrus_kernels import put_down

from .cycle import Slots

if TYPE_CHECKING:
    from ..passes import Pass


class Piece(NamedTuple):
    """Tokens of the text in a slot, behind `start` committed ones."""

    tokens: Sequence[int]
    start: int
    slot: int


class PromptRows:
    """Rows of a pass for pieces of prompts. Rows of a piece stand one above the other, and no two pieces of a
    launch are of one text, nor of a text that has other rows in the pass."""

    states: Tensor  # [pieces, E], of each one's last token, as the last launch or capture puts it

    def __init__(self, slots: Slots, given: Pass, first: int) -> None:
        """given: a pass over the slots, all rows AR rows; those from `first` on are for pieces. Its logits_of
        names the rows in front of them and then a row a piece, at most."""
        self.slots, self.plan, self.first = slots, given.plan, first
        assert given.logits_of is not None
        self.last = given.logits_of[first:]
        self.each_row = torch.arange(
            first, len(given.plan.tokens), dtype=torch.int32, device=slots.state.device
        )[:, None]  # [rows, 1]
        self.plan.sequences[first:] = -1

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.each_row)

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Put tokens of texts down, in turn on the stream. The texts are in their prompts, so no cycle moves
        them: where a piece begins is written into the state of its slot, as `lay` reads it there."""
        plan, rows = self.plan, len(self)
        ids = torch.zeros(2, rows, dtype=torch.int64)  # tokens, positions
        owners = torch.full((2, rows), -1, dtype=torch.int32)  # sequences, parents
        last = torch.zeros(len(self.last), dtype=torch.int64)
        end = 0
        for nth, (tokens, start, slot) in enumerate(pieces):
            first, end = end, end + len(tokens)
            ids[0, first:end] = torch.tensor(list(tokens))
            ids[1, first:end] = torch.arange(start, start + len(tokens))
            owners[0, first:end] = slot
            owners[1, first + 1 : end] = torch.arange(first, end - 1) + self.first
            last[nth] = self.first + end - 1
            if slot >= 0:
                self.slots.stand(slot, start, tokens[0])
        for place, numbers in (
            (plan.tokens, ids[0]), (plan.positions, ids[1]), (plan.sequences, owners[0]),
            (plan.parents, owners[1]),
        ):  # fmt: skip
            put_down(place[self.first :], numbers)
        put_down(self.last, last)

    def take(self, states: Tensor, keys: Tensor, values: Tensor) -> None:
        """Commit the rows, and keep the states [pieces, E]. keys, values [L, rows of the pass, G, D]."""
        cache, first = self.slots.cache, self.first
        self.states = states
        self.slots.model.ops.commit(
            cache.keys, cache.values, cache.pages, self.plan.sequences[first:], keys, values, self.each_row,
            self.plan.positions[first:].int(),
        )  # fmt: skip
