"""Commit: copy accepted in-flight keys and values to their positions, all layers in one launch. The only
writer of the cache.

Which rows, and where they go, is read from device tables, so that a captured graph can commit what a walk
accepted without the host. Bytes moved: 4 L G D bytes of a 16-bit dtype per accepted row, read and written."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton


def commit(
    k_cache: Tensor, v_cache: Tensor, k_rows: Tensor, v_rows: Tensor, accepted: Tensor, start: Tensor
) -> None:
    """Write accepted rows of k_rows, v_rows [L, T, G, D] to caches [L, S, G, C, D] of C positions, in place.

    accepted [S, N] int32: for each sequence its rows in order, behind them -1. start [S] int32: the position
    of its first one. What would not fit behind the last position is not written; a walk keeps no more than
    the text may have. Every other place keeps its bits."""
    for s, (rows, first) in enumerate(zip(accepted.tolist(), start.tolist(), strict=True)):
        rows = [row for row in rows if row >= 0][: max(k_cache.shape[3] - first, 0)]
        k_cache[:, s, :, first : first + len(rows)] = k_rows[:, rows].transpose(1, 2)
        v_cache[:, s, :, first : first + len(rows)] = v_rows[:, rows].transpose(1, 2)


@triton.jit(do_not_specialize=["N", "C"])
def _commit_kernel(
    k_cache, v_cache, stride_cl, stride_cb, stride_cg, stride_cs,
    k_rows, v_rows, stride_rl, stride_rt, stride_rg, accepted, start,
    N, C, G,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One (accepted row, layer), one key head after another."""
    i_a, i_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_s = i_a // N
    row = tl.load(accepted + i_a).to(tl.int64)
    position = tl.load(start + i_s).to(tl.int64) + i_a % N
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D) & (row >= 0) & (position >= 0) & (position < C)
    p_row = i_l * stride_rl + row * stride_rt + o_d
    p_cache = i_l * stride_cl + i_s.to(tl.int64) * stride_cb + position * stride_cs + o_d
    for _ in range(G):
        b_k = tl.load(k_rows + p_row, mask=m_d, other=0.0)
        b_v = tl.load(v_rows + p_row, mask=m_d, other=0.0)
        tl.store(k_cache + p_cache, b_k, mask=m_d)
        tl.store(v_cache + p_cache, b_v, mask=m_d)
        p_row += stride_rg
        p_cache += stride_cg


def commit_triton(
    k_cache: Tensor, v_cache: Tensor, k_rows: Tensor, v_rows: Tensor, accepted: Tensor, start: Tensor
) -> None:
    """`commit` in one launch."""
    layers, sequences, groups, size, d = k_cache.shape
    assert accepted.shape[0] == len(start) == sequences and accepted.is_contiguous(), accepted.shape
    assert k_rows.shape == v_rows.shape == (layers, k_rows.shape[1], groups, d), k_rows.shape
    assert k_cache.stride() == v_cache.stride() and k_rows.stride() == v_rows.stride(), "laid out alike"
    assert k_cache.stride(4) == k_rows.stride(3) == 1, (k_cache.stride(), k_rows.stride())
    assert accepted.dtype == start.dtype == torch.int32, (accepted.dtype, start.dtype)
    if not accepted.numel():
        return
    _commit_kernel[(accepted.numel(), layers)](
        k_cache=k_cache, v_cache=v_cache, stride_cl=k_cache.stride(0), stride_cb=k_cache.stride(1),
        stride_cg=k_cache.stride(2), stride_cs=k_cache.stride(3),
        k_rows=k_rows, v_rows=v_rows, stride_rl=k_rows.stride(0), stride_rt=k_rows.stride(1),
        stride_rg=k_rows.stride(2),
        accepted=accepted, start=start, N=accepted.shape[1], C=size, G=groups,
        D=d, BLOCK_D=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip
