"""Operations of the dual-view forward pass. They know tensors and visibility, not checkpoints or text.

One operation a file. The names here are the plain twins: the definition of each operation, its rounding
order included, readable and row-invariant on any device. `backend_ops` gives the Triton kernels by these
names."""

from ._triton import triton_interprets, triton_runs_on
from .allot import allot
from .anchors import choose_anchors, end_probabilities
from .attention import attention, new_tables
from .backends import Ops, backend_ops
from .blocks import follow, place_blocks
from .branch import branch
from .choice import candidates, choose, log_sum_exp
from .commit import commit
from .draft_tree import DraftTree, draft_tree
from .embedding import embedding
from .grow import grow
from .head import head
from .lay import lay
from .linear import linear
from .linear_swiglu import linear_swiglu
from .lookup import lookup
from .pages import PAGE, in_order, pages_for
from .pass_tables import PassTables, key_segments, unpack
from .pdl import pdl_kinds
from .permit import permit
from .plan import PassPlan, PassShape
from .put_down import put_down
from .qk_norm_rope import qk_norm_rope
from .rerank import rerank
from .rms_norm import add_rms_norm, rms_norm
from .rope import cos_sin, inverse_frequencies, rope, rope_table
from .sampling import Sampling
from .sampling_table import FORMS, Form, SamplingTable, alike
from .seen import seen_rows
from .swiglu import swiglu
from .switches import gluon_is_on
from .top_k import top_k
from .torch_ops import MaskedRows
from .visibility import Rows, visible
from .walk import walk
from .weight import Weight

__all__ = [
    "DraftTree", "FORMS", "Form", "MaskedRows", "Ops", "PAGE", "PassPlan", "PassShape", "PassTables",
    "Rows", "Sampling", "SamplingTable", "Weight", "add_rms_norm", "alike", "allot", "attention",
    "backend_ops", "branch", "candidates", "choose", "choose_anchors", "commit", "cos_sin", "draft_tree",
    "embedding", "end_probabilities", "follow", "gluon_is_on", "grow", "head", "in_order",
    "inverse_frequencies", "key_segments", "lay", "linear", "linear_swiglu", "log_sum_exp", "lookup",
    "new_tables", "pages_for", "pdl_kinds", "permit", "place_blocks", "put_down", "qk_norm_rope", "rerank",
    "rms_norm", "rope", "rope_table", "seen_rows", "swiglu", "top_k", "triton_interprets", "triton_runs_on",
    "unpack", "visible", "walk",
    # make new-op: the name
]  # fmt: skip
