"""Kernels on a machine without a GPU: Triton's interpreter, made to tell the truth.

Import before anything that imports triton. With CUDA it does nothing, and the same tests run compiled;
ORTHRUS_TEST_DEVICE=cuda or cpu says which (`make gpu-check` says cuda). On a CPU it sets TRITON_INTERPRET=1
and repairs four things (triton 3.6 and 3.7):

- bf16: the interpreter keeps bf16 as uint16 and does arithmetic on the bit patterns; conversions truncate.
  Here bf16 operands are widened to fp32, exactly, and results rounded to nearest even, as a GPU does.
- e4m3: a dot of two tiles of codes multiplies what they stand for. (The interpreter's own conversions to e4m3
  are wrong where rounding carries into the exponent; no kernel of the project asks for one.)
- programs run in the order of their numbers, so that the last one that writes a place wins, always. Here
  every launch has an order of its own: from the last program on, shuffled, or as numbered (`Order`).
- tl.dot is np.matmul, whose sums depend on the shape. Here each element is one chain over K, which starts
  from the accumulator. That is no tensor core's order, but it has a tensor core's property that the order
  depends on neither rows nor tiles, so a bitwise row test shows wrong indices, masks and segment orders.

What it cannot show: races between programs that run at once (here one runs after another), resource limits,
and the order of sums inside compiled reductions and dots. Those are the GPU's to prove (`make gpu-check`)."""

from __future__ import annotations

import os

import numpy as np
import torch


def device_of(asked: str | None) -> str:
    """Where kernels run: as asked, or on a GPU where torch sees one. Raises RuntimeError for any other."""
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RuntimeError(f"ORTHRUS_TEST_DEVICE is {device!r}: cpu, or cuda where torch sees a GPU")
    return device


DEVICE = device_of(os.environ.get("ORTHRUS_TEST_DEVICE"))

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> the fp32 numbers they stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.atleast_1d(np.asarray(x, dtype=np.float32)).view(np.uint32)
    odd = (bits >> 16) & 1
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def chain_dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a @ b in fp32, one product after another along K."""
    a, b = (np.moveaxis(of.astype(np.float32, copy=False), axis, 0) for of, axis in ((a, -1), (b, -2)))
    terms = np.empty((len(a) + 1, *acc.shape), np.float32)
    terms[0] = acc
    np.multiply(a[..., None], b[..., None, :], out=terms[1:])
    return np.add.reduce(terms, axis=0)  # row by row, which numpy does not do along the last axis


class Order:
    """The order in which the programs of a launch run. Two that write one place then differ from launch to
    launch. `restart` makes the orders of a test its own, whatever ran before it."""

    def __init__(self) -> None:
        self.launches = 0

    def restart(self) -> None:
        """Before a test."""
        self.launches = 0

    def of(self, count: int) -> np.ndarray:
        """The numbers of `count` programs as they run in the next launch."""
        numbers, self.launches = np.arange(count), self.launches + 1
        if self.launches % 3 == 1:
            return numbers[::-1]
        return np.random.default_rng(self.launches).permutation(numbers) if self.launches % 3 else numbers


order = Order()


def reorder() -> None:
    """Let `order` say which program runs next: the interpreter names them one by one, in rising order."""
    from triton.runtime.interpreter import InterpreterBuilder as builder

    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def grid_dim(self, *dim):
        set_dim(self, *dim)
        places = np.unravel_index(order.of(int(np.prod(dim))), dim)
        self.places = zip(*(axis.tolist() for axis in places), strict=True)

    def grid_idx(self, *_):
        set_idx(self, *next(self.places))

    builder.set_grid_dim, builder.set_grid_idx = grid_dim, grid_idx


def repair() -> None:
    """Patch the interpreter of the installed Triton."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(handle) -> bool:
        return handle.dtype.scalar.name == "bf16"

    def wide(handle):
        return handle_of(widen(np.asarray(handle.data)), tl.float32) if is_bf16(handle) else handle

    def numbers(handle):
        """What goes into a dot: also e4m3, which the interpreter keeps as bytes."""
        if handle.dtype.scalar == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn)
            return codes.float().numpy()
        return wide(handle).data

    def rounded(handle):
        """Back to bf16 when the operation gave numbers; comparisons give booleans and stay."""
        if handle.data.dtype.kind != "f":
            return handle
        return handle_of(narrow(handle.data), tl.bfloat16)

    plain = {
        name: getattr(builder, name)
        for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_fma", "create_fabs")
    }

    def cast(self, source, to):
        if is_bf16(source) and to.scalar == tl.bfloat16:
            return source
        if to.scalar == tl.bfloat16:
            return handle_of(narrow(source.data.astype(np.float32)), tl.bfloat16)
        with np.errstate(over="ignore"):  # what fp16 cannot hold is inf, as on a GPU, and no warning
            return plain["cast_impl"](self, wide(source), to)

    def fp_to_fp(self, source, to, rounding):
        if is_bf16(source) or to.scalar == tl.bfloat16:
            return cast(self, source, to)
        with np.errstate(over="ignore"):
            return plain["create_fp_to_fp"](self, source, to, rounding)

    def binary(self, left, right, op):
        if not (is_bf16(left) and is_bf16(right)):
            return plain["binary_op"](self, left, right, op)
        result = op(wide(left).data, wide(right).data)
        if result.dtype.kind == "b":
            return handle_of(result, tl.int1)
        return handle_of(narrow(result), tl.bfloat16)

    def unary(self, arg, op):
        with np.errstate(over="ignore"):  # exp of a large number is inf, as on a GPU, and no warning
            result = plain["unary_op"](self, wide(arg), op)
        return rounded(result) if is_bf16(arg) else result

    def fma(self, x, y, z):
        if is_bf16(z):
            return rounded(plain["create_fma"](self, wide(x), wide(y), wide(z)))
        if z.data.dtype == np.float32:  # one rounding: the product of two fp32 numbers is exact in fp64
            exact = x.data.astype(np.float64) * y.data + z.data
            return handle_of(exact.astype(np.float32), z.dtype.scalar)
        return plain["create_fma"](self, x, y, z)

    def fabs(self, arg):
        return (
            handle_of(arg.data & np.uint16(0x7FFF), tl.bfloat16)
            if is_bf16(arg)
            else plain["create_fabs"](self, arg)
        )

    def dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        result = chain_dot(numbers(a), numbers(b), wide(acc).data)
        return (
            rounded(handle_of(result, tl.float32))
            if is_bf16(acc)
            else handle_of(result.astype(acc.data.dtype), acc.dtype.scalar)
        )

    builder.cast_impl, builder.create_fp_to_fp, builder.binary_op = cast, fp_to_fp, binary
    builder.unary_op, builder.create_fma, builder.create_fabs, builder.create_dot = unary, fma, fabs, dot

    reduce_ops, plain_reduce = interpreter.ReduceOps, interpreter.ReduceOps.apply_impl

    def block_of(bits: np.ndarray, is_block: bool):
        kind = tl.block_type(tl.bfloat16, list(bits.shape)) if is_block else tl.bfloat16
        return tl.core.tensor(handle_of(bits, tl.bfloat16), kind)

    def reduce_wide(self, inputs):
        """Reductions of bf16 blocks: in fp32, rounded once."""
        if not any(block.dtype.scalar == tl.bfloat16 for block in inputs):
            return plain_reduce(self, inputs)
        was_bf16 = [block.dtype.scalar == tl.bfloat16 for block in inputs]
        widened = tuple(
            self.to_tensor(wide(block.handle).data, tl.float32) if bf16 else block
            for block, bf16 in zip(inputs, was_bf16, strict=True)
        )
        result = plain_reduce(self, widened)
        results = result if isinstance(result, (tuple, list)) else (result,)
        back = tuple(
            block_of(narrow(r.handle.data), r.type.is_block()) if bf16 else r
            for r, bf16 in zip(results, was_bf16, strict=True)
        )
        return back if isinstance(result, (tuple, list)) else back[0]

    reduce_ops.apply_impl = reduce_wide


if DEVICE == "cpu":
    import interpreter_speed

    repair()
    reorder()
    interpreter_speed.apply()
