"""Commit: copy accepted in-flight keys and values to their positions, all layers in one launch. The only
writer of the cache.

Which rows, and where they go, is read from device tables, so that a captured graph can commit what a walk
accepted without the host. Bytes moved: 4 L G D bytes of a 16-bit dtype per accepted row, read and written."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .pages import PAGE, page_of


def commit(
    k_cache: Tensor, v_cache: Tensor, pages: Tensor, slots: Tensor, k_rows: Tensor, v_rows: Tensor,
    accepted: Tensor, start: Tensor,
) -> None:  # fmt: skip
    """Write accepted rows of k_rows, v_rows [L, T, G, D] to the pools k_cache, v_cache [L, P, G, PAGE, D], in
    place.

    pages [S, N] int32: the table of pages.py. slots [B] int32: whose rows each line of accepted holds; -1:
    nobody's. accepted [B, M] int32, lines any distance apart: rows in order, behind them -1. start [B] int32:
    the position of the first one. A row whose position has no page, or lies past the reach of the table, is
    not written. Every other place keeps its bits."""
    seats, index = ((accepted >= 0) & (slots >= 0)[:, None]).nonzero(as_tuple=True)
    positions = start[seats] + index
    page = page_of(pages, slots[seats].long(), positions)
    there = page >= 0
    rows = accepted[seats, index][there].long()
    page, place = page[there].long(), (positions[there] % PAGE).long()
    k_cache[:, page, :, place] = k_rows[:, rows].transpose(0, 1)
    v_cache[:, page, :, place] = v_rows[:, rows].transpose(0, 1)


@triton.jit(do_not_specialize=["M", "N"])
def _commit_kernel(
    k_cache, v_cache, stride_cl, stride_cp, stride_cg, stride_cs, pages, stride_ps, slots,
    k_rows, v_rows, stride_rl, stride_rt, stride_rg, accepted, stride_a, start,
    M, N, G,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One (accepted row, layer), one key head after another."""
    i_a, i_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_m = i_a // M, i_a % M
    row, slot = tl.load(accepted + i_b * stride_a + i_m).to(tl.int64), tl.load(slots + i_b).to(tl.int64)
    position = tl.load(start + i_b) + i_m
    reached = (slot >= 0) & (position >= 0) & (position < N * PAGE)
    p_page = pages + slot * stride_ps + position // PAGE
    i_page = tl.load(p_page, mask=reached, other=-1).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D) & (row >= 0) & (i_page >= 0)
    p_row = i_l * stride_rl + row * stride_rt + o_d
    p_cache = i_l * stride_cl + i_page * stride_cp + position % PAGE * stride_cs + o_d
    for _ in range(G):
        b_k = tl.load(k_rows + p_row, mask=m_d, other=0.0)
        b_v = tl.load(v_rows + p_row, mask=m_d, other=0.0)
        tl.store(k_cache + p_cache, b_k, mask=m_d)
        tl.store(v_cache + p_cache, b_v, mask=m_d)
        p_row += stride_rg
        p_cache += stride_cg


def commit_triton(
    k_cache: Tensor, v_cache: Tensor, pages: Tensor, slots: Tensor, k_rows: Tensor, v_rows: Tensor,
    accepted: Tensor, start: Tensor,
) -> None:  # fmt: skip
    """`commit` in one launch."""
    layers, groups, d = k_cache.shape[0], *k_cache.shape[2::2]
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == PAGE, (k_cache.shape, v_cache.shape)
    assert len(accepted) == len(start) == len(slots) and accepted.stride(1) == 1, accepted.shape
    assert k_rows.shape == v_rows.shape == (layers, k_rows.shape[1], groups, d), k_rows.shape
    assert k_cache.stride() == v_cache.stride() and k_rows.stride() == v_rows.stride(), "laid out alike"
    assert k_cache.stride(4) == k_rows.stride(3) == 1, (k_cache.stride(), k_rows.stride())
    assert pages.ndim == 2 and pages.stride(1) == 1, (pages.shape, pages.stride())
    assert {t.dtype for t in (pages, slots, accepted, start)} == {torch.int32}, "tables are int32"
    if not accepted.numel():
        return
    _commit_kernel[(accepted.numel(), layers)](
        k_cache=k_cache, v_cache=v_cache, stride_cl=k_cache.stride(0), stride_cp=k_cache.stride(1),
        stride_cg=k_cache.stride(2), stride_cs=k_cache.stride(3), pages=pages, stride_ps=pages.stride(0),
        slots=slots, k_rows=k_rows, v_rows=v_rows, stride_rl=k_rows.stride(0), stride_rt=k_rows.stride(1),
        stride_rg=k_rows.stride(2),
        accepted=accepted, stride_a=accepted.stride(0), start=start, M=accepted.shape[1], N=pages.shape[1],
        G=groups,
        PAGE=PAGE, D=d, BLOCK_D=triton.next_power_of_2(d), num_warps=1,
    )  # fmt: skip
