"""The operations of a forward pass by backend: plain twins ("reference") or Triton kernels ("triton").

Both have the same signatures; a kernel takes `out=` besides. To plug in a kernel, name it in `_TRITON`: what
is not named there runs on its twin, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .attention import attention
from .attention_triton import attention_triton
from .choice import choose, log_probability
from .choice_triton import choose_triton, log_probability_triton
from .commit import commit
from .embedding import embedding, embedding_triton
from .linear import linear, linear_triton
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_triton
from .rms_norm import add_rms_norm, add_rms_norm_triton, rms_norm, rms_norm_triton
from .rope import rope
from .swiglu import swiglu, swiglu_triton
from .top_k import top_k, top_k_triton
from .verify import verify

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """One backend's operations; each is described by the twin of its name."""

    add_rms_norm: Op
    attention: Op
    choose: Op
    commit: Op
    embedding: Op
    linear: Op
    log_probability: Op
    qk_norm_rope: Op
    rms_norm: Op
    rope: Op
    swiglu: Op
    top_k: Op
    verify: Op


REFERENCE = Ops(
    add_rms_norm=add_rms_norm, attention=attention, choose=choose, commit=commit, embedding=embedding,
    linear=linear, log_probability=log_probability, qk_norm_rope=qk_norm_rope, rms_norm=rms_norm, rope=rope,
    swiglu=swiglu, top_k=top_k, verify=verify,
)  # fmt: skip

_TRITON = replace(
    REFERENCE,
    add_rms_norm=add_rms_norm_triton,
    attention=attention_triton,
    choose=choose_triton,
    embedding=embedding_triton,
    linear=linear_triton,
    log_probability=log_probability_triton,
    qk_norm_rope=qk_norm_rope_triton,
    rms_norm=rms_norm_triton,
    swiglu=swiglu_triton,
    top_k=top_k_triton,
)


def backend_ops(backend: str) -> Ops:
    """Operations of "reference" or "triton". Raises ValueError for any other name."""
    try:
        return {"reference": REFERENCE, "triton": _TRITON}[backend]
    except KeyError:
        raise ValueError(f'backend is "reference" or "triton", not {backend!r}') from None
