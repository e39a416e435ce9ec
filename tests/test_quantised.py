"""A quantised weight in memory, and its product plainly: words against a writing bit by bit, the twin against
fp64, and the same bits for a row in any company."""

import pytest
import torch
from codes import SCHEMES, Coding, exact, fold, name_of, numbers_of, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import assert_close
from strategies import KINDS, hard

from orthrus_kernels import Weight, backend_ops
from orthrus_kernels.linear import linear
from orthrus_kernels.linear_swiglu import linear_swiglu
from orthrus_kernels.quantised import Format, QuantisedWeight, packed, unpacked
from orthrus_kernels.swiglu import swiglu

# Bits of a half of a word in which bits 0 to 7 of an e4m3 code lie, of columns with h = 0 and h = 1.
E4M3_BITS = (4, 5, 6, 7, 8, 9, 10, 15), (0, 1, 2, 3, 12, 13, 14, 11)


def place(format: Format, column: int, bit: int) -> tuple[int, int]:
    """(word, its bit) of a bit of a column's code."""
    if format is Format.E4M3:
        step, h, t, b = column // 16, column // 8 % 2, column // 2 % 4, column % 2
        return 4 * step + t, 16 * b + E4M3_BITS[h][bit]
    step, s, h, t, b = column // 32, column // 16 % 2, column // 8 % 2, column // 2 % 4, column % 2
    return 4 * step + t, 4 * (4 * b + 2 * s + h) + bit


@pytest.mark.parametrize("format", Format)
@settings(max_examples=20)
@given(n=st.integers(1, 4), steps=st.integers(1, 5), seed=st.integers(0, 1000))
def test_words_hold_each_bit_where_they_say(format, n, steps, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << format.bits, (n, 32 * steps), generator=g, dtype=torch.uint8)
    words = packed(codes, format)
    written = [[0] * words.shape[1] for _ in range(n)]
    for row in range(n):
        for column in range(codes.shape[1]):
            for bit in range(format.bits):
                word, there = place(format, column, bit)
                written[row][word] |= (int(codes[row, column]) >> bit & 1) << there
    assert [[word % (1 << 32) for word in row] for row in words.tolist()] == written
    assert torch.equal(unpacked(words, format), codes)


def e4m3(code: int) -> float:
    """A code of 1 sign, 4 bits of exponent and 3 of fraction."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def test_what_every_code_stands_for():
    codes = numbers_of(Format.E4M3).repeat(16)[None, :4064]
    weight = QuantisedWeight.new(
        1, 4064, Format.E4M3, 32, zeros=False, scale=torch.float32, dtype=torch.bfloat16, device="cpu"
    )
    weight.put(0, codes, torch.ones(1, 127))
    assert weight.values().tolist() == [[e4m3(code) for code in codes[0].tolist()]]
    assert torch.equal(weight.values().bfloat16().float(), weight.values()), "exact in bf16"
    for zeros in (False, True):
        scale = torch.float16 if zeros else torch.float32
        weight = random_weight(Coding(Format.INT4, 32, zeros, scale), 40, 64)
        zero = weight.zero if zeros else torch.full((2, 40), 8)
        for n, row in enumerate(weight.codes().tolist()):
            assert weight.values()[n].tolist() == [q - int(zero[k // 32, n]) for k, q in enumerate(row)]


def test_parts_of_a_stack_are_put_one_by_one():
    scheme = Coding(Format.INT4, 64, True, torch.bfloat16)
    whole, parts = random_weight(scheme, 10, 128), random_weight(scheme, 10, 128, seed=1)
    for first, last in ((0, 3), (3, 10)):
        rows = slice(first, last)
        parts.put(first, whole.codes()[rows], whole.scale.t()[rows].float(), whole.zero.t()[rows])
    assert torch.equal(parts.codes(), whole.codes()) and torch.equal(parts.dense(), whole.dense())
    assert whole.nbytes == 10 * 64 + 2 * 10 * 4 and whole.shape == (10, 128)


def test_rows_of_a_block_share_a_factor():
    """300 rows are two blocks and a part of one. Parts may end inside a block, and may not disagree there."""
    whole, parts = (random_weight(SCHEMES[0], 300, 256, seed=seed) for seed in (0, 1))
    scale = whole.scale.t()
    assert whole.factors.shape == (2, 3) and len(scale.unique()) == 6
    for first, last in ((0, 77), (77, 130), (130, 300)):
        rows = slice(first, last)
        parts.put(first, whole.codes()[rows], scale[rows])
    assert torch.equal(parts.codes(), whole.codes()) and torch.equal(parts.scale, whole.scale)
    assert whole.nbytes == whole.nbytes_of(300) == 300 * 256 + 2 * 3 * 4
    assert whole.nbytes_of(128) == 128 * 256 + 2 * 4
    with pytest.raises(AssertionError, match="one scale"):
        parts.put(128, whole.codes()[:100], scale[100:200])


@pytest.mark.parametrize("format, group, k, zeros", [
    (Format.E4M3, 128, 704, False), (Format.INT4, 16, 64, False), (Format.E4M3, 64, 64, True),
])  # fmt: skip
def test_what_has_no_form_is_refused(format, group, k, zeros):
    with pytest.raises(ValueError, match="groups of"):
        QuantisedWeight.new(
            4, k, format, group, zeros=zeros, scale=torch.bfloat16, dtype=torch.bfloat16, device="cpu"
        )


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_twin_against_fp64(scheme, dtype):
    k = 704 if scheme[1] < 128 else 384
    w, w2 = (random_weight(scheme, 70, k, seed=s, dtype=dtype) for s in (1, 2))
    x = hard("heavy", 37, k).to(dtype)
    got = linear(x, w, w2, 5)
    assert got.dtype == dtype
    assert_close(got, torch.cat([x[:5].double() @ exact(w).T, x[5:].double() @ exact(w2).T]))
    assert torch.equal(linear_swiglu(x, w), swiglu(linear(x, w)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@settings(max_examples=8)
@given(rows=st.integers(2, 80), index=st.integers(0, 79), kind=st.sampled_from(KINDS))
def test_a_row_of_the_twin_has_the_same_bits_anywhere(scheme, rows, index, kind):
    index %= rows
    k = 704 if scheme[1] < 128 else 384
    w, w2, x = random_weight(scheme, 70, k), random_weight(scheme, 70, k, seed=1), hard(kind, rows, k)
    alone, alone2 = (linear(x[index : index + 1], of)[0] for of in (w, w2))
    assert torch.equal(linear(x, w)[index], alone)
    assert torch.equal(linear(x, w, w2, index)[index], alone2)
    assert torch.equal(linear(x, w, w2, index + 1)[index], alone)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
def test_torch_multiplies_by_its_numbers_in_the_dtype_of_rows(scheme):
    w, x, ops = random_weight(scheme, 70, 128), hard("normal", 9, 128).bfloat16(), backend_ops("torch")
    assert torch.equal(w.dense(), exact(w).float().bfloat16())
    assert torch.equal(ops.linear(x, w), x @ w.dense().t())
    assert torch.equal(ops.linear_swiglu(x, w), swiglu(x @ w.dense().t()))


def test_a_fold_is_rounded_once():
    x, w, product = fold()
    assert linear(x, w).tolist() == [[product]]


def test_a_form_of_each_view():
    """Codes of one format for AR rows, of another or none for diffusion rows."""
    x, fp8, int4 = (
        hard("normal", 9, 128),
        random_weight(SCHEMES[0], 30, 128),
        random_weight(SCHEMES[4], 30, 128),
    )
    dense = Weight(int4.dense().float())
    for first, second in ((fp8, int4), (int4, dense), (dense, fp8)):
        apart = torch.cat([linear(x[:4], first), linear(x[4:], second)])
        assert torch.equal(linear(x, first, second, 4), apart)
