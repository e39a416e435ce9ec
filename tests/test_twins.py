"""The plain twins of linear, norm, RoPE and SwiGLU: right against fp64, and the same bits beside any other
rows.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS, hard

from orthrus_kernels import Weight, cos_sin, inverse_frequencies, linear, rms_norm, rope, swiglu, top_k

# Largest error relative to the largest output, against fp64 on the same inputs: fp32 sums of a few hundred
# terms; bf16 rounds the output to 8 bits, up to three times in one operation.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
DTYPES = list(LIMIT)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def operations(dtype):
    """Each row-wise operation on rows of 40 or 2x40 numbers, and its fp64 definition."""
    w, w2 = hard("normal", 56, 40, seed=1).to(dtype), hard("normal", 56, 40, seed=2).to(dtype)
    g = hard("normal", 40, seed=3).to(dtype)
    wd, w2d, gd = w.double(), w2.double(), g.double()
    return {
        "linear": (lambda x: linear(x, Weight(w)), lambda x: x @ wd.T),
        "linear_diff": (lambda x: linear(x, Weight(w), Weight(w2), 0), lambda x: x @ w2d.T),
        "rms_norm": (
            lambda x: rms_norm(x, g, 1e-6),
            lambda x: x * (x.square().mean(-1, True) + 1e-6).rsqrt() * gd,
        ),
        "swiglu": (swiglu, lambda x: x[:, :20] * torch.sigmoid(x[:, :20]) * x[:, 20:]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", operations(torch.float32))
def test_against_fp64(name, kind, dtype):
    op, definition = operations(dtype)[name]
    x = hard(kind, 37, 40).to(dtype)
    assert error(op(x), definition(x.double())) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", operations(torch.float32))
@given(
    rows=st.integers(1, 70), index=st.integers(0, 69), kind=st.sampled_from(KINDS), seed=st.integers(0, 99)
)
def test_a_row_has_the_same_bits_anywhere(name, dtype, rows, index, kind, seed):
    op, _ = operations(dtype)[name]
    index %= rows
    x = hard(kind, rows, 40, seed=seed).to(dtype)
    assert torch.equal(op(x)[index], op(x[index : index + 1])[0])


def test_torch_alone_is_not_row_invariant():
    """Why the tiles exist: were this to fail everywhere, by_row_tile could go."""
    x, w = hard("heavy", 64, 704), hard("normal", 256, 704, seed=1)
    differs = [not torch.equal((x[:n] @ w.T)[0], (x[:1] @ w.T)[0]) for n in range(2, 65)]
    weight = Weight(w)
    tiled = [not torch.equal(linear(x[:n], weight)[0], linear(x[:1], weight)[0]) for n in range(2, 65)]
    assert any(differs) and not any(tiled)


@given(n=st.integers(0, 40), n_ar=st.integers(0, 40))
def test_each_view_multiplies_its_own_rows(n, n_ar):
    n_ar = min(n_ar, n)
    x, w, w2 = hard("normal", n, 24), *(Weight(hard("normal", 8, 24, seed=s)) for s in (1, 2))
    got = linear(x, w, w2, n_ar)
    assert torch.equal(got[:n_ar], linear(x[:n_ar], w)) and torch.equal(got[n_ar:], linear(x[n_ar:], w2))
    g, g2 = hard("normal", 24, seed=3), hard("normal", 24, seed=4)
    got = rms_norm(x, g, 1e-6, g2, n_ar)
    assert torch.equal(got[:n_ar], rms_norm(x[:n_ar], g, 1e-6)) and torch.equal(
        got[n_ar:], rms_norm(x[n_ar:], g2, 1e-6)
    )


def test_linear_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit together"):
        linear(torch.zeros(2, 3), Weight(torch.zeros(4, 5)))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_turns_each_pair_by_its_angle(head_dim):
    """Against complex multiplication in fp64, up to position 40960; the fp32 angle there is good to 40960 *
    2^-24 radians.
    """
    positions = torch.tensor([0, 1, 17, 4095, 40960])
    frequencies, scale = inverse_frequencies(head_dim, 1e6)
    x = hard("normal", 5, 3, head_dim)
    got = rope(x, *cos_sin(positions, frequencies, scale))
    exact = 1e6 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None].double() * exact)[:, None]
    pairs = torch.complex(*x.double().chunk(2, -1)) * turn
    assert error(got, torch.cat([pairs.real, pairs.imag], -1)) < 5e-3
    assert torch.equal(got[0], x[0]), "position 0 turns nothing"
    assert error(got[1:3], torch.cat([pairs.real, pairs.imag], -1)[1:3]) < 3e-6


@given(st.integers(1, 6), st.integers(0, 50))
def test_top_k_takes_the_lowest_id_of_equals(k, seed):
    logits = torch.randint(0, 4, (5, 12), generator=torch.Generator().manual_seed(seed)).float()
    logprobs, ids = top_k(logits, k)
    want = [sorted(range(12), key=lambda i: (-row[i].item(), i))[:k] for row in logits]
    assert ids.tolist() == want
    assert torch.allclose(logprobs, torch.log_softmax(logits.double(), -1).gather(1, ids).float(), atol=1e-6)


def test_top_k_refuses_a_k_past_the_vocabulary():
    with pytest.raises(ValueError, match="k is 13"):
        top_k(torch.zeros(1, 12), 13)
