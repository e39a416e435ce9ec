"""Where a position of a text lies in the KV cache: in pages of 64 positions, found through a table.

The cache of a layer is a pool of pages [P, G, PAGE, D], and the pages of a slot (a running text) lie anywhere
in it. Position p of slot s lies in page `pages[s, p // PAGE]`, at place `p % PAGE`. `pages` is [S, N] int32,
on the device; an entry below 0 is no page. Entries behind the end of a text are never read.

A page holds whole blocks of the keys that attention reads at once. So a page decides the address of a key,
never the order of a sum."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE = 64  # positions


def pages_for(positions: int) -> int:
    """Pages that so many positions take."""
    return -(-positions // PAGE)


def page_of(pages: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """The page of each position, of the slot beside it, both [M]; below 0 where there is none, before the
    first position and past the reach of the table too."""
    reached = (positions >= 0) & (positions < pages.shape[1] * PAGE)
    return torch.where(reached, pages[slots, torch.where(reached, positions, 0) // PAGE], -1)


def in_order(cache: Tensor, pages: Tensor, first: int, last: int) -> Tensor:
    """A copy of positions [first, last) of one slot, side by side: [..., G, last - first, D].

    cache [..., P, G, PAGE, D]; pages [N]: the slot's line of the table. No page of another position is read.
    """
    skipped = first // PAGE
    found = cache.transpose(-4, -3).index_select(-3, pages[skipped : pages_for(last)])
    return found.flatten(-3, -2)[..., first - skipped * PAGE : last - skipped * PAGE, :]
