"""Triton's interpreter made exact for bf16 and row-invariant in its dots, so that bitwise tests on a CPU mean
something.

Out of the box it computes on raw bf16 bit patterns, truncates fp32 to bf16, and takes `np.matmul` for a dot,
whose sums change their order with the shape."""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

Handle = interpreter.TensorHandle


def widen(handle):
    """A bf16 handle as fp32, exactly; any other as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.asarray(handle.data).view(np.uint16).astype(np.uint32) << 16
    return Handle(bits.view(np.float32), tl.float32)


def narrow(values) -> np.ndarray:
    """fp32 values as bf16 bits, to nearest even, NaN kept."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def install() -> None:
    """Patch the interpreter's casts, binary and unary operations, and dots."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "orthrus_repair", False):
        return
    builder.orthrus_repair = True
    cast, binary, unary = builder.cast_impl, builder.binary_op, builder.unary_op
    to_fp = builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if source == tl.bfloat16:
            wide = widen(src)
            return wide if target == tl.float32 else cast(self, wide, dst_type)
        if target == tl.bfloat16:
            return Handle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def binary_op(self, left, right, op):
        if left.dtype.scalar != tl.bfloat16 or right.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        out = binary(self, widen(left), widen(right), op)
        return Handle(narrow(out.data), tl.bfloat16) if out.data.dtype == np.float32 else out

    def unary_op(self, arg, op):
        if arg.dtype.scalar != tl.bfloat16:
            return unary(self, arg, op)
        return Handle(narrow(unary(self, widen(arg), op).data), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return to_fp(self, src, dst_type, rounding)

    def create_fma(self, x, y, z):
        """One rounding: the product of two fp32 numbers is exact in fp64."""
        exact = x.data.astype(np.float64) * y.data + z.data
        return Handle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_dot(self, a, b, d, *_):
        """Products added one k after another, every row on its own."""
        left, right = (np.asarray(widen(x).data, dtype=np.float32) for x in (a, b))
        out = np.array(d.data, dtype=np.float32)
        for i in range(left.shape[1]):
            out += left[:, i, None] * right[i]
        return Handle(out, d.dtype.scalar)

    builder.cast_impl, builder.binary_op, builder.unary_op = cast_impl, binary_op, unary_op
    builder.create_fp_to_fp, builder.create_dot, builder.create_fma = create_fp_to_fp, create_dot, create_fma


if DEVICE == "cpu":
    install()
