"""Linear and attention by torch's own routines (cuBLAS and SDPA on a GPU), for comparison: fast, and not
row-invariant. Decoding with them shows what the kernels are for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import by_view
from .swiglu import swiglu
from .visibility import Rows, visible
from .weight import Weight


@dataclass(frozen=True)
class MaskedRows:
    """The sequences of a pass and the mask of each over its context and all in-flight rows."""

    contexts: dict[int, int]
    queries: dict[int, Tensor]  # row indices of a sequence
    masks: dict[int, Tensor]  # bool [queries, context + T]

    def on(self, device: torch.device) -> MaskedRows:
        """A copy on a device."""
        queries, masks = ({s: t.to(device) for s, t in d.items()} for d in (self.queries, self.masks))
        return MaskedRows(self.contexts, queries, masks)


def prepare_rows_torch(
    rows: Rows, heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device
) -> MaskedRows:
    """What `attention_torch` takes for the rows of a pass."""
    flight = visible(rows).to(device)
    queries = {
        s: torch.tensor([i for i, mine in enumerate(rows.sequences) if mine == s], device=device)
        for s in rows.contexts
    }
    masks = {s: F.pad(flight[queries[s]], (context, 0), value=True) for s, context in rows.contexts.items()}
    return MaskedRows(rows.contexts, queries, masks)


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: MaskedRows, scale: float
) -> Tensor:
    """`attention` by `scaled_dot_product_attention` with a mask, a sequence at a time."""
    out = torch.empty_like(q)
    for sequence, context in rows.contexts.items():
        mine = rows.queries[sequence]
        keys, values = (
            torch.cat([cache[sequence, :, :context], flight.transpose(0, 1)], 1)
            for cache, flight in ((k_cache, k), (v_cache, v))
        )
        attended = F.scaled_dot_product_attention(
            q[mine].transpose(0, 1)[None], keys[None], values[None],
            attn_mask=rows.masks[sequence], scale=scale, enable_gqa=True,
        )  # fmt: skip
        out[mine] = attended[0].transpose(0, 1)
    return out


def linear_torch(
    x: Tensor,
    weight: Weight,
    weight_diff: Weight | None = None,
    n_ar: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` by `torch.mm`, all rows of a view at once; logits are rounded to x's dtype before they are
    widened.
    """
    out_dtype = out_dtype or x.dtype
    return by_view(lambda rows, w: (rows @ w.dense().t()).to(out_dtype), x, weight, weight_diff, n_ar)


def linear_swiglu_torch(x: Tensor, gate_up: Weight) -> Tensor:
    """`linear_swiglu` by `torch.mm`, then the twin's SwiGLU."""
    return swiglu(linear_torch(x, gate_up))
