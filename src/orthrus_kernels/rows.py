"""What the row-wise kernels share: one row's sum has one shape, whatever the pass around it.

Triton gives a reduction the layout that follows from the block, the warps and the alignment it can prove.
Block and warps are functions of the row's width here, and alignment is made one as well: rows that are a
multiple of 16 wide start at multiples of 16 elements, all others are packed."""

from __future__ import annotations

from torch import Tensor

# A linear copies its operand in tiles of rows, by descriptors (TMA). A copy that runs past the end of an
# allocation takes up to 1.8 times as long (H200, 2026-11-26, bench/LOG.md, entry 79). So an allocation is
# longer than its rows by the tallest tile.
SPARE_ROWS = 256

# Row-wise kernels are compiled without multiply-add contraction, which may differ between specialisations;
# where a fused multiply-add is meant, the kernel says tl.fma.
NO_CONTRACTION = {"enable_fp_fusion": False}


def block_and_warps(width: int) -> tuple[int, int]:
    """Block (a power of two) and warps for rows of `width`: 8 to 32 numbers a thread up to 8192."""
    block = 1 << max(width - 1, 15).bit_length()
    return block, min(max(block // 512, 1), 8)


def new_rows(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised [T, ...] of `like`'s dtype and device, for a linear to read: SPARE_ROWS more rows of
    memory stand behind it."""
    return like.new_empty(shape[0] + SPARE_ROWS, *shape[1:])[: shape[0]]


def row_stride(x: Tensor, width: int) -> int:
    """Elements between rows of x, checked for what the layout depends on.

    Raises ValueError when a row's columns are not contiguous, or rows do not start where this width must."""
    stride = x.stride(0) if x.shape[0] > 1 else width
    wide = width % 16 == 0
    if x.stride(-1) != 1 or (stride % 16 or x.data_ptr() % 16 if wide else stride != width):
        raise ValueError(
            f"rows of {width} must be contiguous, start at multiples of 16 where the width is one, "
            f"else be packed: shape {tuple(x.shape)}, strides {x.stride()}, offset {x.storage_offset()}"
        )
    return stride


def check_weights(width: int, *weights: Tensor) -> None:
    """Raise ValueError unless every weight is [width] contiguous, and aligned as rows are."""
    for weight in weights:
        if weight.shape != (width,) or weight.stride(0) != 1 or (width % 16 == 0 and weight.data_ptr() % 16):
            raise ValueError(
                f"a weight of [{width}] is needed: {tuple(weight.shape)}, strides {weight.stride()}"
            )
