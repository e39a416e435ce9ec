"""The repaired interpreter against torch: what tests without a GPU stand on."""

import numpy as np
import pytest
import torch
from interpreter import DEVICE, chain_dot, narrow, widen
from strategies import hard

from orthrus_kernels._triton import tl, triton

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels run compiled here")


@triton.jit
def _kernel(x, y, w, sums, products, total, dot, N: tl.constexpr):
    o = tl.arange(0, N)
    a, b = tl.load(x + o), tl.load(y + o)
    tl.store(sums + o, a + b)
    tl.store(products + o, a * b)
    tl.store(total, tl.sum(a, axis=0))
    square = o[:, None] * N + o[None, :]
    tl.store(dot + square, tl.dot(tl.load(w + square), tl.trans(tl.load(w + square))).to(tl.bfloat16))


def test_bf16_arithmetic_is_torchs():
    x, y, w = (hard(k, *s).bfloat16() for k, s in (("heavy", (64,)), ("normal", (64,)), ("normal", (64, 64))))
    sums, products, total, dot = (x.new_empty(s) for s in ((64,), (64,), (1,), (64, 64)))
    _kernel[(1,)](x=x, y=y, w=w, sums=sums, products=products, total=total, dot=dot, N=64)
    assert torch.equal(sums, x + y) and torch.equal(products, x * y)
    assert abs(total.double() - x.double().sum()) <= 2**-8 * x.double().abs().sum()
    exact = w.double() @ w.double().T
    assert (dot.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_narrow_rounds_as_torch_does():
    edges = torch.tensor([0.0, -0.0, float("inf"), 3.4e38, 1e-45, 1.00390625])
    x = torch.cat([hard("heavy", 100_000), edges])
    bits = narrow(x.numpy())
    assert np.array_equal(bits, x.bfloat16().view(torch.uint16).numpy())
    assert torch.equal(torch.from_numpy(widen(bits)), x.bfloat16().float())
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32)))).all()


def test_chain_dot_is_independent_of_shape():
    a, b = hard("heavy", 32, 64).numpy(), hard("heavy", 64, 48, seed=1).numpy()
    zero = np.zeros((32, 48), np.float32)
    whole = chain_dot(a, b, zero)
    assert np.array_equal(whole[:, 5:6], chain_dot(a, b[:, 5:6], zero[:, :1]))
    assert np.array_equal(whole, chain_dot(a[:, 32:], b[32:], chain_dot(a[:, :32], b[:32], zero)))
