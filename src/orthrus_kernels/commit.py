"""Commit: copy accepted in-flight keys and values to their positions. The only writer of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_room(k_cache: Tensor, start: int, count: int) -> int:
    """The position behind `count` rows from `start` on. Raises ValueError when the cache has no room."""
    end = start + count
    if not 0 <= start <= end <= k_cache.shape[3]:
        raise ValueError(
            f"commit: positions {start}..{end - 1} do not fit a cache of {k_cache.shape[3]} positions"
        )
    return end


def commit(
    k_cache: Tensor,
    v_cache: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    accepted: Sequence[int],
    start: int,
    sequence: int = 0,
) -> None:
    """Write rows `accepted` of k_rows, v_rows [L, T, G, D] to positions start, start + 1, ... of caches [L,
    B, G, S, D], in place.

    Every other slot keeps its bits. Raises ValueError when the rows do not fit behind `start`.
    """
    end = check_room(k_cache, start, len(accepted))
    chosen = list(accepted)
    k_cache[:, sequence, :, start:end] = k_rows[:, chosen].transpose(1, 2)
    v_cache[:, sequence, :, start:end] = v_rows[:, chosen].transpose(1, 2)
