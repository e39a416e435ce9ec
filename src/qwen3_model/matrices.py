"""The memory of a model's weights: each matrix in the form that its checkpoint stores it in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus_kernels import Weight
from orthrus_kernels.quantised import QuantisedWeight, can_round
from orthrus_kernels.weight import AnyWeight

from .quantised.slot import Slot
from .quantised.stored import FindStored, StoredWeight, kind_of

Part = Tensor | Slot  # what a checkpoint's tensors are copied into, or repacked into
Stack = Mapping[str, int]  # modules that one product multiplies by -> rows of each


@dataclass(frozen=True)
class Matrices:
    """Makes the weights of a model and names their parts. stored: which modules are quantised."""

    device: torch.device
    dtype: torch.dtype  # of plain weights, and of the rows that all weights multiply
    stored: FindStored
    rounds: bool = False  # whether weights that can do so round their rows to 8 bits

    def vector(self, size: int) -> Tensor:
        """A plain tensor [size], not filled in."""
        return torch.empty(size, device=self.device, dtype=self.dtype)

    def matrix(self, stack: Stack, k: int) -> AnyWeight:
        """A weight [rows of the stack, k], not filled in. Raises InputError for tensors that do not fit, and
        where the modules of the stack are not stored alike."""
        n, stored = sum(stack.values()), self._stored(stack, k)
        kind = kind_of(stored)
        if kind is None:
            return Weight(torch.empty(n, k, device=self.device, dtype=self.dtype))
        format, zeros = kind.in_memory
        return QuantisedWeight.new(
            n, k, format, kind.group, zeros=zeros, scale=kind.scale, dtype=self.dtype, device=self.device,
            factor_rows=_factor_rows([part for _, part in stored if part is not None]),
            rounds=self.rounds and can_round(format, kind.group),
        )  # fmt: skip

    def parts(self, matrix: AnyWeight, stack: Stack) -> Iterator[tuple[str, Part]]:
        """The official names of a weight's modules, each with its part of the memory."""
        if isinstance(matrix, Weight):
            yield from zip(map(_name, stack), matrix.parts(*stack.values()), strict=True)
            return
        first = 0
        for module, stored in self._stored(stack, matrix.shape[1]):
            assert stored is not None, module
            yield _name(module), Slot(matrix, first, stored)
            first += stored.n

    def _stored(self, stack: Stack, k: int) -> list[tuple[str, StoredWeight | None]]:
        return [(module, self.stored(module, n, k)) for module, n in stack.items()]


def _factor_rows(stack: Sequence[StoredWeight]) -> int:
    """Rows that share a factor: as many as share a scale, if each part of the stack begins a block there."""
    rows = min(part.scale_rows for part in stack)
    return rows if all(part.n % rows == 0 for part in stack[:-1]) else 1


def _name(module: str) -> str:
    return f"{module}.weight"
