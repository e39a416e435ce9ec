"""A row of a linear, of SwiGLU's linear, of the head and of a choice has the bits of that row alone, at any
index of a pass of any number of rows: at the sizes of Qwen3-1.7B and 8B, with the launch tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from codes import Coding, exact, random_weight

from bench.models import MODELS
from orthrus_kernels import Sampling, Weight, alike, tables
from orthrus_kernels.choice_triton import choose_triton
from orthrus_kernels.head import head_triton
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.logit_summary import summary_of_logits
from orthrus_kernels.quantised import Format
from orthrus_kernels.swiglu import swiglu_triton

DEVICE, BF16 = "cuda", torch.bfloat16
MOST_ROWS = 256
SLICES = ((0, 1), (3, 5), (7, 200), (17, 81), (128, 161), (250, 256), (0, 256))  # rows of a pass of MOST_ROWS
SIZES = ("1.7B", "8B")
LINEARS = [(size, name) for size in SIZES for name in ("qkv", "o", "gate_up", "down")]
SCHEMES = Coding(Format.E4M3, 128, False, BF16, 128), Coding(Format.INT4, 128, True, torch.float16)
SETTINGS = ({}, {"temperature": 0.8, "top_k": 20, "top_p": 0.95}, {"temperature": 0.8, "min_p": 0.01})


def normal(*shape: int) -> torch.Tensor:
    """Normal numbers: bf16 [*shape]."""
    return torch.randn(*shape, device=DEVICE).to(BF16)


def heavy(*shape: int) -> torch.Tensor:
    """Normal numbers scaled by 2^-15 .. 2^15, whose sums show their order: bf16 [*shape]."""
    scale = torch.exp2(torch.randint(-15, 16, shape, device=DEVICE).float())
    return (torch.randn(*shape, device=DEVICE) * scale).to(BF16)


def weight_of(scheme, n: int, k: int, seed: int):
    """(weight, its numbers in fp64); scheme None: a dense one."""
    if scheme is None:
        weight = Weight(heavy(n, k))
        return weight, weight.dense().double()
    weight = random_weight(scheme, n, k, DEVICE, seed)
    return weight, exact(weight)


def each_alone(op, x: torch.Tensor) -> torch.Tensor:
    """What `op` makes of the rows of x, one row a launch."""
    return torch.cat([op(x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=["bf16", "fp8", "int4"])
@pytest.mark.parametrize(("size", "name"), LINEARS)
def test_linears(size, name, scheme):
    torch.manual_seed(0)
    n, k = MODELS[size].weights()[name]
    x, (w, numbers), (w_diff, _) = heavy(MOST_ROWS, k), weight_of(scheme, n, k, 1), weight_of(scheme, n, k, 2)
    ar, diffusion = (each_alone(lambda row, of=of: linear_triton(row, of), x) for of in (w, w_diff))
    wanted = x.double() @ numbers.T
    assert (ar.double() - wanted).abs().max() < 1e-2 * wanted.abs().max()
    for rows in range(1, MOST_ROWS + 1):
        n_ar = rows // 3
        assert torch.equal(linear_triton(x[:rows], w), ar[:rows]), rows
        mixed = linear_triton(x[:rows], w, w_diff, n_ar)
        assert torch.equal(mixed, torch.cat([ar[:n_ar], diffusion[n_ar:rows]])), (rows, n_ar)
    entry = tables.linear_entry(n, k, BF16, tables.device_key(torch.device(DEVICE)), w.scheme)
    for tile in entry.tiles:
        one_tile = replace(entry, tiles=(replace(tile, rows=None),))
        for first, last in SLICES:
            got = linear_triton(x[first:last], w, entry=one_tile)
            assert torch.equal(got, ar[first:last]), (tile, first, last)


@pytest.mark.parametrize("numbers", [normal, heavy])
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_in_the_linear(size, numbers):
    """By the tables, and the two kernels one after another on each row alone."""
    torch.manual_seed(0)
    n, k = MODELS[size].weights()["gate_up"]
    x, w = numbers(MOST_ROWS, k), Weight(numbers(n, k) * k**-0.5)
    alone = each_alone(lambda row: swiglu_triton(linear_triton(row, w)), x)
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(linear_swiglu_triton(x[:rows], w), alone[:rows]), rows
    for first, last in SLICES:
        assert torch.equal(linear_swiglu_triton(x[first:last], w), alone[first:last]), (first, last)


@pytest.mark.parametrize("scheme", SCHEMES, ids=["fp8", "int4"])
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_in_a_quantised_linear(size, scheme):
    torch.manual_seed(0)
    n, k = MODELS[size].weights()["gate_up"]
    x, w = normal(MOST_ROWS, k) / 4096, random_weight(scheme, n, k, DEVICE)
    alone = each_alone(lambda row: swiglu_triton(linear_triton(row, w)), x)
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(linear_swiglu_triton(x[:rows], w), alone[:rows]), rows


@pytest.mark.parametrize("likeliest", [1, 16])
@pytest.mark.parametrize("size", SIZES)
def test_the_head(size, likeliest):
    """Ids, logits and log-sum-exps are those of written logits; one token stands in two tiles, a tie."""
    torch.manual_seed(0)
    v, e = MODELS[size].weights()["head"]
    x, w = normal(MOST_ROWS, e), Weight(normal(v, e) * 0.05)
    w.data[100_000] = w.data[17]
    alone = summary_of_logits(linear_triton(x, w, out_dtype=torch.float32), likeliest)
    slices = [(0, rows) for rows in range(1, MOST_ROWS + 1)] + [*SLICES]
    for first, last in slices:
        got = head_triton(x[first:last], w, likeliest)
        for ours, theirs in zip(got, alone, strict=True):
            assert torch.equal(ours, theirs[first:last]), (first, last)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_choice(settings):
    """Of rows from flat to sharp, some of them with ties."""
    torch.manual_seed(0)
    logits = torch.randn(MOST_ROWS, MODELS["8B"].V, device=DEVICE)
    logits *= torch.logspace(-0.5, 0.8, MOST_ROWS, device=DEVICE)[:, None]
    logits[::5] = logits[::5].round()
    positions = torch.arange(7, 7 + MOST_ROWS, device=DEVICE)
    table, slots = alike(Sampling(seed=2**40 + 3, **settings), logits)
    alone = torch.cat([choose_triton(logits[i : i + 1], positions[i : i + 1], table, slots[:1])
                       for i in range(MOST_ROWS)])  # fmt: skip
    for first, last in [(0, rows) for rows in range(1, MOST_ROWS + 1)] + [*SLICES]:
        got = choose_triton(logits[first:last], positions[first:last], table, slots[first:last])
        assert torch.equal(got, alone[first:last]), (first, last)
