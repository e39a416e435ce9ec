"""Kernels on a machine without a GPU: Triton's interpreter, made to tell the truth.

Import before anything that imports triton. With CUDA it does nothing, and the same tests run compiled;
ORTHRUS_TEST_DEVICE=cuda or cpu says which (`make gpu-check` says cuda). On a CPU it sets TRITON_INTERPRET=1
and repairs two things (triton 3.6 and 3.7):

- bf16: the interpreter keeps bf16 as uint16 and does arithmetic on the bit patterns; conversions truncate.
  Here bf16 operands are widened to fp32, exactly, and results rounded to nearest even, as a GPU does.
- tl.dot is np.matmul, whose sums depend on the shape. Here each element is one chain over K, which starts
  from the accumulator. That is no tensor core's order, but it has a tensor core's property that the order
  depends on neither rows nor tiles, so a bitwise row test shows wrong indices, masks and segment orders.

What it cannot show: races (programs run one after another), resource limits, and the order of sums inside
compiled reductions and dots. Those are the GPU's to prove (`make gpu-check`)."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

DEVICE = os.environ.get("ORTHRUS_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE not in ("cpu", "cuda") or (DEVICE == "cuda" and not torch.cuda.is_available()):
    raise RuntimeError(f"ORTHRUS_TEST_DEVICE is {DEVICE!r}: cpu, or cuda where torch sees a GPU")

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
    a, b, acc = a.astype(np.float32), b.astype(np.float32), acc.astype(np.float32)
    for k in range(a.shape[-1]):
        acc = acc + a[..., :, k, None] * b[..., None, k, :]
    return acc


def repair() -> None:
    """Patch the interpreter of the installed Triton."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(handle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def wide(handle):
        return handle_of(widen(np.asarray(handle.data)), tl.float32) if is_bf16(handle) else handle

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
        result = chain_dot(wide(a).data, wide(b).data, wide(acc).data)
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


def patch_once() -> None:
    """Spare the interpreter a third of its time: it puts its own functions into triton.language anew at every
    call of one jit function by another; here only where they are not in place yet."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain, patched = interpreter._patch_lang, set()
    nothing = SimpleNamespace(restore=lambda: None)

    @cache
    def languages(fn) -> frozenset:
        """The modules whose functions a jit function may call."""
        modules = (value for value in fn.__globals__.values() if isinstance(value, ModuleType))
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def patch(fn):
        new = languages(fn) - patched
        if not new:
            return nothing
        scope = plain(fn)
        patched.update(new)
        if hasattr(scope, "restore"):  # at the end of a launch
            restore = scope.restore

            def restore_and_forget() -> None:
                restore()
                patched.difference_update(new)

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch


def remember_types() -> None:
    """Spare it another third: shapes, names and numpy dtypes of types are worked out anew for every value,
    here once a type; casts to the same type and broadcasts to the same shape take their full course, here
    none; and integer sums are done once more in 64 bits for a check that only debugging makes."""
    import triton.language as tl
    from triton.runtime import interpreter

    block_type, tensor = tl.core.block_type, tl.core.tensor
    plain_block, plain_tensor, plain_dtype = block_type.__init__, tensor.__init__, interpreter._get_np_dtype
    blocks: dict[tuple, dict] = {}
    tensors: dict[str, dict] = {}
    dtypes: dict[str, np.dtype] = {}

    def block_init(self, element_ty, shape):
        shape = getattr(shape, "value", shape)  # of a constexpr
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key in blocks:
            self.__dict__.update(blocks[key])
            self.element_ty = element_ty
        else:
            plain_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)

    def tensor_init(self, handle, type):
        if type.name in tensors:
            self.__dict__.update(tensors[type.name])
            self.handle, self.type, self.dtype = handle, type, type.scalar
        else:
            plain_tensor(self, handle, type)
            own = {"handle", "type", "dtype"}
            tensors[type.name] = {k: v for k, v in self.__dict__.items() if k not in own}

    def np_dtype(kind):
        name = kind.element_ty.name if isinstance(kind, block_type) else kind.name
        if name not in dtypes:
            dtypes[name] = plain_dtype(kind)
        return dtypes[name]

    block_type.__init__, tensor.__init__, interpreter._get_np_dtype = block_init, tensor_init, np_dtype

    semantic = interpreter.TritonSemantic
    plain_broadcast, plain_cast = semantic.broadcast_impl_value, semantic.cast

    def broadcast(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        same = left is right or left.name == right.name
        if same or (left.is_block() and right.is_block() and left.shape.values == right.shape.values):
            return lhs, rhs
        return plain_broadcast(self, lhs, rhs)

    def cast(self, value, kind, fp_downcast_rounding=None):
        if fp_downcast_rounding is None and value.type.scalar.name == kind.scalar.name:
            return value
        return plain_cast(self, value, kind, fp_downcast_rounding)

    semantic.broadcast_impl_value, semantic.cast = broadcast, cast
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


if DEVICE == "cpu":
    repair()
    patch_once()
    remember_types()
