"""Attention in Gluon beside Triton's, and Triton's shared form beside its partial one, on random numbers:
have they the same bits here?

The promise that which of them runs changes no bit (attention_either.py) stands on this comparison: on a
user's machine before one first runs, in tests/gpu and in `python -m bench.attention_gluon`. A form is
"partial", "whole" or "shared", one of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def differences(heads: int, groups: int, device: torch.device, forms: Sequence[str]) -> str:
    """What differs between Gluon in these forms and Triton for these heads, in `mixed_pass` or in a prompt;
    "" for nothing."""
    pdl = "attention" in pdl_kinds(device)
    differ = []
    for form in forms:
        rows = Rows.chain([1] * 200, 683) if form == "whole" else mixed_pass()
        if not same(*both(Inputs.random(rows, heads, groups, device), rows, form, pdl)):
            differ.append(form)
    return f"other bits than Triton's kernels, form {' and '.join(differ)}" if differ else ""


def shared_differs(heads: int, groups: int, d: int, dtype: torch.dtype, device: torch.device) -> str:
    """Whether the shared form of Triton's kernels has other bits than the partial form for heads of size D,
    in `mixed_pass`: what is said of it, "" where it has not."""
    rows, pdl = mixed_pass(), "attention" in pdl_kinds(device)
    inputs = Inputs.random(rows, heads, groups, device, d=d, dtype=dtype)
    outputs = [
        inputs.through(attention_triton, inputs.tables(rows, False, form), pdl)
        for form in ("shared", "partial")
    ]
    return "" if same(*outputs) else "other bits than in the partial form"


def mixed_pass() -> Rows:
    """A tree with blocks, which crosses a cut of key segments, beside a chain and a row."""
    parents = [-1, *(max(0, i - 1 - i % 4) for i in range(1, 33))]
    tree = Rows.tree_with_blocks([1] * 33, parents, 1527, range(0, 32, 2), 6, 96)
    return Rows.batch([tree, Rows.chain([1] * 70, 601, 1), Rows.chain([1], 130, 2)])


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two outputs have the same bits, none of them NaN."""
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) and not bool(ours.isnan().any())


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
    def random(
        rows: Rows, heads: int, groups: int, device: torch.device, seed: int = 0, d: int = HEAD,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Inputs:  # fmt: skip
        """Normal numbers, queries scaled so that some rows see few keys; q, k and v views of one tensor.
        Pages lie in any order. Other pages, and places behind a context, hold NaN."""
        seeded = torch.Generator(device).manual_seed(seed)
        qkv = torch.randn(len(rows), heads + 2 * groups, d, generator=seeded, device=device)
        qkv[:, :heads] *= torch.exp2(torch.randint(-3, 4, (len(rows), 1, 1), generator=seeded, device=device))
        q, k, v = qkv.to(dtype).split([heads, groups, groups], 1)
        contexts = [rows.contexts.get(s, 0) for s in range(max(rows.contexts) + 1)]
        used = [pages_for(context) for context in contexts]
        lie = torch.randperm(sum(used) + 3, generator=seeded, device=device).int()
        pages = torch.full((len(used), max(used) + 1), int(lie[-1]), dtype=torch.int32, device=device)
        caches = [
            torch.full((len(lie), groups, PAGE, d), float("nan"), dtype=dtype, device=device) for _ in "kv"
        ]
        for s, (count, context) in enumerate(zip(used, contexts, strict=True)):
            pages[s, :count] = lie[sum(used[:s]) :][:count]
            for cache in caches:
                whole = torch.randn(count, groups, PAGE, d, generator=seeded, device=device)
                whole[-1:, :, context - PAGE * count + PAGE :] = float("nan")
                cache[pages[s, :count].long()] = whole.to(dtype)
        return Inputs(q, k, v, caches[0], caches[1], pages)

    def tables(self, rows: Rows, gluon: bool, form: str) -> PassTables:
        """Tables of the pass for a kernel."""
        plan, (_, heads, d), groups = PassPlan.of(rows, self.q.device), self.q.shape, self.k.shape[1]
        whole, shared = form == "whole", form == "shared"
        short = tile_rows(heads, groups, d, self.q.dtype, whole)
        height, capacity = FOLDED * groups // heads if gluon else short, max(rows.positions) + 1
        path_rows = short if shared else None
        tables = PassTables.new(
            plan.shape, capacity, height, whole, self.q.device, shared=shared, path_rows=path_rows
        )
        lay_triton(plan, tables)
        return tables

    def through(self, kernel: Callable[..., Tensor], tables: PassTables, pdl: bool) -> Tensor:
        """The output of a kernel, in memory that held NaN."""
        out = torch.full_like(self.q, float("nan"), memory_format=torch.contiguous_format)
        caches = self.k_cache, self.v_cache, self.pages
        return kernel(self.q, self.k, self.v, *caches, tables, self.q.shape[2] ** -0.5, out=out, pdl=pdl)


def both(inputs: Inputs, rows: Rows, form: str, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """What Gluon's kernel in a form and Triton's make of a pass without padding. Beside the shared form
    Triton's is the partial one."""
    ours = inputs.tables(rows, True, form)
    theirs = inputs.tables(rows, False, "whole" if form == "whole" else "partial")
    return inputs.through(attention_gluon, ours, pdl), inputs.through(attention_triton, theirs, pdl)
