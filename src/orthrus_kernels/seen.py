"""What the penalties of a choice see behind each node of a draft tree: which tokens the prompt holds, and how
often each one was generated, by the text and on the node's own path.

One number a token: PROMPT where the prompt holds it, and GENERATED for each time that it was generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._triton import tl, triton
from .layout import TAKES_PENALTY, Settings, slot_and_takes
from .sampling_table import SamplingTable

PROMPT, GENERATED = 1, 2
GENERATED_ONCE = tl.constexpr(GENERATED)
_TILE = 4096  # tokens a program


def counts_of(tokens: Sequence[int], prompt: int, vocabulary: int) -> Tensor:
    """What is seen of a text whose first `prompt` tokens are its prompt; [V] int32 on the CPU."""
    ids = torch.tensor(tokens, dtype=torch.int64, device="cpu")
    counts = ids[prompt:].bincount(minlength=vocabulary).int() * GENERATED
    counts[ids[:prompt]] |= PROMPT
    return counts


def seen_rows(
    counts: Tensor, table: SamplingTable, slots: Tensor, tokens: Tensor | None = None,
    parents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns int32 [T, V]: what the choice behind row t sees of token v; meaningless for rows whose settings
    in the table have no penalty.

    counts [S, V] int32: what is seen of the text of each slot, a root's token included. slots [T] int32: the
    rows' texts; -1: a padding row. tokens [T] int64, parents [T] int32: rows of trees, -1 above a root, whose
    parents come before them and are rows of the same text; without them the texts alone count."""
    of = slots.clamp(min=0).long()
    seen = counts[of]
    if tokens is None or parents is None:
        return seen
    for row, (token, parent) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        if parent >= 0:
            seen[row] = seen[parent]
            seen[row, token] += GENERATED
    return seen


@triton.jit
def _texts_kernel(counts, numbers, slots, seen, V, TILE: tl.constexpr):
    """Program (tile, row)."""
    o_v, i_r = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1).to(tl.int64)
    slot, takes = slot_and_takes(numbers, slots, i_r)
    if (takes & TAKES_PENALTY) != 0:
        b = tl.load(counts + slot.to(tl.int64) * V + o_v, mask=o_v < V, other=0)
        tl.store(seen + i_r * V + o_v, b, mask=o_v < V)


@triton.jit
def _paths_kernel(seen, numbers, slots, tokens, parents, V):
    """One row: it walks up to its root."""
    i_r = tl.program_id(0).to(tl.int64)
    seen += i_r * V
    _, takes = slot_and_takes(numbers, slots, i_r)
    row = tl.where((takes & TAKES_PENALTY) != 0, i_r, -1)
    above = tl.load(parents + row, mask=row >= 0, other=-1)
    while above >= 0:
        tl.atomic_add(seen + tl.load(tokens + row), GENERATED_ONCE, sem="relaxed")
        row = above.to(tl.int64)
        above = tl.load(parents + row)


def seen_rows_triton(
    counts: Tensor, table: SamplingTable, slots: Tensor, tokens: Tensor | None = None,
    parents: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`seen_rows` in one launch, and one more for trees. Rows without a penalty are not written."""
    rows, v, numbers = len(slots), counts.shape[1], table.numbers
    assert counts.dtype == slots.dtype == torch.int32, (counts.dtype, slots.dtype)
    assert counts.is_contiguous() and slots.is_contiguous(), (counts.stride(), slots.stride())
    assert numbers.is_contiguous() and numbers.shape[1] == len(Settings) and v == table.vocabulary, v
    seen = torch.empty(rows, v, dtype=torch.int32, device=counts.device)
    tile = min(_TILE, triton.next_power_of_2(v))
    _texts_kernel[(triton.cdiv(v, tile), rows)](
        counts=counts, numbers=numbers, slots=slots, seen=seen, V=v, TILE=tile, num_warps=4
    )
    if tokens is not None and parents is not None:
        assert tokens.dtype == torch.int64 and parents.dtype == torch.int32, (tokens.dtype, parents.dtype)
        assert tokens.is_contiguous() and parents.is_contiguous(), (tokens.stride(), parents.stride())
        _paths_kernel[(rows,)](
            seen=seen, numbers=numbers, slots=slots, tokens=tokens, parents=parents, V=v, num_warps=1
        )
    return seen
