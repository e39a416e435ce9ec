"""SwiGLU: round(silu(gate)) * up, the rounding order of Hugging Face's Qwen3 (silu in fp32, rounded, product
rounded).
"""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F]: the gate's F columns, then the up projection's. Returns [T, F] in the same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up
