"""The repaired interpreter against torch: what tests without a GPU stand on."""

import interpreter_speed
import numpy as np
import pytest
import torch
from interpreter import DEVICE, Order, chain_dot, narrow, order, widen
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


@pytest.mark.parametrize("m, k, n", [(16, 64, 16), (1, 33, 8), (9, 200, 1), (128, 16, 64)])
def test_chain_dot_adds_one_product_after_another(m, k, n):
    a, b, acc = (hard("heavy", *shape, seed=k).numpy() for shape in ((m, k), (k, n), (m, n)))
    want = acc.copy()
    for i in range(k):
        want += a[:, i, None] * b[i]
    assert np.array_equal(chain_dot(a, b, acc), want)


def operands():
    """Scalars and blocks of every type whose operators are remembered, of shapes that broadcast; one lies in
    memory by columns; numbers as a program has them."""
    for dtype, kind in (
        (np.int32, tl.int32),
        (np.int64, tl.int64),
        (np.float32, tl.float32),
        (np.uint32, tl.uint32),
        (bool, tl.int1),
    ):
        for shape in ((1,), (4,), (8, 1), (8, 4)) if kind not in (tl.int64, tl.uint32) else ((1,), (8, 4)):
            data = (np.arange(np.prod(shape)).reshape(shape) % 5 + 1).astype(dtype)
            yield valued(data, kind)
        yield valued(np.asfortranarray(data), kind)
    yield valued(np.ones((8, 4), np.uint16), tl.bfloat16)
    # a truth as a comparison of two numbers leaves it
    yield tl.tensor(interpreter_speed.handle_of(np.array([True]), tl.int32), tl.int1)
    # an argument of a kernel, which memory has without its sign
    yield tl.tensor(interpreter_speed.handle_of(np.array([3_000_000_000], np.uint32), tl.int64), tl.int64)
    yield from (3, 0, -2, 2**40, 1.5, 0.0, float("nan"), tl.constexpr(2))


def valued(data, kind):
    scalar = data.shape == (1,)
    handle = interpreter_speed.handle_of(data, kind)
    return tl.tensor(handle, kind if scalar else tl.block_type(kind, list(data.shape)))


def outcome(call, *arguments):
    """Type, bits and place in memory of what a call gives, or how it fails."""
    try:
        with np.errstate(all="ignore"):
            result = call(*arguments)
    except Exception as error:
        return type(error)
    data = result.handle.data
    at = data.dtype, data.shape, data.flags.c_contiguous, result.handle.dtype.scalar.name
    return result.type.name, [size.value for size in result.shape], data.tobytes(), *at


def test_remembered_operators_are_the_interpreters_own():
    """Each operator and cast, the first time that two types meet and after it."""
    values, semantic, met = list(operands()), interpreter_speed.semantic, 0
    blocks = [value for value in values if isinstance(value, tl.tensor)]
    for name, plain in interpreter_speed.PLAIN.items():
        if name.startswith("__") and name != "__getitem__":
            remembered = getattr(tl.tensor, name)
            for left in blocks:
                for right in values:
                    want = outcome(plain, left, right)
                    met += not isinstance(want, type)
                    for _ in range(2):
                        assert outcome(remembered, left, right) == want, (name, left.type, right)
    assert met > 3000
    for block in blocks:
        for kind in (tl.int1, tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32):
            want = outcome(interpreter_speed.PLAIN["cast"], semantic, block, kind)
            assert all(outcome(semantic.cast, block, kind) == want for _ in range(2)), (block.type, kind)
        for parts in ((None, slice(None)), (slice(None), None), (slice(None), None, slice(None))):
            want = outcome(interpreter_speed.PLAIN["__getitem__"], block, parts)
            assert all(outcome(tl.tensor.__getitem__, block, parts) == want for _ in range(2)), parts


def test_remembered_selects_are_the_interpreters_own():
    values, semantic = list(operands()), interpreter_speed.semantic
    conditions = [value for value in values if isinstance(value, tl.tensor) and value.dtype == tl.int1]
    for condition in conditions:
        for x in values[::2]:
            for y in values[1::2]:
                want = outcome(interpreter_speed.PLAIN["where"], semantic, condition, x, y)
                assert all(outcome(semantic.where, condition, x, y) == want for _ in range(2)), (x, y)


def pointers(address):
    kind = tl.pointer_type(tl.float32)
    return valued(np.arange(4, dtype=np.uint64) * 4 + address, kind)


def test_remembered_pointers_are_the_interpreters_own():
    """Moved by numbers of either width, and chosen."""
    at, plain, semantic = pointers(64), interpreter_speed.PLAIN, interpreter_speed.semantic
    far, truth = pointers(2**40), valued(np.array([True, False, True, True]), tl.int1)
    for by in (3, -2, valued(np.array([-5, 2, 0, 7]), tl.int64), valued(np.array([-5], np.int32), tl.int32)):
        for name in ("__add__", "__sub__"):
            want = outcome(plain[name], at, by)
            assert all(outcome(getattr(tl.tensor, name), at, by) == want for _ in range(2)), (name, by)
    want = outcome(plain["where"], semantic, truth, at, far)
    assert all(outcome(semantic.where, truth, at, far) == want for _ in range(2))


def test_remembered_checks_counts_and_sums_are_the_interpreters_own():
    plain, semantic = interpreter_speed.PLAIN, interpreter_speed.semantic
    blocks = [value for value in operands() if isinstance(value, tl.tensor)]

    def operand(checks, side, *pair):
        return checks(semantic, *pair)[side]

    for left in blocks:
        for right in blocks:
            for side in (0, 1):
                own = outcome(operand, type(semantic).binary_op_type_checking_impl, side, left, right)
                want = outcome(operand, plain["binary_op_type_checking_impl"], side, left, right)
                assert own == want, (left.type, right.type)
    for first, end in ((0, 1), (0, 8), (8, 16), (0, 8), (0, 3), (4, 4)):
        assert outcome(semantic.arange, first, end) == outcome(plain["arange"], semantic, first, end)
    reduce = interpreter_speed.interpreter.ReduceOps
    for dtype, kind in ((np.int64, tl.int64), (np.uint32, tl.uint32)):
        block = valued(np.arange(16, dtype=dtype).reshape(2, 4, 2) * 7919, kind)
        for axis in (0, 1, 2):
            for keep in (False, True):
                sums = reduce(axis, tl.standard._xor_combine, keep)
                want = outcome(lambda sums=sums, block=block: plain["generic_reduce"](sums, (block,))[0])
                assert outcome(lambda sums=sums, block=block: sums.apply(block)) == want


def test_remembered_launches_bind_as_the_interpreter_does():
    """Numbers and tensors that a kernel gets, and which of them its parameters are."""
    plain, speed = interpreter_speed.PLAIN["_implicit_cvt"], interpreter_speed.interpreter
    tensors = torch.zeros(3), torch.zeros(2).bfloat16(), torch.zeros(2, dtype=torch.bool)
    for value in (0, 1, -7, 2**31 - 1, 2**31, -(2**31), 2**40, True, *tensors):
        want = outcome(plain, value)
        assert all(outcome(speed._implicit_cvt, value) == want for _ in range(2)), value
    assert speed._implicit_cvt(1.5) == plain(1.5) == 1.5

    def kernel(a, b, c=3, d=4):
        """Not called."""

    cases = (((1, 2), {}), ((1,), {"b": 2}), ((), {"a": 1, "b": 2}), ((), {"b": 1, "a": 2, "d": 5}))
    for given, named in cases:
        bound = speed.inspect.getcallargs(kernel, *given, **named)
        assert bound == interpreter_speed.inspect.getcallargs(kernel, *given, **named)
    for named in ({"a": 1}, {"a": 1, "c": 2}, {"a": 1, "c": 2, "d": 3}):
        with pytest.raises(TypeError, match="'b'"):
            speed.inspect.getcallargs(kernel, **named)


def test_programs_that_write_one_place_differ_from_launch_to_launch():
    @triton.jit
    def last_one_wins(out):
        tl.store(out, tl.program_id(0) * 10 + tl.program_id(1))

    found = torch.zeros(6, dtype=torch.int32)
    for launch in range(6):
        last_one_wins[(4, 3)](found[launch:])
    assert found[0] == 0 and found[2] == 32 and len(set(found.tolist())) > 2


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_program_runs_once_whatever_the_order(count):
    assert all(sorted(order.of(count)) == list(range(count)) for _ in range(7))
    again = Order()
    order.restart()
    assert [order.of(9).tolist() for _ in range(4)] == [again.of(9).tolist() for _ in range(4)]
