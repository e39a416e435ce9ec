"""W8A8: rows rounded to codes of 8 bits, and products of two codes. Codes are the nearest; products are right
against fp64 and the twin, and a row has the same bits in every form, tile and company."""

from dataclasses import replace

import pytest
import torch
from codes import ROUNDED, SCHEMES, exact, random_weight
from hypothesis import example, given
from hypothesis import strategies as st
from inputs import examples, given_rows
from interpreter import DEVICE
from limits import LIMITS, assert_close
from strategies import KINDS, hard

from orthrus_kernels.coded_rows import CodedRows, quantise_rows
from orthrus_kernels.linear import linear, linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu, linear_swiglu_triton
from orthrus_kernels.quantise_rows import quantise_rows_triton
from orthrus_kernels.quantised import Format, QuantisedWeight
from orthrus_kernels.swiglu import swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile

BF16, BYTE = torch.bfloat16, torch.uint8
N, K, SEGMENTS = 70, 7 * 128, 3  # ragged in every tile; the last segment is shorter
# Hopper's tensor cores keep some 13 bits of fraction of what they add: 4 times 2^-14 of a sum's largest term.
LIMIT = 4e-6 if DEVICE == "cpu" else 2.5e-4


def entry(*tiles: LinearTile) -> LinearEntry:
    """Few rows split, many one after another."""
    few, some = LinearTile(4, 16, 64, True, 4, 3), LinearTile(40, 32, 128, True, 4, 3)
    return LinearEntry(128, SEGMENTS, tiles or (few, some, LinearTile(None, 64, 64, False, 4, 3)))


def weights(device, n: int = N, k: int = K) -> tuple[QuantisedWeight, QuantisedWeight]:
    first, second = (random_weight(ROUNDED, n, k, device, seed) for seed in (1, 2))
    return first, second


def bits(coded: CodedRows) -> tuple[list, list]:
    return coded.codes.view(BYTE).tolist(), coded.scale.view(torch.int32).tolist()


def numbers_of(coded: CodedRows) -> torch.Tensor:
    """What codes and scales stand for, fp64."""
    return coded.codes.double().cpu() * coded.scale.t().double().cpu().repeat_interleave(128, 1)


def e4m3_near(x: float) -> list[int]:
    """The codes nearest to x, by a list of all: one, or two of a tie."""
    of = {c: torch.tensor([c], dtype=BYTE).view(torch.float8_e4m3fn).double().item() for c in range(127)}
    least = min(abs(x - value) for value in of.values())
    return [code for code, value in of.items() if abs(x - value) == least]


def test_every_number_of_a_scale_of_one_has_the_nearest_code(device):
    """All 16-bit numbers up to 448, which each group holds: so that its scale is 1."""
    all_bits = torch.arange(0x43E1, dtype=torch.int32).to(torch.int16)
    x = torch.full((1, -(-len(all_bits) // 127) * 128), 448.0, dtype=BF16).view(-1, 128)
    some = torch.zeros(len(x) * 127, dtype=BF16)
    some[: len(all_bits)] = all_bits.view(BF16)
    x[:, 1:] = some.view(-1, 127)
    x[:, 1::2] *= -1
    got = quantise_rows_triton(x.view(1, -1).to(device))
    assert got.scale.eq(1).all() and bits(got) == bits(quantise_rows(x.view(1, -1).to(device)))
    codes = got.codes.view(BYTE).cpu().view(-1, 128)
    for value, code in zip(x[::23].flatten().tolist(), codes[::23].flatten().tolist(), strict=True):
        near = e4m3_near(abs(value))
        assert code & 0x7F == (near[0] if len(near) == 1 else next(c for c in near if c % 2 == 0)), value
        assert bool(code >> 7) == (value < 0 or str(value) == "-0.0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_codes_and_scales_are_those_of_the_twin(kind, dtype, device):
    x = given_rows(kind, 21, K, dtype=dtype, device=device)
    coded = quantise_rows(x)
    assert bits(quantise_rows_triton(x)) == bits(coded)
    groups = x.double().cpu().unflatten(1, (-1, 128))
    step = groups.abs().amax(-1, keepdim=True) / 448 * 32  # of the largest codes: half of it, and rounding
    assert ((numbers_of(coded).view_as(groups) - groups).abs() <= step / 2 * (1 + 1e-6)).all()


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # the interpreter, of what is meant
def test_zeros_tiny_and_huge_numbers(device):
    """A group of zeros has scale 1. The smallest numbers keep a scale that is not 0, the largest are finite;
    what is no number makes every product of its row NaN, and no other row's."""
    x = torch.zeros(6, 256, dtype=BF16)
    x[1, 3], x[2, 200], x[3] = 2.0**-133, -3.3e38, 3.3e38
    x[4, 130], x[5, 5] = float("nan"), float("-inf")
    x = x.to(device)
    got, wanted = quantise_rows_triton(x), quantise_rows(x)
    assert bits(got[:4]) == bits(wanted[:4])
    assert got.scale[:, 0].tolist() == [1, 1] and got.codes[0].float().eq(0).all()
    assert torch.equal(got[1:4].codes.float().abs().amax(1), torch.full((3,), 448.0, device=device))
    assert got.scale[1, 4].isnan() and got.scale[0, 5].isinf() and got.codes[4, 130].float().isnan()
    w = random_weight(ROUNDED, N, 256, device)
    for product in (linear, linear_triton):
        y = product(x, w, None, None, torch.float32)
        assert y[4:].isnan().all() and y[:2].isfinite().all() and y[0].eq(0).all()


def test_a_group_too_small_for_a_scale_is_zeros(device):
    x = torch.full((1, 128), 1e-45, device=device)  # over 448 nothing is left in fp32
    for rounding in (quantise_rows, quantise_rows_triton):
        assert rounding(x).scale.tolist() == [[1]] and not rounding(x).codes.view(BYTE).any()


@pytest.mark.parametrize("rows", [3, 37, 70])
def test_against_fp64_and_the_twin(rows, device, monkeypatch):
    monkeypatch.setitem(LIMITS, torch.float32, (LIMIT, LIMIT))
    w, w2 = weights(device)
    x = given_rows("heavy", rows, K, dtype=BF16, device=device)
    got, rounded = linear_triton(x, w, w2, 2, torch.float32, entry=entry()), numbers_of(quantise_rows(x))
    wanted = torch.cat([rounded[:2] @ exact(w).T.cpu(), rounded[2:] @ exact(w2).T.cpu()])
    assert_close(got, wanted)
    assert_close(linear(x, w, w2, 2, torch.float32), wanted)
    assert_close(linear_triton(x, w), rounded @ exact(w).T.cpu())  # by the table


def test_scales_are_multiplied_first_and_a_fold_is_rounded_once(device):
    """One product a group is exact in any order; kernel and twin then agree in every bit, and not with the
    other order of three factors."""
    g = torch.Generator().manual_seed(0)
    x, codes = torch.zeros(8, K, dtype=BF16), torch.zeros(N, K, dtype=BYTE)
    x[:, ::128] = torch.randn(8, 7, generator=g).to(BF16)
    x[:, 1::128] = x[:, ::128] * 0.3
    codes[:, 1::128] = torch.randint(8, 100, (N, 7), generator=g, dtype=BYTE)
    w = QuantisedWeight.new(
        N, K, Format.E4M3, 128, zeros=False, scale=torch.float32, dtype=BF16, device=device, rounds=True
    )
    w.put(0, codes, torch.rand(N, 7, generator=g))
    x = x.to(device)
    got = linear_triton(x, w, None, None, torch.float32, entry=replace(entry(), segments=1))
    assert torch.equal(got, linear(x, w, None, None, torch.float32))
    coded, other = quantise_rows(x), torch.zeros(8, N, dtype=torch.float64, device=device)
    for i in range(K // 128):
        of = slice(128 * i, 128 * i + 128)
        part = (coded.codes[:, of].float() @ w.values()[:, of].t()) * coded.scale[i][:, None]
        other = (part.double() * w.scale[i].double() + other).float().double()
    assert not torch.equal(got, other.float())


@examples(4)
@given(rows=st.integers(2, 192), index=st.integers(0, 191), kind=st.sampled_from(KINDS))
def test_a_row_has_the_same_bits_anywhere(device, rows, index, kind):
    """Alone in the split form, and among rows of any form, of either view, rounded here or before."""
    index %= rows
    w, w2 = weights(device)
    x, of = given_rows(kind, rows, K, dtype=BF16, device=device), entry()
    one = x[index : index + 1]
    alone, alone2 = linear_triton(one, w, entry=of)[0], linear_triton(one, w2, entry=of)[0]
    assert torch.equal(linear_triton(x, w, entry=of)[index], alone)
    assert torch.equal(linear_triton(quantise_rows_triton(x), w, w2, index, entry=of)[index], alone2)
    assert torch.equal(linear_triton(x, w, w2, index + 1, entry=of)[index], alone)
    assert torch.equal(linear(x, w)[index], linear(one, w)[0])


@examples(4)
@given(rows=st.integers(1, 192), block_t=st.sampled_from([16, 64, 128, 256]), split=st.booleans(),
       block_n=st.sampled_from([64, 128]), warps=st.sampled_from([4, 8]), n_ar=st.integers(0, 130),
       apart=st.sampled_from([None, 20]), at_once=st.sampled_from([1, 2]))  # fmt: skip
@example(rows=97, block_t=64, split=False, block_n=64, warps=8, n_ar=47, apart=20, at_once=1)
@example(rows=33, block_t=16, split=True, block_n=64, warps=4, n_ar=20, apart=None, at_once=2)
def test_any_tile_gives_the_same_bits(device, rows, block_t, split, block_n, warps, n_ar, apart, at_once):
    w, w2 = weights(device, k=6 * 128)  # of three segments each has two groups
    x, n_ar = given_rows("heavy", rows, 6 * 128, dtype=BF16, device=device), min(n_ar, rows)
    stages = 3 if at_once == 1 else 2  # what shared memory has room for
    of = entry(LinearTile(None, block_t, block_n, split, warps, stages, at_once=at_once))
    got = linear_triton(x, w, w2, n_ar, entry=replace(of, apart=apart))
    assert torch.equal(got, linear_triton(x, w, w2, n_ar, entry=entry()))


def test_gate_and_up_have_the_bits_of_the_two_kernels(device):
    (w, _), x = weights(device, 50), hard("normal", 133, K).to(device, BF16) / 64
    wanted = swiglu_triton(linear_triton(x, w, entry=entry()))
    for height, block_n in ((16, 64), (64, 128)):
        of = entry(LinearTile(None, height, block_n, False, 4, 3))
        assert torch.equal(linear_swiglu_triton(x, w, entry=of), wanted)
    got = linear_swiglu_triton(x, w)
    assert torch.equal(got, swiglu_triton(linear_triton(x, w)))
    assert torch.equal(got[7:8], linear_swiglu_triton(x[7:8], w))
    assert_close(got, linear_swiglu(x, w).double())


def test_views_that_round_and_do_not_have_launches_of_their_own(device):
    (w, _), x = weights(device), hard("normal", 9, K).to(device, BF16)
    other = random_weight(SCHEMES[0], N, K, device)
    apart = torch.cat([linear_triton(x[:4], w), linear_triton(x[4:], other)])
    assert torch.equal(linear_triton(x, w, other, 4), apart)
    assert torch.equal(linear(x, w, other, 4), torch.cat([linear(x[:4], w), linear(x[4:], other)]))
    assert not torch.equal(linear(x, other), linear(x, replace_scheme(other)))


def replace_scheme(weight: QuantisedWeight) -> QuantisedWeight:
    """The same numbers, of a weight that rounds its rows."""
    n, k = weight.shape
    rounds = QuantisedWeight.new(
        n, k, weight.format, 128, zeros=False, scale=weight.scale_dtype, dtype=BF16,
        device=weight.words.device, factor_rows=weight.factor_rows, rounds=True,
    )  # fmt: skip
    rounds.put(0, weight.codes(), weight.scale.t())
    assert torch.equal(rounds.codes(), weight.codes()) and torch.equal(rounds.dense(), weight.dense())
    return rounds


def test_tiles_of_another_instruction_are_none(device):
    """Fewer weight rows or warps than wgmma takes: the compiler would multiply in fp16."""
    x, w = torch.ones(3, 256, dtype=BF16, device=device), random_weight(ROUNDED, 64, 256, device)
    for block_n, warps in ((32, 4), (64, 2)):
        of = LinearEntry(128, 1, (LinearTile(None, 16, block_n, False, warps, 3),))
        for kernel in (linear_triton, linear_swiglu_triton):
            with pytest.raises(AssertionError):
                kernel(x, w, entry=of)


def test_rows_and_weights_that_do_not_fit_are_refused(device):
    w = random_weight(ROUNDED, 64, 256, device)
    with pytest.raises(ValueError, match="a multiple of 128 columns"):
        quantise_rows(torch.ones(2, 200))
    with pytest.raises(ValueError, match="do not fit together"):
        linear_triton(torch.ones(2, 128, dtype=BF16, device=device), w)
    with pytest.raises(AssertionError):
        random_weight(ROUNDED._replace(group=64), 64, 256, device)
    with pytest.raises(AssertionError):  # codes cannot become the rows that they were
        linear_triton(quantise_rows_triton(torch.ones(2, 256, dtype=BF16, device=device)),
                      random_weight(SCHEMES[0], 64, 256, device))  # fmt: skip
