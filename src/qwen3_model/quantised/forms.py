"""The five forms in which checkpoints hold a quantised weight [N, K]: their tensors, and the numbers in them.

`read` makes of rows [first, last) of a weight, both multiples of 8 or N, what `QuantisedWeight.put` takes:
codes uint8 [rows, K], scales [rows, K / group], zero points uint8 [rows, K / group] or None."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from orthrus_kernels.quantised import GROUPS, SYMMETRIC, Format

from ..errors import InputError

Shape = tuple[int, ...]
Wanted = dict[str, tuple[tuple[str, ...], tuple[Shape, ...]]]  # tensor -> dtypes and shapes that it may have
Numbers = tuple[Tensor, Tensor, Tensor | None]
NAN = 0x7F  # and 0xff: the codes of float8_e4m3fn that are no numbers
BLOCK = 128  # rows and columns of an fp8 block
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds row 8 c + i of the weight, i = 0 .. 7
_I32, _SCALES, _F8 = ("I32",), ("F16", "BF16", "F32"), ("F8_E4M3",)


class Form(ABC):
    """How a checkpoint holds a weight."""

    name: ClassVar[str]  # in `quantization_config`
    format: ClassVar[Format]
    scale: ClassVar[str]  # the tensor of the scales
    optional: ClassVar[tuple[str, ...]] = ()  # tensors that may be missing
    by_group: ClassVar[int | None] = None  # the dimension of the scales that counts groups; None: 8 bits

    @abstractmethod
    def tensors(self, n: int, k: int, group: int) -> Wanted:
        """The tensors of a weight [n, k] with `group` columns a scale."""

    @abstractmethod
    def read(self, stored: Mapping[str, Tensor], rows: range, group: int) -> Numbers:
        """Codes, scales and zero points of rows of a weight."""

    def has_zeros(self, names: frozenset[str]) -> bool:
        """Whether a weight with these tensors has zero points other than SYMMETRIC."""
        return False

    def scale_rows(self, n: int, scale: Shape) -> int:
        """Rows that share a scale, or more: BLOCK or 1. scale: the shape of the scales of n rows."""
        return 1


def group_of_eight_bits(k: int) -> int | None:
    """The widest group of columns that divides K and never crosses a block; None: none does."""
    return next((group for group in sorted(GROUPS, reverse=True) if k % group == 0), None)


def nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """uint8 [..., 8 W] of int32 words [..., W]: the nibbles of a word in an order, 0 the lowest."""
    shifts = 4 * torch.tensor(order, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _words(rows: range) -> slice:
    """The words, packed along N, that hold rows from a multiple of 8 on."""
    return slice(rows.start // 8, -(-rows.stop // 8))


class _Float8(Form):
    """Codes of 8 bits as they are; scales by block, by row or for the whole weight."""

    format = Format.E4M3

    def read(self, stored: Mapping[str, Tensor], rows: range, group: int) -> Numbers:
        codes = stored["weight"][rows.start : rows.stop].view(torch.uint8)
        if ((codes & NAN) == NAN).any():
            raise InputError("holds codes that are no numbers (0x7f or 0xff): download the checkpoint again")
        scale, n, k = stored[self.scale], len(stored["weight"]), codes.shape[1]
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale  # one number: [1] or no dimension
        height, width = (_extent(size, count) for size, count in zip((n, k), scale.shape, strict=True))
        of_rows = torch.arange(rows.start, rows.stop, device=scale.device) // height
        of_groups = torch.arange(0, k, group, device=scale.device) // width
        return codes, scale[of_rows][:, of_groups], None

    def scale_rows(self, n: int, scale: Shape) -> int:
        return 1 if _extent(n, scale[0] if scale else 1) == 1 else BLOCK


def _extent(size: int, count: int) -> int:
    """Rows or columns that share each of `count` scales of a dimension: all, one or BLOCK of them."""
    return size if count == 1 else 1 if count == size else BLOCK


class Fp8(_Float8):
    """Qwen's fp8: a scale for every block of 128 x 128, called the inverse of what it is."""

    name, scale = "fp8", "weight_scale_inv"

    def tensors(self, n: int, k: int, group: int) -> Wanted:
        return {"weight": (_F8, ((n, k),)), self.scale: (("BF16", "F32"), (_blocks(n, k),))}


class FloatQuantized(_Float8):
    """compressed-tensors in 8 bits: a scale for a row, for every block, or one for all."""

    name, scale = "float-quantized", "weight_scale"

    def tensors(self, n: int, k: int, group: int) -> Wanted:
        shapes = (n, 1), (n,), (1,), (1, 1), (), _blocks(n, k)
        return {"weight": (_F8, ((n, k),)), self.scale: (_SCALES, shapes)}


def _blocks(n: int, k: int) -> Shape:
    return -(-n // BLOCK), -(-k // BLOCK)


class Awq(Form):
    """AWQ: words along N in an order of their own, everything transposed."""

    name, format, scale, by_group = "awq", Format.INT4, "scales", 0

    def tensors(self, n: int, k: int, group: int) -> Wanted:
        by_group = k // group
        return {
            "qweight": (_I32, ((k, -(-n // 8)),)), "qzeros": (_I32, ((by_group, -(-n // 8)),)),
            "scales": (_SCALES, ((by_group, n),)),
        }  # fmt: skip

    def has_zeros(self, names: frozenset[str]) -> bool:
        return True

    def read(self, stored: Mapping[str, Tensor], rows: range, group: int) -> Numbers:
        words, mine = _words(rows), slice(rows.start, rows.stop)
        codes = nibbles(stored["qweight"][:, words], AWQ_ORDER).t()[: len(rows)]
        zero = nibbles(stored["qzeros"][:, words], AWQ_ORDER).t()[: len(rows)]
        return codes.contiguous(), stored["scales"][:, mine].t(), zero


@dataclass(frozen=True)
class Gptq(Form):
    """GPTQ: codes packed along K, zero points along N, minus one in the older files (15 is 16). Symmetric
    files hold zero points too, all the same."""

    zeros_less_one: bool
    symmetric: bool
    name, format, scale, by_group = "gptq", Format.INT4, "scales", 0

    def tensors(self, n: int, k: int, group: int) -> Wanted:
        by_group = k // group
        return {
            "qweight": (_I32, ((k // 8, n),)), "qzeros": (_I32, ((by_group, -(-n // 8)),)),
            "scales": (_SCALES, ((by_group, n),)), "g_idx": (_I32, ((k,),)),
        }  # fmt: skip

    def has_zeros(self, names: frozenset[str]) -> bool:
        return not self.symmetric

    def read(self, stored: Mapping[str, Tensor], rows: range, group: int) -> Numbers:
        mine = slice(rows.start, rows.stop)
        codes, scale = nibbles(stored["qweight"][:, mine].t()), stored["scales"][:, mine].t()
        zero = nibbles(stored["qzeros"][:, _words(rows)]).t()[: len(rows)] + self.zeros_less_one
        if not self.symmetric:
            return codes, scale, zero
        if (zero != SYMMETRIC).any():
            raise InputError(
                f"has zero points other than {SYMMETRIC} though config.json calls it symmetric: set `sym` "
                "and `checkpoint_format` to what the file was written with"
            )
        return codes, scale, None


class PackQuantized(Form):
    """compressed-tensors in 4 bits: codes are values plus 8, packed along K; zero points along N."""

    name, format, scale, by_group = "pack-quantized", Format.INT4, "weight_scale", 1
    optional = ("weight_zero_point", "weight_g_idx")

    def tensors(self, n: int, k: int, group: int) -> Wanted:
        by_group = k // group
        return {
            "weight_packed": (_I32, ((n, k // 8),)), "weight_scale": (_SCALES, ((n, by_group),)),
            "weight_shape": (("I64", "I32"), ((2,),)), "weight_zero_point": (_I32, ((-(-n // 8), by_group),)),
            "weight_g_idx": (_I32, ((k,),)),
        }  # fmt: skip

    def has_zeros(self, names: frozenset[str]) -> bool:
        return "weight_zero_point" in names

    def read(self, stored: Mapping[str, Tensor], rows: range, group: int) -> Numbers:
        mine = slice(rows.start, rows.stop)
        zero = None
        if "weight_zero_point" in stored:
            zero = nibbles(stored["weight_zero_point"][_words(rows)].t()).t()[: len(rows)]
        return nibbles(stored["weight_packed"][mine]), stored["weight_scale"][mine], zero
