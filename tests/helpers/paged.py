"""Contiguous caches as pools of pages, as they lie after many texts: shuffled, among others' pages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthrus_kernels import PAGE, commit, in_order, pages_for

FOREIGN = 3  # pages of a pool that no text here owns


def paged(
    k_cache: Tensor, v_cache: Tensor, contexts: Mapping[int, int] | None = None, shuffled: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Caches [B, G, S, D] as pools [P, G, PAGE, D] and their table [B, N] int32.

    Foreign pages and places past S hold NaN. contexts: committed positions of each sequence; None: all are.
    shuffled: the pages lie in any order, foreign ones between them, and behind a context the table names a
    foreign one. Else they lie in the order of the table, and behind a context it says -1."""
    b, g, size, d = k_cache.shape
    each = pages_for(size)
    order = torch.arange(b * each + FOREIGN)
    if shuffled:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(size))
    order, foreign = order[: b * each], order[-1]
    pools = []
    for cache in (k_cache, v_cache):
        whole = pad(cache, (0, 0, 0, each * PAGE - size), value=float("nan"))
        pool = cache.new_full((b * each + FOREIGN, g, PAGE, d), float("nan"))
        pool[order] = whole.unflatten(2, (each, PAGE)).transpose(1, 2).flatten(0, 1)
        pools.append(pool)
    pages = order.view(b, each).int()
    for sequence in range(b):
        used = pages_for(size if contexts is None else contexts.get(sequence, 0))
        pages[sequence, used:] = foreign if shuffled else -1
    return *pools, pages.to(k_cache.device)


def committed(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, rows: list[int], start: int
) -> tuple[Tensor, Tensor]:
    """Contiguous caches of one sequence [1, G, S, D] with these rows of a pass, of k and v [T, G, D], put
    behind `start` positions by `commit`."""
    *pools, pages = paged(k_cache, v_cache)
    table = torch.tensor([[start, *rows]], dtype=torch.int32, device=k.device)
    slots = torch.arange(len(table), device=table.device)
    commit(*(pool[None] for pool in pools), pages, slots, k[None], v[None], table[:, 1:], table[:, 0])
    keys, values = (in_order(pool, pages[0], 0, k_cache.shape[2])[None] for pool in pools)
    return keys, values
