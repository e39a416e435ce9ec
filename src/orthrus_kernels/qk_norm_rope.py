"""q/k-norm and rotary embedding, from the stacked projection: rope(rms_norm(head)) of every q and k head.

Shapes: qkv [T, H + 2G, D], cos and sin [T, D/2] fp32, q [T, H, D], k and v [T, G, D]. Rounds where `rms_norm`
does (unit row, then product) and once after the rotation. Moves (H + G) D elements a row in and out, and
(H + 2G) D where values are copied.

A dependent launch (pdl.py) loads the norms' weights before it waits; cos and sin are of the pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import tl, triton
from .pdl import launch_dependents, launch_options, wait
from .rms_norm import rms_norm
from .rope import rope
from .rows import NO_CONTRACTION, check_weights, row_stride

HEADS_A_PROGRAM = 8  # 8 heads of 128: 4 warps of 8 numbers a thread; one constant, so one layout
WARPS = 4


def _launch_metadata(grid, kernel, args):
    """Name and bytes for Triton's profiler."""
    heads, d = args["H"] + args["G"] * (2 if args["VALUES"] else 1), args["D"]
    return {
        "name": f"qk_norm_rope_{grid[0]}x{heads}x{d}",
        "bytes": grid[0] * d * (2 * heads * args["qkv"].element_size() + 4),
    }


@triton.jit(do_not_specialize=["n_ar"], launch_metadata=_launch_metadata)
def _qk_norm_rope_kernel(
    qkv, sqkv_t, q_norm, k_norm, q_norm_diff, k_norm_diff, cos, sin, q, sq_t, k, sk_t, v, sv_t,
    n_ar, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, PDL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (t, i): heads [i BLOCK_H, (i + 1) BLOCK_H) of row t, q heads first; a, b: halves of a head.
    VALUES: the last G heads are copied to v."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D // 2
    m = (o_h < H + (2 * G if VALUES else G))[:, None] & m_d[None, :]
    o_head = o_h[:, None] * D + o_d[None, :]
    dtype: tl.constexpr = qkv.dtype.element_ty
    is_ar = i_t < n_ar
    p_qw = tl.where(is_ar, q_norm, q_norm_diff) + o_d
    p_kw = tl.where(is_ar, k_norm, k_norm_diff) + o_d
    is_q = (o_h < H)[:, None]
    w_a = tl.where(
        is_q, tl.load(p_qw, mask=m_d, other=0.0)[None, :], tl.load(p_kw, mask=m_d, other=0.0)[None, :]
    )
    w_b = tl.where(
        is_q,
        tl.load(p_qw + D // 2, mask=m_d, other=0.0)[None, :],
        tl.load(p_kw + D // 2, mask=m_d, other=0.0)[None, :],
    )
    if PDL:
        wait()  # qkv, cos, sin, q, k and v may be in use until here
        launch_dependents()
    a = tl.load(qkv + i_t * sqkv_t + o_head, mask=m, other=0.0)
    b = tl.load(qkv + i_t * sqkv_t + D // 2 + o_head, mask=m, other=0.0)
    if VALUES:
        m_v = m & (o_h >= H + G)[:, None]
        tl.store(v + i_t * sv_t - (H + G) * D + o_head, a, mask=m_v)
        tl.store(v + i_t * sv_t - (H + G) * D + D // 2 + o_head, b, mask=m_v)
    a, b = a.to(tl.float32), b.to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]
    a = ((a * scale).to(dtype).to(tl.float32) * w_a.to(tl.float32)).to(dtype).to(tl.float32)
    b = ((b * scale).to(dtype).to(tl.float32) * w_b.to(tl.float32)).to(dtype).to(tl.float32)
    c = tl.load(cos + i_t * (D // 2) + o_d, mask=m_d, other=0.0)[None, :]
    s = tl.load(sin + i_t * (D // 2) + o_d, mask=m_d, other=0.0)[None, :]
    first = (a * c - b * s).to(dtype)
    second = (b * c + a * s).to(dtype)
    m_q = m & is_q
    m_k = m & ((o_h >= H) & (o_h < H + G))[:, None]
    tl.store(q + i_t * sq_t + o_head, first, mask=m_q)
    tl.store(q + i_t * sq_t + D // 2 + o_head, second, mask=m_q)
    tl.store(k + i_t * sk_t - H * D + o_head, first, mask=m_k)
    tl.store(k + i_t * sk_t - H * D + D // 2 + o_head, second, mask=m_k)


def qk_norm_rope_triton(
    qkv: Tensor,
    heads: int,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    q_norm_diff: Tensor | None = None,
    k_norm_diff: Tensor | None = None,
    n_ar: int | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    *,
    out: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` as one Triton launch. `out` takes q; a row's heads are packed in it and in `keep`; cos
    and sin contiguous. pdl: as a dependent launch (pdl.py)."""
    rows, stacked, d = qkv.shape
    groups = _groups(stacked, heads)
    q = qkv.new_empty(rows, heads, d) if out is None else out
    k, v = keep or (qkv.new_empty(rows, groups, d), qkv[:, heads + groups :])
    both = q_norm_diff is not None and k_norm_diff is not None and n_ar is not None
    q_diff, k_diff = (q_norm_diff, k_norm_diff) if both else (q_norm, k_norm)
    assert q_diff is not None and k_diff is not None
    check_weights(d, q_norm, k_norm, q_diff, k_diff)
    assert q.shape == (rows, heads, d) and k.shape == (rows, groups, d), (q.shape, k.shape, qkv.shape)
    assert v.shape == k.shape and v.dtype == k.dtype and v.stride(1) == d, (v.shape, v.dtype, v.stride())
    assert qkv.stride(1) == q.stride(1) == k.stride(1) == d, (qkv.stride(), q.stride(), k.stride())
    assert qkv.dtype == q.dtype == k.dtype == q_norm.dtype == k_norm.dtype, (qkv.dtype, q.dtype, q_norm.dtype)
    assert cos.shape == sin.shape == (rows, d // 2) and cos.is_contiguous() and sin.is_contiguous(), cos.shape
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    if rows == 0:
        return q, k, v
    moved = stacked if keep else heads + groups
    _qk_norm_rope_kernel[(rows, -(-moved // HEADS_A_PROGRAM))](
        qkv=qkv, sqkv_t=row_stride(qkv, stacked * d), q_norm=q_norm, k_norm=k_norm, q_norm_diff=q_diff,
        k_norm_diff=k_diff, cos=cos, sin=sin, q=q, sq_t=row_stride(q, heads * d), k=k,
        sk_t=row_stride(k, groups * d), v=v if keep else None, sv_t=row_stride(v, groups * d) if keep else 0,
        n_ar=n_ar if both else rows, eps=eps, H=heads, G=groups, D=d, VALUES=keep is not None,
        PDL=pdl, BLOCK_H=HEADS_A_PROGRAM, BLOCK_D=triton.next_power_of_2(d // 2), num_warps=WARPS,
        **NO_CONTRACTION, **launch_options(pdl),
    )  # fmt: skip
    return q, k, v


def _groups(stacked: int, heads: int) -> int:
    """G of H + 2G stacked heads. Raises ValueError when that does not come out even."""
    if heads < 1 or stacked <= heads or (stacked - heads) % 2:
        raise ValueError(
            f"qk_norm_rope: {stacked} stacked heads cannot be {heads} query heads and 2 G others"
        )
    return (stacked - heads) // 2


def qk_norm_rope(
    qkv: Tensor,
    heads: int,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    q_norm_diff: Tensor | None = None,
    k_norm_diff: Tensor | None = None,
    n_ar: int | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate the `heads` query heads and the G key heads of qkv: (q, k, v). Rows from n_ar on
    take the `_diff` weights. keep: tensors [T, G, D] that keys and values are written to, and returned;
    without it v is the last G heads of qkv itself.

    Raises ValueError when the number of stacked heads is not `heads` + 2 G.
    """
    groups = _groups(qkv.shape[1], heads)
    q, k, v = qkv.split([heads, groups, groups], dim=1)
    q = rope(rms_norm(q, q_norm, eps, q_norm_diff, n_ar), cos, sin)
    k = rope(rms_norm(k, k_norm, eps, k_norm_diff, n_ar), cos, sin)
    return (q, keep[0].copy_(k), keep[1].copy_(v)) if keep else (q, k, v)
