"""Commit: copy accepted in-flight keys and values to their positions, all layers in one launch. The only
writer of the cache.

Which rows, and where they go, the kernel reads from device tables, so that a captured graph can commit what a
walk accepted without the host. Bytes moved: 4 L G D bytes of a 16-bit dtype per accepted row, read and
written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton


@triton.jit(do_not_specialize=["sequence", "S"])
def _commit_kernel(
    k_cache, v_cache, stride_cl, stride_cb, stride_cg, stride_cs,
    k_rows, v_rows, stride_rl, stride_rt, stride_rg, accepted, start,
    sequence, S, G,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One (accepted row, layer), one key head after another."""
    i_a, i_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(accepted + i_a).to(tl.int64)
    position = tl.load(start).to(tl.int64) + i_a
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D) & (row >= 0) & (position >= 0) & (position < S)
    p_row = i_l * stride_rl + row * stride_rt + o_d
    p_cache = i_l * stride_cl + sequence.to(tl.int64) * stride_cb + position * stride_cs + o_d
    for _ in range(G):
        b_k = tl.load(k_rows + p_row, mask=m_d, other=0.0)
        b_v = tl.load(v_rows + p_row, mask=m_d, other=0.0)
        tl.store(k_cache + p_cache, b_k, mask=m_d)
        tl.store(v_cache + p_cache, b_v, mask=m_d)
        p_row += stride_rg
        p_cache += stride_cg


def check_room(k_cache: Tensor, start: int, count: int) -> int:
    """The position behind `count` rows from `start` on. Raises ValueError when the cache has no room."""
    end = start + count
    if not 0 <= start <= end <= k_cache.shape[3]:
        raise ValueError(
            f"commit: positions {start}..{end - 1} do not fit a cache of {k_cache.shape[3]} positions"
        )
    return end


def commit_triton(
    k_cache: Tensor, v_cache: Tensor, k_rows: Tensor, v_rows: Tensor, accepted: Sequence[int] | Tensor,
    start: int | Tensor, sequence: int = 0,
) -> None:  # fmt: skip
    """Write rows `accepted` of k_rows, v_rows [L, T, G, D] to positions start, start + 1, ... of caches
    [L, B, G, S, D], in place.

    On the device: accepted int32, -1 for no row (a path shorter than the table), and start int32 [1]. What
    would not fit behind the last position is then not written: the host cannot know in time, so callers keep
    room for a whole draft. From the host: a sequence and an int, checked as by the twin (ValueError).
    Every other slot keeps its bits."""
    if not isinstance(accepted, Tensor):
        assert isinstance(start, int), start
        check_room(k_cache, start, len(accepted))
        table = torch.tensor([start, *accepted], dtype=torch.int32, device=k_cache.device)
        accepted, start = table[1:], table[:1]
    assert isinstance(start, Tensor), start
    if not len(accepted):
        return
    layers, _, groups, size, d = k_cache.shape
    assert k_rows.shape == v_rows.shape == (layers, k_rows.shape[1], groups, d), k_rows.shape
    assert k_cache.stride() == v_cache.stride() and k_rows.stride() == v_rows.stride(), "laid out alike"
    assert k_cache.stride(4) == k_rows.stride(3) == 1, (k_cache.stride(), k_rows.stride())
    assert accepted.dtype == start.dtype == torch.int32 and start.numel() == 1, (accepted.dtype, start.dtype)
    _commit_kernel[(len(accepted), layers)](
        k_cache=k_cache, v_cache=v_cache, stride_cl=k_cache.stride(0), stride_cb=k_cache.stride(1),
        stride_cg=k_cache.stride(2), stride_cs=k_cache.stride(3),
        k_rows=k_rows, v_rows=v_rows, stride_rl=k_rows.stride(0), stride_rt=k_rows.stride(1),
        stride_rg=k_rows.stride(2),
        accepted=accepted, start=start, sequence=sequence, S=size, G=groups,
        D=d, BLOCK_D=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip


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
