"""Operations of the dual-view forward pass. They know tensors and visibility, not checkpoints or text.

One operation a file. What stands here today are the plain twins: the definition of each operation, its
rounding order included, readable and row-invariant on any device."""

from .attention import attention
from .choice import Sampling, choose, log_probability
from .commit import commit
from .linear import linear
from .packed import PackedRows, key_segments, pack, unpack
from .rms_norm import rms_norm
from .rope import cos_sin, inverse_frequencies, rope
from .swiglu import swiglu
from .top_k import top_k
from .verify import verify
from .visibility import Path, Rows, paths, visible

__all__ = [
    "PackedRows", "Path", "Rows", "Sampling", "attention", "choose", "commit", "cos_sin",
    "inverse_frequencies", "key_segments", "linear", "log_probability", "pack", "paths", "rms_norm", "rope",
    "swiglu", "top_k", "unpack", "verify", "visible",
]  # fmt: skip
