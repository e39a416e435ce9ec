"""Linear and attention by torch's own routines (cuBLAS and SDPA on a GPU), for comparison: fast, and not
row-invariant. Decoding with them shows what the kernels are for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .clock import mark_here
from .pages import in_order
from .plan import PassPlan, PassShape
from .swiglu import swiglu
from .visibility import visible
from .weight import AnyWeight, by_view


@dataclass(frozen=True)
class MaskedRows:
    """The sequences of a pass and the mask of each over its context and all in-flight rows; `lay_torch` fills
    it."""

    contexts: dict[int, int]
    queries: dict[int, Tensor]  # row indices of a sequence
    masks: dict[int, Tensor]  # bool [queries, context + T]


def new_tables_torch(
    shape: PassShape, capacity: int, heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device
) -> MaskedRows:
    """What `attention_torch` takes, to be filled."""
    return MaskedRows({}, {}, {})


def lay_torch(
    plan: PassPlan, tables: MaskedRows, root: Tensor | None = None, clock: Tensor | None = None
) -> None:
    """`lay` for `attention_torch`."""
    if clock is not None:
        mark_here(clock)
    if root is not None:
        plan.stand(root)
    rows, device = plan.rows(), plan.tokens.device
    used = (plan.sequences >= 0).nonzero().flatten()
    flight = torch.zeros(len(used), plan.shape.n_rows, dtype=torch.bool, device=device)
    flight[:, used] = visible(rows).to(device)
    tables.contexts.clear()
    tables.contexts.update(rows.contexts)
    for s, context in rows.contexts.items():
        mine = torch.tensor([i for i, of in enumerate(rows.sequences) if of == s], device=device)
        tables.queries[s], tables.masks[s] = used[mine], F.pad(flight[mine], (context, 0), value=True)


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, tables: MaskedRows,
    scale: float,
) -> Tensor:  # fmt: skip
    """`attention` by `scaled_dot_product_attention` with a mask, a sequence at a time."""
    out = torch.zeros_like(q)  # rows of no sequence: a key that is masked must be a number all the same
    for sequence, context in tables.contexts.items():
        mine = tables.queries[sequence]
        keys, values = (
            torch.cat([in_order(cache, pages[sequence], 0, context), flight.transpose(0, 1)], 1)
            for cache, flight in ((k_cache, k), (v_cache, v))
        )
        attended = F.scaled_dot_product_attention(
            q[mine].transpose(0, 1)[None], keys[None], values[None],
            attn_mask=tables.masks[sequence], scale=scale, enable_gqa=True,
        )  # fmt: skip
        out[mine] = attended[0].transpose(0, 1)
    return out


def linear_torch(
    x: Tensor,
    weight: AnyWeight,
    weight_diff: AnyWeight | None = None,
    n_ar: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` by `torch.mm`, all rows of a view at once; logits are rounded to x's dtype before they are
    widened.
    """
    out_dtype = out_dtype or x.dtype
    return by_view(lambda rows, w: (rows @ w.dense().t()).to(out_dtype), x, weight, weight_diff, n_ar)


def linear_swiglu_torch(x: Tensor, gate_up: AnyWeight) -> Tensor:
    """`linear_swiglu` by `torch.mm`, then the twin's SwiGLU."""
    return swiglu(linear_torch(x, gate_up))
