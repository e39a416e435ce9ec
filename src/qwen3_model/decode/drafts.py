"""What one-pass cycles have drafted for the texts, by slot, until a later cycle verifies it.

A text's next cycle may be another one: with other texts beside it the seat, the number of seats, the shape of
the pass and the form of the choice change. All cycles of an engine share these tables, so they find a text's
draft whoever has made it."""

from __future__ import annotations

import torch
from torch import Tensor


class Drafts:
    """A draft for each of S slots: K candidates at each of P positions behind the root.

    Tables have a place more than there are slots: empty seats read it and write it."""

    def __init__(self, slots: int, depth: int, width: int, ordered: bool, device: torch.device | str) -> None:
        """depth: P. width: K. ordered: ranked anew behind each candidate before (rerank.py)."""
        size = (slots + 1, depth, width, width) if ordered else (slots + 1, depth, width)
        # Where the root of each draft stands, [S + 1] int32; -1: there is no draft.
        self.at = torch.full((slots + 1,), -1, dtype=torch.int32, device=device)
        self.scores = torch.full(size, float("-inf"), device=device)
        self.ids = torch.zeros(size[:3], dtype=torch.int64, device=device)
        self.order = torch.zeros(size, dtype=torch.int32, device=device) if ordered else None

    def place(self, seats: Tensor) -> Tensor:
        """The place of each seat in the tables, [B] int64. seats [B] int32: slots, -1: an empty seat."""
        return torch.where(seats >= 0, seats, len(self.at) - 1).long()

    def taken(self, place: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores, ids and order of the drafts at places [B], as `grow` takes them, of so many positions."""
        scores, ids = (t[:, :depth].index_select(0, place) for t in (self.scores, self.ids))
        return scores, ids, None if self.order is None else self.order[:, :depth].index_select(0, place)

    def keep(self, place: Tensor, scores: Tensor, ids: Tensor, order: Tensor | None) -> None:
        """Put down drafts of B seats, [B, P, ...] with a P of their own: positions behind are impossible."""
        depth = ids.shape[1]
        self.ids[:, :depth].index_copy_(0, place, ids)
        self.scores[:, :depth].index_copy_(0, place, scores)
        self.scores[:, depth:].index_fill_(0, place, float("-inf"))
        if order is not None and self.order is not None:
            self.order[:, :depth].index_copy_(0, place, order)
