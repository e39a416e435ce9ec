"""The two attention kernels beside each other, on random numbers: have they the same bits here?

The promise that which of them runs changes no bit (attention_either.py) stands on this comparison: on a
user's machine before Gluon's first runs, in tests/gpu and in `python -m bench.attention_gluon`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_gluon import FOLDED, HEAD, attention_gluon
from .attention_triton import attention_triton, tile_rows
from .lay_triton import lay_triton
from .pages import PAGE, pages_for
from .pass_tables import PassTables
from .pdl import pdl_kinds
from .plan import PassPlan
from .visibility import Rows


def differences(heads: int, groups: int, device: torch.device) -> str:
    """What differs between the kernels for these heads, in a tree with blocks beside a chain and in a prompt;
    "" for nothing."""
    parents = [-1, *(max(0, i - 1 - i % 4) for i in range(1, 33))]
    tree = Rows.tree_with_blocks([1] * 33, parents, 1500, range(0, 32, 2), 6, 96)
    pdl = "attention" in pdl_kinds(device)
    differ = [
        form
        for form, rows in (
            ("partial", Rows.batch([tree, Rows.chain([1] * 70, 601, 1)])),
            ("whole", Rows.chain([1] * 200, 683)),
        )
        if not same(*both(Inputs.random(rows, heads, groups, device), rows, form == "whole", pdl))
    ]
    return f"other bits than Triton's kernels, form {' and '.join(differ)}" if differ else ""


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two outputs in bf16 have the same bits, none of them NaN."""
    return torch.equal(ours.view(torch.int16), theirs.view(torch.int16)) and not bool(ours.isnan().any())


@dataclass(frozen=True)
class Inputs:
    """What attention takes of a pass, but its tables."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    pages: Tensor

    @staticmethod
    def random(rows: Rows, heads: int, groups: int, device: torch.device, seed: int = 0) -> Inputs:
        """Normal numbers, queries scaled so that some rows see few keys; q, k and v views of one tensor.
        Pages lie in any order. Other pages, and places behind a context, hold NaN."""
        seeded = torch.Generator(device).manual_seed(seed)
        qkv = torch.randn(len(rows), heads + 2 * groups, HEAD, generator=seeded, device=device)
        qkv[:, :heads] *= torch.exp2(torch.randint(-3, 4, (len(rows), 1, 1), generator=seeded, device=device))
        q, k, v = qkv.bfloat16().split([heads, groups, groups], 1)
        contexts = [rows.contexts.get(s, 0) for s in range(max(rows.contexts) + 1)]
        used = [pages_for(context) for context in contexts]
        lie = torch.randperm(sum(used) + 3, generator=seeded, device=device).int()
        pages = torch.full((len(used), max(used) + 1), int(lie[-1]), dtype=torch.int32, device=device)
        caches = [
            torch.full((len(lie), groups, PAGE, HEAD), float("nan"), dtype=q.dtype, device=device)
            for _ in "kv"
        ]
        for s, (count, context) in enumerate(zip(used, contexts, strict=True)):
            pages[s, :count] = lie[sum(used[:s]) :][:count]
            for cache in caches:
                whole = torch.randn(count, groups, PAGE, HEAD, generator=seeded, device=device)
                whole[-1:, :, context - PAGE * count + PAGE :] = float("nan")
                cache[pages[s, :count].long()] = whole.bfloat16()
        return Inputs(q, k, v, caches[0], caches[1], pages)

    def tables(self, rows: Rows, gluon: bool, whole: bool) -> PassTables:
        """Tables of the pass for a kernel."""
        plan, (heads, groups) = PassPlan.of(rows, self.q.device), (self.q.shape[1], self.k.shape[1])
        height = FOLDED * groups // heads if gluon else tile_rows(heads, groups, HEAD, self.q.dtype, whole)
        tables = PassTables.new(plan.shape, max(rows.positions) + 1, height, whole, self.q.device)
        lay_triton(plan, tables)
        return tables

    def through(self, kernel: Callable[..., Tensor], tables: PassTables, pdl: bool) -> Tensor:
        """The output of a kernel, in memory that held NaN."""
        out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        caches = self.k_cache, self.v_cache, self.pages
        return kernel(self.q, self.k, self.v, *caches, tables, HEAD**-0.5, out=out, pdl=pdl)


def both(inputs: Inputs, rows: Rows, whole: bool, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """What Gluon's kernel and Triton's make of a pass without padding, in the whole or the partial form."""
    ours, theirs = (inputs.tables(rows, gluon, whole) for gluon in (True, False))
    return inputs.through(attention_gluon, ours, pdl), inputs.through(attention_triton, theirs, pdl)
