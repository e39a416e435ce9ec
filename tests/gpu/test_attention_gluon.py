"""Attention in Gluon has the bits of Triton's kernels, in the shared form too: trees, mixed passes, many
texts, prompts, at the heads of Qwen3. Pages lie in any order; foreign pages, and places behind a context,
hold NaN."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from paged import paged
from strategies import KINDS, hard

from orthrus_kernels import PassPlan, Rows, pdl_kinds
from orthrus_kernels.attention_compared import Inputs, both, differences, same, shared_differs
from orthrus_kernels.attention_either import attention_either, is_for_gluon, new_tables_either
from orthrus_kernels.attention_gluon import attention_gluon
from orthrus_kernels.attention_triton import attention_triton
from orthrus_kernels.lay_triton import lay_triton
from orthrus_kernels.tables import device_key

DEVICE = torch.device("cuda")
HEADS = {"8B": (32, 8), "1.7B": (16, 8), "one to a key head": (8, 8), "eight to a key head": (32, 4)}
CONTEXTS = (0, 1, 63, 64, 250, 1000, 1024, 1150, 4100, 16384, 32700)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or device_key(DEVICE) != "sm_90", reason="for Hopper"
)


def tree(nodes: int, context: int, blocks: int = 0, size: int = 6, sequence: int = 0) -> Rows:
    """A draft tree of many branches with blocks at its first nodes."""
    parents = [-1, *(max(0, i - 1 - i % 4) for i in range(1, nodes))]
    return Rows.tree_with_blocks([1] * nodes, parents, context, range(blocks), size, 96, sequence)


def assert_same_bits(
    rows: Rows, heads: int, groups: int, forms: tuple[str, ...] = ("partial", "shared"), seed: int = 0
) -> None:
    """As an ordinary launch and as a dependent one; the shared form of Triton's kernels too."""
    inputs = Inputs.random(rows, heads, groups, DEVICE, seed)
    for form, pdl in product(forms, (False, True)):
        ours, theirs = both(inputs, rows, form, pdl)
        assert same(ours, theirs), (len(rows), rows.contexts, form, pdl, int((ours != theirs).sum()))
        if form == "shared":
            ours = inputs.through(attention_triton, inputs.tables(rows, False, form), pdl)
            assert same(ours, theirs), ("Triton", len(rows), rows.contexts, pdl)


@pytest.mark.parametrize("size", HEADS)
def test_what_is_compared_before_it_runs(size):
    assert differences(*HEADS[size], DEVICE, ("partial", "whole", "shared")) == ""
    for d, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32), (128, torch.float32)):
        assert shared_differs(*HEADS[size], d, dtype, DEVICE) == "", (d, dtype)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("size", HEADS)
def test_trees_mixed_passes_and_chains(size, context):
    for n in (1, 2, 17, 33, 64, 128, 192, 256):
        assert_same_bits(tree(n, context), *HEADS[size], seed=n)
        assert_same_bits(Rows.chain([1] * n, context), *HEADS[size], seed=n)
    assert_same_bits(tree(33, context, 24), *HEADS[size])
    assert_same_bits(tree(9, context, 3, 70), *HEADS[size])
    assert_same_bits(Rows.block(1, 32, context, 96), *HEADS[size])


@pytest.mark.parametrize("size", ["8B", "1.7B"])
@pytest.mark.parametrize("rows", [129, 300, 512, 1000, 2048, 4096])
def test_prompts(rows, size):
    """In both forms where partials are not too many."""
    for context in (0, 1, 64, 777, 28672):
        chain = Rows.chain([1] * rows, context)
        forms = ("whole", "partial", "shared") if rows <= 512 else ("whole",)
        assert_same_bits(chain, *HEADS[size], forms, seed=rows)


@pytest.mark.parametrize("texts", [1, 8, 32, 64])
def test_many_texts(texts):
    """Trees, chains and blocks side by side, contexts of all lengths."""
    passes: list[Rows] = []
    for s in range(texts):
        context = (s * 997) % 5000
        kinds = (
            tree(7, context, 2, 6, s),
            Rows.chain([1] * (1 + s % 40), context, s),
            Rows.block(1, 16, context, 96, s),
        )
        passes.append(kinds[s % 3])
    assert_same_bits(Rows.batch(passes), 32, 8)
    assert_same_bits(Rows.batch([*passes, Rows.chain([1] * 256, 1234, texts)]), 16, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [0, 130, 1100])
def test_numbers_that_show_the_order_of_sums(kind, context):
    for rows in (tree(65, context, 8), Rows.chain([1] * 300, context)):
        q = hard(kind, len(rows), 32, 128, seed=1).bfloat16().to(DEVICE)
        k, v = (hard(kind, len(rows), 8, 128, seed=s).bfloat16().to(DEVICE) for s in (2, 3))
        caches = (hard(kind, 1, 8, max(context, 1), 128, seed=s).bfloat16() for s in (4, 5))
        inputs = Inputs(q, k, v, *(t.to(DEVICE) for t in paged(*caches, rows.contexts)))
        for form in ("partial", "shared", "whole")[: 2 + (rows.n_ar == len(rows))]:
            assert same(*both(inputs, rows, form)), (kind, context, form)


def test_a_thousand_launches_one_behind_another():
    """As dependent launches, two kinds in turn into the same memory, poisoned between."""
    passes = (tree(33, 3000, 24), Rows.chain([1] * 190, 3000))
    inputs = [Inputs.random(rows, 32, 8, DEVICE) for rows in passes]
    forms = ("shared", "partial")
    tables = [of.tables(rows, True, form) for of, rows, form in zip(inputs, passes, forms, strict=True)]
    want = [of.through(attention_gluon, t, False) for of, t in zip(inputs, tables, strict=True)]
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(1000):
        different += (inputs[i % 2].through(attention_gluon, tables[i % 2], True) != want[i % 2]).any()
    assert int(different) == 0


def test_the_model_is_given_it():
    """A wide tree's tables are for Gluon, those of a token are not; the same bits in a captured graph."""
    rows, pdl = tree(192, 2000), "attention" in pdl_kinds(DEVICE)
    inputs, plan = Inputs.random(rows, 32, 8, DEVICE), PassPlan.of(rows, DEVICE)
    tables = new_tables_either(plan.shape, 8192, 32, 8, 128, torch.bfloat16, DEVICE)
    assert is_for_gluon(tables, inputs.q, 8) and tables.shared
    token = PassPlan.of(Rows.chain([1], 2000), DEVICE)
    one = new_tables_either(token.shape, 8192, 32, 8, 128, torch.bfloat16, DEVICE)
    assert not is_for_gluon(one, inputs.q, 8)
    lay_triton(plan, tables)
    want = inputs.through(attention_triton, inputs.tables(rows, False, "partial"), pdl)
    inputs.through(attention_either, tables, pdl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = inputs.through(attention_either, tables, pdl)
    for _ in range(3):
        got.fill_(float("nan"))
        graph.replay()
        assert same(got, want)
