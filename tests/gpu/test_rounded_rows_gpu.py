"""W8A8 on a GPU: every tile of its table gives a row the same bits, beside any number of rows, at 8B's sizes;
products are those of the twin as far as a tensor core's sums go; and drafted text is plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from codes import ROUNDED, random_weight
from interpreter import DEVICE

from orthrus_kernels import tables
from orthrus_kernels.coded_rows import quantise_rows
from orthrus_kernels.compile_ahead import compile_all, missing, recorded
from orthrus_kernels.linear import linear, linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu_triton, swiglu_entry
from orthrus_kernels.quantise_rows import quantise_rows_triton
from orthrus_kernels.swiglu import swiglu_triton
from qwen3_model import Qwen3
from qwen3_model.checkpoint import EMBEDDED
from qwen3_model.cli import main
from qwen3_model.prompts import read_prompts

BF16 = torch.bfloat16
SIZES = {"qkv": (6144, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
COUNTS = 1, 16, 17, 64, 128, 192, 300
PROMPTS, TOKENS, LEAST = 8, 48, 0.93
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="for sm_90"
)


def rows_of(k: int) -> torch.Tensor:
    """Heavy-tailed, with scales of all sizes."""
    g = torch.Generator(DEVICE).manual_seed(k)
    x = torch.randn(COUNTS[-1], k, generator=g, device=DEVICE)
    return (x * torch.exp2(torch.randint(-6, 7, x.shape, generator=g, device=DEVICE).float())).to(BF16)


def results(calls: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    """Of launches whose kernels are compiled in processes first, side by side."""
    with recorded() as launches:
        for call in calls:
            call()
    compile_all(missing(launches), lambda: None)
    return [call() for call in calls]


@needs_hopper
@pytest.mark.parametrize("size", ["qkv", "down"])
def test_every_tile_gives_a_row_the_same_bits(size):
    """In the table's order, split and not, at the first rows and at the last, of either view."""
    n, k = SIZES[size]
    w, w2, x = random_weight(ROUNDED, n, k, DEVICE), random_weight(ROUNDED, n, k, DEVICE, 1), rows_of(k)
    coded, ours = quantise_rows(x), quantise_rows_triton(x, pdl=True)
    assert torch.equal(ours.codes.view(torch.uint8), coded.codes.view(torch.uint8))
    assert torch.equal(ours.scale, coded.scale)
    of, how = tables.linear_entry(n, k, BF16, "sm_90", w.scheme), {"out_dtype": torch.float32, "pdl": True}
    kinds = [replace(tile, rows=None, split=split) for tile in of.tiles for split in (True, False)]
    kinds = [tile for tile in kinds if tile.split or tile.block_t * tile.block_n <= 64 * 32 * tile.warps]
    forced = [partial(linear_triton, x, w, entry=replace(of, tiles=(tile,)), **how) for tile in kinds]
    whole, *others = results([partial(linear_triton, x, w, **how), *forced])
    for tile, got in zip(kinds, others, strict=True):
        assert torch.equal(got, whole), tile
    for count in COUNTS:
        first, last = (linear_triton(rows, w, **how) for rows in (x[:count], x[-count:]))
        assert torch.equal(first, whole[:count]) and torch.equal(last, whole[-count:]), count
        both = linear_triton(x[:count], w2, w, count // 2, **how)
        assert torch.equal(both[count // 2 :], whole[count // 2 : count]), count
    wanted = linear(x, w, None, None, torch.float32)
    sums = coded.codes.float().abs() * coded.scale.t().repeat_interleave(128, 1)
    sums = sums @ (w.values().abs() * w.scale.t().repeat_interleave(128, 1)).t()
    off = (whole - wanted).abs() / sums  # of the sum of magnitudes
    worst, mean = off.max().item(), off.mean().item()
    print(f"\n{size}: {worst:.2e}, in the mean {mean:.2e}, of the sum of magnitudes from the twin")
    # Hopper's sum of 32 products of e4m3 and what was there before keeps 13 bits behind the largest of them.
    assert worst < 33 * 2.0**-13 and mean < 2.0**-13


@needs_hopper
def test_gate_and_up_have_the_bits_of_the_two_kernels():
    n, k = SIZES["gate_up"]
    w, x = random_weight(ROUNDED, n, k, DEVICE), rows_of(k) / 4096
    of = swiglu_entry(n, k, BF16, "sm_90", w.scheme)
    entries = [replace(of, tiles=(replace(tile, rows=None),)) for tile in of.tiles]
    wide, *others = results([
        partial(linear_triton, x, w, pdl=True),
        *(partial(linear_swiglu_triton, x, w, entry=entry, pdl=True) for entry in entries),
    ])  # fmt: skip
    whole = swiglu_triton(wide)
    for entry, got in zip(entries, others, strict=True):
        assert torch.equal(got, whole), entry.tiles
    for count in COUNTS:
        assert torch.equal(linear_swiglu_triton(x[:count], w, pdl=True), whole[:count]), count


def tokens_a_cycle(model: Qwen3, prompts: list[list[int]]) -> float:
    found = [model.generate(p, "two-pass", TOKENS, tree_nodes=31).whole().stats for p in prompts]
    return sum(s.cycle_tokens for s in found) / sum(s.cycles for s in found)


@needs_hopper
def test_drafted_text_is_plain_text(tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", str(EMBEDDED), str(out), "--format", "fp8", "--json"]) == 0
    model, wide = (
        Qwen3.from_pretrained(out, "cuda", "bfloat16", progress=False, activations=how)
        for how in ("fp8", None)
    )
    assert model.text is not None and any(weight.rounds for weight in model.codes())
    model.engine.warm(False)
    model.engine_of(PROMPTS).warm(False)
    texts = read_prompts(EMBEDDED / "held_out.jsonl", PROMPTS, None, "test")
    prompts = [model.text.encode(text) for text in texts]
    for temperature in (0.0, 0.8):
        how = {"max_new_tokens": TOKENS, "temperature": temperature, "seed": 5}
        plain = [model.generate(p, "autoregressive", **how).whole() for p in prompts]
        said = [(one.token_ids, one.logprobs) for one in plain]
        for draft in ({"strategy": "two-pass", "tree_nodes": 31}, {"strategy": "one-pass"}):
            alone = [model.generate(p, **draft, **how).whole() for p in prompts]
            assert [(one.token_ids, one.logprobs) for one in alone] == said, draft
            together = model.generate_many(prompts, slots=PROMPTS, progress=False, **draft, **how)
            assert [(one.token_ids, one.logprobs) for one in (r.whole() for r in together)] == said, draft
    other = [wide.generate(p, "autoregressive", **how).whole().logprobs for p in prompts]
    assert other != [logprobs for _, logprobs in said], "activations were rounded"
    kept = tokens_a_cycle(model, prompts) / tokens_a_cycle(wide, prompts)
    print(f"\n{kept:.3f} of the tokens a cycle with rows of 16 bits", file=sys.stderr)
    assert kept > LEAST
