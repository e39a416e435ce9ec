"""Gluon where the installed Triton has it: Triton's language for one GPU architecture (3.6 and 3.7 were
tried).

A kernel file of Gluon takes its names from here, as others take theirs from `_triton.py`. It has no
`from __future__ import annotations`: an aggregate's fields are checked against their annotated types."""

from __future__ import annotations

from typing import Any

from ._triton import _Absent

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
    from triton.language.core import _aggregate as aggregate

    constexpr_function = gluon.constexpr_function
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # from 3.7 on, up to 3.6
    HAS_GLUON = True
except (ImportError, AttributeError):  # another Triton, or none
    absent: Any = _Absent()
    gluon = gl = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = absent
    fence_async_shared = GluonDescriptor = aggregate = barrier = constexpr_function = async_copy = absent
    HAS_GLUON = False


def in_gluon(function: Any) -> Any:
    """A function of Triton's language, for Gluon to call: one definition for both."""
    return gluon.jit(function.fn) if HAS_GLUON else absent


__all__ = [
    "GluonDescriptor", "HAS_GLUON", "aggregate", "async_copy", "barrier", "constexpr_function",
    "fence_async_shared", "gl", "gluon", "in_gluon", "mbarrier", "tma",
    "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip
