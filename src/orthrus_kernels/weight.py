"""A weight: the matrix [N, K] that a linear, the gate and up projections or the head multiply rows by.

Only this file, and the reader that fills `parts`, know how the numbers of a weight lie in memory. The kernels
load a weight's tiles and multiply by them through the functions below, in every place. Linears and the gate
and up projections also take codes with scales (quantised.py), which answer the same questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ._triton import TensorDescriptor, tl, triton
from .descriptors import describable, described
from .pdl import prefetch_to_l2
from .quantised import QuantisedWeight, product_by_groups


@dataclass(frozen=True, eq=False)
class Weight:
    """Numbers [N, K] of one float dtype, on any device; the columns of a row are contiguous."""

    data: Tensor

    scheme: ClassVar[None] = None  # as of a quantised one, which has factors
    factors: ClassVar[None] = None
    codes_a_word: ClassVar[int] = 1

    def __post_init__(self) -> None:
        assert self.data.dim() == 2 and self.data.stride(1) == 1, (self.data.shape, self.data.stride())

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.data.shape
        return n, k

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that it multiplies."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that a product with it reads."""
        return self.data.nbytes

    def dense(self) -> Tensor:
        """Its numbers, [N, K] of `dtype`: what the twins multiply by. Not to be written to."""
        return self.data

    def parts(self, *rows: int) -> tuple[Tensor, ...]:
        """Its memory in runs of so many rows, for a checkpoint's tensors to be copied into."""
        return self.data.split(rows)

    @property
    def pointer(self) -> Tensor:
        """What kernels take to load tiles by pointers, and to prefetch."""
        return self.data

    @cached_property
    def row_stride(self) -> int:
        """Elements between rows; always K where there is one row, so that this is one compilation."""
        return self.data.stride(0) if len(self.data) > 1 else self.data.shape[1]

    @cached_property
    def describable(self) -> bool:
        """Whether kernels can load tiles by descriptors."""
        return describable((self.data, self.row_stride))

    def described(self, height: int, width: int) -> TensorDescriptor:
        """What kernels take to load tiles [height, width] by descriptors."""
        return described(self.data, self.row_stride, height, width)

    @cached_property
    def can_prefetch(self) -> bool:
        """Whether rows are whole units of 16 bytes: nothing else was measured."""
        return self.describable and self.shape[1] * self.data.element_size() % 16 == 0


AnyWeight = Weight | QuantisedWeight  # what a linear multiplies by


def product_of(weight: AnyWeight) -> Callable[[Tensor], Tensor]:
    """The product plainly, for a constant number of rows: fp32 [T, K] -> fp32 [T, N]."""
    if isinstance(weight, QuantisedWeight):
        return product_by_groups(weight)
    wide = weight.dense().float().t()
    return lambda x: x @ wide


def by_view(
    one_view: Callable[[Tensor, AnyWeight], Tensor], x: Tensor, weight: AnyWeight,
    weight_diff: AnyWeight | None, n_ar: int | None,
) -> Tensor:  # fmt: skip
    """one_view(rows, their weight) of the AR rows [0, n_ar) and of the diffusion rows behind them, [T, N]; of
    all rows by `weight` where there is one weight only.
    """
    if weight_diff is None or n_ar is None or n_ar == len(x):
        return one_view(x, weight)
    if n_ar == 0:
        return one_view(x, weight_diff)
    return torch.cat([one_view(x[:n_ar], weight), one_view(x[n_ar:], weight_diff)])


@triton.jit
def load_weight(p_w, m_w):
    """Numbers of a weight, or words of codes, at p_w [BLOCK_N, BLOCK_K], 0 where the mask m_w is false. They
    leave L2 first: no later launch reads them soon."""
    return tl.load(p_w, mask=m_w, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_weight_by_tma(w, first_n, first_k):
    """The same through the descriptor w, from row first_n and column first_k on."""
    return w.load([first_n, first_k])


@triton.jit
def add_product(acc, b_w, b_x):
    """acc + b_w b_x, fp32 [BLOCK_N, BLOCK_T]: b_w is what a load of a weight has returned, b_x
    [BLOCK_K, BLOCK_T]. The weight is the M side, so that a row of x is a column of the sum."""
    return tl.dot(b_w, b_x, acc, input_precision="ieee")


@triton.jit
def prefetch_weight(p_w, sw_n, i_n, i_s, N, K, columns, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):  # fmt: skip
    """Ask L2 for the first `columns` columns of segment i_s in the weight rows of tile i_n."""
    first = i_s * tl.cdiv(tl.cdiv(K, BLOCK_K), SEGMENTS) * BLOCK_K
    columns = tl.minimum(columns, K - first)
    LINE: tl.constexpr = 128 // (p_w.dtype.element_ty.primitive_bitwidth // 8)
    o_n = tl.minimum(i_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    p_row = p_w + o_n.to(tl.int64)[:, None] * sw_n + first
    for c in range(0, columns, 2 * LINE):  # two lines of each row: about one a thread
        o_c = tl.minimum(c + tl.arange(0, 2) * LINE, columns - 1)
        prefetch_to_l2(p_row + o_c[None, :])
