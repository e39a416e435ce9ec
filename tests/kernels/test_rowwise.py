"""Norms, q/k-norm with RoPE, SwiGLU and embedding: right against fp64, near the twins, same bits anywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, examples, given_rows
from limits import assert_close
from strategies import KINDS, hard

from orthrus_kernels.backends import backend_ops
from orthrus_kernels.swiglu import swiglu, swiglu_triton

TWIN, TRITON = backend_ops("reference"), backend_ops("triton")
EPS = 1e-6
H, G = 5, 2  # 7 normalised heads: the last program's tile is ragged


def norm64(x, w):
    return x * (x.square().mean(-1, True) + EPS).rsqrt() * w


def rope64(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def operations(dtype, device, width, d=32):
    """{name: (op(ops, x, extra rows' data), fp64 definition)} on rows of `width` numbers or 9 heads of d."""
    g, g2 = (hard("normal", width, seed=s).to(device, dtype) for s in (3, 4))
    q, k, q2, k2 = (hard("normal", d, seed=s).to(device, dtype) for s in (5, 6, 7, 8))
    angle = hard("normal", 200, d // 2, seed=9).to(device)
    cos, sin = angle.cos(), angle.sin()

    def two_views(x, n_ar, by_row):
        return torch.cat([by_row(x[:n_ar], 0), by_row(x[n_ar:], 1)])

    def qk(ops, x, n_ar):
        heads = x[:, : (H + 2 * G) * d].reshape(-1, H + 2 * G, d)
        pair = ops.qk_norm_rope(heads, H, q, k, cos[: len(x)], sin[: len(x)], EPS, q2, k2, n_ar)[:2]
        return torch.cat(pair, 1)

    def qk64(x, n_ar):
        heads = x[:, : (H + 2 * G) * d].reshape(-1, H + 2 * G, d)

        def norms(part, i):
            w_q, w_k = (q, q2)[i].double(), (k, k2)[i].double()
            return torch.cat([norm64(part[:, :H], w_q), norm64(part[:, H : H + G], w_k)], 1)

        normed = two_views(heads, n_ar, norms)
        return rope64(normed, cos[: len(x)], sin[: len(x)])

    def add64(x, n_ar):
        total = x + x.flip(-1)
        return torch.cat([norm64(total.to(dtype).double(), g.double()), total], 1)

    return {
        "rms_norm": (
            lambda ops, x, n_ar: ops.rms_norm(x, g, EPS, g2, n_ar),
            lambda x, n_ar: two_views(x, n_ar, lambda part, i: norm64(part, (g, g2)[i].double())),
        ),
        "add_rms_norm": (
            lambda ops, x, n_ar: torch.cat(ops.add_rms_norm(x, x.flip(-1), g, EPS), 1),
            add64,
        ),
        "swiglu": (
            lambda ops, x, n_ar: {TRITON: swiglu_triton, TWIN: swiglu}[ops](x),
            lambda x, n_ar: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[0] * x.chunk(2, -1)[1],
        ),
        "qk_norm_rope": (qk, qk64),
    }


NAMES = ("rms_norm", "add_rms_norm", "swiglu", "qk_norm_rope")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_against_fp64_and_the_twin(name, kind, dtype, device):
    op, definition = operations(dtype, device, 1088)[name]
    x = given_rows(kind, 9, 1088, dtype=dtype, device=device)
    if name == "qk_norm_rope":
        x = x[:, : (H + 2 * G) * 32].contiguous()
    got = op(TRITON, x, 4)
    assert_close(got, definition(x.double(), 4))
    assert_close(got, op(TWIN, x, 4).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@examples(8)
@given(rows=st.integers(2, 70), index=st.integers(0, 69), kind=st.sampled_from(KINDS), ar=st.booleans())
def test_a_row_has_the_same_bits_anywhere(name, dtype, device, rows, index, kind, ar):
    index %= rows
    width = (H + 2 * G) * 32
    op, _ = operations(dtype, device, width)[name]
    x = given_rows(kind, rows, width, dtype=dtype, device=device)
    if name == "qk_norm_rope":  # its angles belong to the row: put the row's position first
        x = x.roll(-index, 0)
        index = 0
    n_ar = index + 1 if ar else index
    assert torch.equal(op(TRITON, x, n_ar)[index], op(TRITON, x[index : index + 1], int(ar))[0])


@given(rows=st.integers(1, 5), width=st.sampled_from([1, 15, 40, 96, 1000]), heads=st.integers(1, 3))
@examples(10)
def test_norm_of_odd_widths_and_heads(rows, width, heads, device):
    x, w = hard("normal", rows, heads, width).to(device), hard("normal", width, seed=1).to(device)
    assert_close(TRITON.rms_norm(x, w, EPS), norm64(x.double(), w.double()))


@pytest.mark.parametrize("d", [64, 128])
def test_qk_norm_rope_of_qwen3_heads(d, device):
    """16 query heads and 8 groups, in a strided buffer whose other columns and outputs are NaN."""
    h, g, rows = 16, 8, 3
    buffer = torch.full((rows, (h + 2 * g) * d + 64), float("nan"), device=device)
    qkv = buffer[:, : (h + 2 * g) * d].view(rows, h + 2 * g, d)
    qkv.copy_(hard("normal", rows, h + 2 * g, d))
    q_w, k_w = hard("normal", d, seed=1).to(device), hard("normal", d, seed=2).to(device)
    angle = hard("normal", rows, d // 2, seed=3).to(device)
    q, k, v = TRITON.qk_norm_rope(qkv, h, q_w, k_w, angle.cos(), angle.sin(), EPS)
    keep = torch.full((2, rows, g + 1, d), float("nan"), device=device)  # of a larger buffer
    for ops in (TRITON, TWIN):
        got = ops.qk_norm_rope(
            qkv, h, q_w, k_w, angle.cos(), angle.sin(), EPS, keep=(keep[0, :, :g], keep[1, :, :g])
        )
        assert_close(got[0], q.double())
        assert got[1].data_ptr() == keep.data_ptr() and got[2].data_ptr() == keep[1].data_ptr()
        assert_close(got[1], k.double())
        assert torch.equal(got[2], v) and torch.equal(v, qkv[:, h + g :])
        assert keep[:, :, g].isnan().all()
    heads = qkv.double()
    assert_close(q, rope64(norm64(heads[:, :h], q_w.double()), angle.cos(), angle.sin()))
    assert_close(k, rope64(norm64(heads[:, h : h + g], k_w.double()), angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_copies_rows(dtype, device):
    table = hard("heavy", 50, 1500).to(device, dtype)
    for ids in (torch.int32, torch.int64):
        tokens = torch.tensor([49, 0, 7, 7], dtype=ids, device=device)
        assert torch.equal(TRITON.embedding(table, tokens), table[tokens.long()])
        assert torch.equal(TWIN.embedding(table, tokens), table[tokens.long()])


def test_rows_that_would_change_the_layout_are_refused(device):
    buffer = torch.zeros(3, 40, device=device)
    w = torch.ones(32, device=device)
    with pytest.raises(ValueError, match="rows of 32"):
        TRITON.rms_norm(buffer[:, 1:33], w, EPS)
    with pytest.raises(ValueError, match="rows of 31"):
        TRITON.rms_norm(buffer[:, :31], w[:31], EPS)
    with pytest.raises(ValueError, match="a weight of"):
        TRITON.rms_norm(buffer[:, :40].contiguous(), w, EPS)
    with pytest.raises(ValueError, match="stacked heads"):
        TRITON.qk_norm_rope(torch.zeros(1, 4, 16), 3, w[:16], w[:16], w[None, :8], w[None, :8], EPS)


def test_out_takes_the_result(device):
    x, w = hard("normal", 3, 32).to(device), hard("normal", 32, seed=1).to(device)
    out = torch.empty_like(x)
    assert TRITON.rms_norm(x, w, EPS, out=out) is out and not out.isnan().any()
    total = x.clone()
    normed, _ = TRITON.add_rms_norm(x, total, w, EPS, out=(torch.empty_like(x), total))
    assert torch.equal(total, x + x) and torch.equal(normed, TRITON.rms_norm(x + x, w, EPS))
    half = torch.empty(3, 16, device=device)
    assert swiglu_triton(x, out=half) is half and torch.equal(half, swiglu_triton(x))
