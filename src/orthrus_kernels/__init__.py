"""Operations of the dual-view forward pass. They know tensors and visibility, not checkpoints or text.

One operation a file. The names here are the plain twins: the definition of each operation, its rounding
order included, readable and row-invariant on any device. `backend_ops` gives the Triton kernels by these
names."""

from ._triton import triton_interprets, triton_runs_on
from .anchors import choose_anchors, end_probabilities
from .attention import attention
from .backends import Ops, backend_ops
from .choice import Sampling, candidates, choose, log_probability
from .commit import commit
from .draft_tree import DraftTree, draft_tree
from .embedding import embedding
from .head import head
from .linear import linear
from .linear_swiglu import linear_swiglu
from .packed import PackedRows, key_segments, pack, unpack
from .pdl import pdl_kinds
from .qk_norm_rope import qk_norm_rope
from .rerank import rerank
from .rms_norm import add_rms_norm, rms_norm
from .rope import cos_sin, inverse_frequencies, rope, rope_table
from .swiglu import swiglu
from .top_k import top_k
from .torch_ops import MaskedRows
from .verify import verify
from .visibility import Path, Rows, paths, visible
from .weight import Weight

__all__ = [
    "DraftTree", "MaskedRows", "Ops", "PackedRows", "Path", "Rows", "Sampling", "Weight", "add_rms_norm",
    "attention", "backend_ops", "candidates", "choose", "choose_anchors", "commit", "cos_sin",
    "draft_tree", "embedding", "end_probabilities", "head", "inverse_frequencies", "key_segments",
    "linear", "linear_swiglu", "log_probability", "pack", "paths", "pdl_kinds", "qk_norm_rope", "rerank",
    "rms_norm", "rope", "rope_table", "swiglu", "top_k", "triton_interprets", "triton_runs_on", "unpack",
    "verify", "visible",
    # make new-op: the name
]  # fmt: skip
