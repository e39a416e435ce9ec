"""The operations of a forward pass by backend: plain twins ("reference"), Triton kernels ("triton"), or
torch's own matrix product and attention in their place ("torch": what everyone else runs, for comparison
only, since a row's bits depend on the rows beside it).

All have the same signatures; a kernel takes `out=` besides. To plug in a kernel, name it in `_TRITON`: what
is not named there runs on its twin, on any device. `new_tables` makes what a backend's attention reads of a
pass, and `lay` fills it, once a pass for all layers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .allot import allot, allot_triton
from .attention import attention, new_tables
from .attention_either import attention_either, new_tables_either
from .blocks import follow, follow_triton, place_blocks, place_blocks_triton
from .branch import branch, branch_triton
from .choice import candidates, choose, likeliest, log_sum_exp
from .choice_triton import candidates_triton, choose_triton, likeliest_triton, log_sum_exp_triton
from .commit import commit, commit_triton
from .embedding import embedding, embedding_triton
from .grow import grow, grow_triton
from .head import head, head_triton
from .lay import lay
from .lay_triton import lay_triton
from .linear import linear, linear_triton
from .linear_either import linear_either, linear_swiglu_either
from .linear_swiglu import linear_swiglu, linear_swiglu_triton
from .lookup import lookup, lookup_triton
from .permit import permit, permit_triton
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_triton
from .rerank import rerank, rerank_triton
from .rms_norm import add_rms_norm, add_rms_norm_triton, rms_norm, rms_norm_triton
from .seen import seen_rows, seen_rows_triton
from .switches import gluon_is_on
from .torch_ops import attention_torch, lay_torch, linear_swiglu_torch, linear_torch, new_tables_torch
from .walk import walk, walk_triton

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """One backend's operations; each is described by the twin of its name."""

    add_rms_norm: Op
    allot: Op
    attention: Op
    branch: Op
    candidates: Op
    choose: Op
    commit: Op
    embedding: Op
    follow: Op
    grow: Op
    head: Op
    lay: Op
    likeliest: Op
    linear: Op
    linear_swiglu: Op
    log_sum_exp: Op
    lookup: Op
    new_tables: Op
    permit: Op
    place_blocks: Op
    qk_norm_rope: Op
    rerank: Op
    rms_norm: Op
    seen_rows: Op
    walk: Op
    # make new-op: a field


REFERENCE = Ops(
    add_rms_norm=add_rms_norm, allot=allot, attention=attention, branch=branch, candidates=candidates,
    choose=choose, commit=commit, embedding=embedding, follow=follow, grow=grow, head=head, lay=lay,
    likeliest=likeliest, linear=linear, linear_swiglu=linear_swiglu, log_sum_exp=log_sum_exp, lookup=lookup,
    new_tables=new_tables, permit=permit, place_blocks=place_blocks, qk_norm_rope=qk_norm_rope,
    rerank=rerank, rms_norm=rms_norm, seen_rows=seen_rows, walk=walk,
    # make new-op: the twin
)  # fmt: skip

_TRITON = replace(
    REFERENCE,
    add_rms_norm=add_rms_norm_triton,
    allot=allot_triton,
    attention=attention_either,
    branch=branch_triton,
    candidates=candidates_triton,
    choose=choose_triton,
    commit=commit_triton,
    embedding=embedding_triton,
    follow=follow_triton,
    grow=grow_triton,
    head=head_triton,
    lay=lay_triton,
    likeliest=likeliest_triton,
    linear=linear_either,
    linear_swiglu=linear_swiglu_either,
    log_sum_exp=log_sum_exp_triton,
    lookup=lookup_triton,
    new_tables=new_tables_either,
    permit=permit_triton,
    place_blocks=place_blocks_triton,
    qk_norm_rope=qk_norm_rope_triton,
    rerank=rerank_triton,
    rms_norm=rms_norm_triton,
    seen_rows=seen_rows_triton,
    walk=walk_triton,
    # make new-op: the kernel
)


_TORCH = replace(
    REFERENCE,
    attention=attention_torch,
    lay=lay_torch,
    linear=linear_torch,
    linear_swiglu=linear_swiglu_torch,
    new_tables=new_tables_torch,
)

_BACKENDS = {"reference": REFERENCE, "triton": _TRITON, "torch": _TORCH}


# What a kind adds to its operations' arguments. "signals" is "linear" without the early start of its own: a
# linear in its turn, which lets the small kernel behind it start early.
_DEPENDENT: dict[str, tuple[tuple[str, ...], dict[str, bool]]] = {
    "rowwise": (("add_rms_norm", "embedding", "qk_norm_rope", "rms_norm"), {"pdl": True}),
    "attention": (("attention",), {"pdl": True}),
    "signals": (("head", "linear", "linear_swiglu"), {"pdl": True, "early": False}),
    "linear": (("head", "linear", "linear_swiglu"), {"pdl": True}),
}


def backend_ops(backend: str, pdl: Collection[str] = ()) -> Ops:
    """Operations of "reference", "triton" or "torch". Raises ValueError for any other name, and where
    ORTHRUS_GLUON is neither on nor off: whether Gluon may run "triton"'s linears (linear_either.py).

    pdl: which kinds of Triton kernels are dependent launches (pdl.py): "rowwise", "attention", "linear" or,
    in place of that, "signals". Only on a device that `pdl_supported` names; other backends have none."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend is one of {', '.join(_BACKENDS)}, not {backend!r}")
    unknown = set(pdl) - set(_DEPENDENT)
    if unknown or {"signals", "linear"} <= set(pdl):
        raise ValueError(f"pdl is of {', '.join(_DEPENDENT)}, the last two not together: not {sorted(pdl)}")
    ops = _BACKENDS[backend]
    if not gluon_is_on() and backend == "triton":
        ops = replace(ops, linear=linear_triton, linear_swiglu=linear_swiglu_triton)
    if backend != "triton" or not pdl:
        return ops
    settings = [(name, how) for kind in pdl for names, how in [_DEPENDENT[kind]] for name in names]
    return replace(ops, **{name: partial(getattr(ops, name), **how) for name, how in settings})
