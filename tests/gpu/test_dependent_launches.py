"""Dependent launches (pdl.py) change no bits: whole passes with each kind of kernel as a dependent launch
against passes of ordinary launches, and chains of linears that start while the one in front still runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import SHAPES, seeded_model
from replayed import Replayed

from orthrus_kernels import Rows, Weight, backend_ops, tables
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.pdl import pdl_supported
from orthrus_kernels.tables import LinearTile
from orthrus_kernels.workspace import Workspace

DEVICE, BF16 = "cuda", torch.bfloat16
CONTEXT, PASSES, LAYERS = 1024, 50, 8
KINDS = (
    ("rowwise",),
    ("rowwise", "signals"),
    ("rowwise", "attention", "signals"),
    ("rowwise", "attention", "linear"),
)
WIDTH, LENGTH, REPLAYS = 4096, 48, 10  # of a chain of linears


@pytest.fixture(scope="module", autouse=True)
def dependent_launches():
    if not pdl_supported(torch.device(DEVICE)):
        pytest.skip("needs a GPU with dependent launches (sm_90)")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not in this file: a fill of fresh memory between two kernels would keep the second from starting
    early."""


def passes(model, cache, tokens: list[list[int]], kinds: tuple[str, ...]) -> list[list[torch.Tensor]]:
    """(logits, keys, values) of a pass over each line of tokens. The first pass is launched kernel by kernel,
    the others are replays of one CUDA graph, queued one behind the other."""
    model.ops, found = backend_ops("triton", kinds), []
    replayed = Replayed(model, cache)
    for line in tokens:
        out = replayed.forward(Rows.chain(line, CONTEXT))
        found.append([t.clone() for t in (out.logits, out.keys, out.values)])
    return found


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_whole_passes(name, rows):
    model = seeded_model(name, DEVICE, LAYERS)
    cache = model.new_cache(2 * CONTEXT)
    cache.keys.normal_()
    cache.values.normal_()
    cache.lengths[0] = CONTEXT
    tokens = torch.randint(0, model.config.vocab_size - 1, (PASSES, rows)).tolist()
    plain = passes(model, cache, tokens, ())
    assert not any(equal(a, b) for a, b in zip(plain, plain[1:], strict=False)), "each pass has its own bits"
    for kinds in KINDS:
        found = passes(model, cache, tokens, kinds)
        assert [i for i in range(PASSES) if not equal(found[i], plain[i])] == [], kinds


def tiles() -> list[LinearTile]:
    """The committed tiles of a square weight, wide ones that leave room for the next launch, and one that
    asks L2 for many blocks."""
    committed = tables.linear_entry(WIDTH, WIDTH, BF16, "sm_90").tiles
    more = [LinearTile(None, 192, 64, True, 4, 6, True), LinearTile(None, 128, 64, True, 4, 4, True)]
    return [*(replace(tile, rows=None) for tile in committed), *more, replace(more[1], prefetch=8)]


def chain(x: torch.Tensor, weights: list[Weight], entry, space: Workspace, pdl: bool) -> torch.Tensor:
    """LENGTH linears of both views, each on the output of the one in front, a norm behind every fifth.
    Ordinary launches run one at a time."""
    ops, gain = backend_ops("triton"), torch.ones(WIDTH, device=DEVICE, dtype=BF16)
    for i in range(LENGTH):
        both = weights[i % len(weights)], weights[(i + 1) % len(weights)]
        x = linear_triton(x, *both, len(x) // 3, entry=entry, space=space, pdl=pdl)
        x = ops.rms_norm(x, gain, 1e-6) if i % 5 == 4 else x
        if not pdl:
            torch.cuda.synchronize()
    return x


@pytest.mark.parametrize("rows", [1, 33, 192])
@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_chains_of_linears(tile, rows):
    """Partials and arrival counters are shared by all launches of a chain."""
    torch.manual_seed(0)
    weights = [Weight((torch.randn(WIDTH, WIDTH, device=DEVICE) * WIDTH**-0.5).to(BF16)) for _ in range(8)]
    x, space = torch.randn(rows, WIDTH, device=DEVICE).to(BF16), Workspace.new(torch.device(DEVICE))
    own = tables.linear_entry(WIDTH, WIDTH, BF16, "sm_90")
    entry = replace(own, segments=max(own.segments, 2), tiles=(tile,), apart=64)
    want = chain(x, weights, entry, space, pdl=False)
    chain(x, weights, entry, space, pdl=True)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, weights, entry, space, pdl=True)
    for _ in range(REPLAYS):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
