"""Matrices in tiles for TMA: what a descriptor takes, and where the matrix ends for it."""

from __future__ import annotations

from torch import Tensor

from ._triton import TensorDescriptor
from .rows import SPARE_ROWS


def described(matrix: Tensor, stride: int, height: int, width: int) -> TensorDescriptor:
    """A matrix in tiles of height x width, for TMA."""
    return TensorDescriptor(matrix, extent(matrix, stride), [stride, 1], [height, width])


def extent(matrix: Tensor, stride: int) -> list[int]:
    """[rows, columns] that a descriptor of a matrix has. What its memory holds behind the last row belongs to
    it, as a tile that reaches past the end is copied slowly (rows.py); nobody stores what comes of those
    rows."""
    rows, columns = matrix.shape
    memory = matrix.untyped_storage().nbytes() // matrix.element_size() - matrix.storage_offset()
    in_memory = (memory - columns) // stride + 1
    return [min(rows + SPARE_ROWS, max(in_memory, rows)), columns]


def describable(*matrices: tuple[Tensor, int]) -> bool:
    """Whether (matrix, row stride) pairs are what TMA asks for: every row begins at its own multiple of 16
    bytes."""
    return all(m.data_ptr() % 16 == 0 == s * m.element_size() % 16 and s > 0 for m, s in matrices)
