"""Triton where it is installed; where it is not (no wheel for macOS or Windows) the plain twins still import.

Kernel files take `triton`, `tl` and `TensorDescriptor` from here. Without Triton a kernel becomes an object
that raises when it is launched."""

from __future__ import annotations

from typing import Any

import torch


class _Absent:
    """Stands for anything of Triton's while a module is imported; launching it raises."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("backend 'triton' needs the triton package, which is not installed here")


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = _Absent()


def triton_interprets() -> bool:
    """Whether kernels are interpreted (TRITON_INTERPRET=1), for debugging: bf16 is wrong there, unless
    repaired as tests/helpers/interpreter.py does.
    """
    return not isinstance(triton, _Absent) and bool(triton.knobs.runtime.interpret)


def triton_runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on a device: CUDA, or any under Triton's interpreter."""
    return not isinstance(triton, _Absent) and (device.type == "cuda" or triton_interprets())


__all__ = ["TensorDescriptor", "tl", "triton", "triton_interprets", "triton_runs_on"]
