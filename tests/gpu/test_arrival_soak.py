"""Thousands of launches of the kernels whose last program to arrive adds the others' partials.

The counters of arrivals lie in global memory, where no tool sees a race. Partials are poisoned before each
launch, so that a sum that is taken too early is NaN."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paged import paged
from plans import laid

from orthrus_kernels import Rows, Weight, backend_ops
from orthrus_kernels.attention_triton import attention_triton, tile_rows
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.workspace import Workspace

DEVICE, BF16 = "cuda", torch.bfloat16
LAUNCHES = 2000
CONTEXT = 4096
H, G, D = 32, 8, 128  # heads of Qwen3-8B
PARTIALS = 1 << 24  # fp32 numbers of a workspace, more than any launch here takes


def soak(launch, partials: torch.Tensor, want: torch.Tensor) -> int:
    """How many of LAUNCHES launches into poisoned partials give other bits than `want`."""
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(LAUNCHES):
        partials.fill_(float("nan"))
        different += (launch() != want).any()
    return int(different)


@pytest.mark.parametrize(("rows", "form"), [(1, "fused"), (4, "fused"), (1, "partial"), (64, "partial")])
def test_attention(rows, form):
    """Against the form that has no partials."""
    torch.manual_seed(0)
    k_cache, v_cache = (torch.randn(1, G, CONTEXT, D, device=DEVICE).to(BF16) for _ in "kv")
    q, k, v = (torch.randn(rows, heads, D, device=DEVICE).to(BF16) for heads in (H, G, G))
    chain, ops = Rows.chain([1] * rows, CONTEXT), backend_ops("triton")
    tables, whole = (
        laid(chain, q, k, ops, tile_rows=tile_rows(H, G, D, BF16, whole=is_whole), whole=is_whole)
        for is_whole in (False, True)
    )
    partials = torch.empty(PARTIALS, device=DEVICE)
    inputs, scale = (q, k, v, *paged(k_cache, v_cache)), D**-0.5
    want = attention_triton(*inputs, whole, scale)
    call = partial(attention_triton, *inputs, tables, scale, workspace=partials, form=form)
    assert soak(call, partials, want) == 0


@pytest.mark.parametrize("segments", [2, 8])
@pytest.mark.parametrize("rows", [1, 40])
def test_split_linears(rows, segments):
    """Against the launch whose programs run their segments one after another; counters end as zeros."""
    torch.manual_seed(0)
    x, numbers = (torch.randn(n, 4096, device=DEVICE).to(BF16) for n in (rows, 4096))
    w = Weight(numbers)
    space = Workspace.new(torch.device(DEVICE), PARTIALS)
    split, in_turn = (
        LinearEntry(64, segments, (LinearTile(None, 16, 64, form, 4, 4),)) for form in (True, False)
    )
    want = linear_triton(x, w, entry=in_turn)
    assert soak(lambda: linear_triton(x, w, entry=split, space=space), space.partials, want) == 0
    assert not space.counters.any()
