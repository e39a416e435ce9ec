"""Where a quantised weight of a checkpoint goes: rows of a `QuantisedWeight` in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus_kernels.quantised import SYMMETRIC, Format, QuantisedWeight

from ..errors import InputError
from .stored import StoredWeight

CODES_AT_ONCE = 1 << 22  # repacked at a time: each takes about 20 bytes meanwhile
# Tensors that say what must be so: they are read before a byte is copied
SAYING = ("weight_shape", "weight_g_idx", "g_idx")


@dataclass(frozen=True, eq=False)
class Slot:
    """Rows of `weight` from `first` on, for the numbers of a stored weight."""

    weight: QuantisedWeight
    first: int
    stored: StoredWeight

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, K)."""
        return self.stored.n, self.stored.k

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.weight.nbytes_of(self.stored.n)

    @property
    def is_meta(self) -> bool:
        """Whether there is no memory to be filled."""
        return self.weight.words.is_meta

    def numel(self) -> int:
        """Codes."""
        return self.stored.n * self.stored.k

    def check(self, saying: Mapping[str, Tensor]) -> None:
        """Raise InputError unless the tensors of SAYING, by the last part of their names, say what this
        weight is."""
        for tensor, found in saying.items():
            name = f"{self.stored.module}.{tensor}"
            if tensor == "weight_shape":
                if found.tolist() != list(self.shape):
                    raise InputError(f"{name} holds {found.tolist()}; {list(self.shape)} was expected")
            elif not torch.equal(found.long(), torch.arange(self.stored.k) // self.stored.kind.group):
                raise InputError(
                    f"{name} puts columns into other groups than their neighbours (act-order), which is not "
                    "supported: use a checkpoint made with desc_act false (actorder null or static)"
                )

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Repack a stored weight's tensors, by the last part of their names, on the weight's device, some
        rows at a time. Raises InputError for codes that are no numbers."""
        n, k = self.shape
        kind, device = self.stored.kind, self.weight.words.device
        here = {name: tensor.to(device) for name, tensor in tensors.items() if name not in SAYING}
        step = max(CODES_AT_ONCE // k // 8 * 8, 8)
        for first in range(0, n, step):
            rows = range(first, min(first + step, n))
            try:
                codes, scale, zero = kind.form.read(here, rows, kind.group)
            except InputError as error:
                raise InputError(f"{self.stored.module} {error}") from None
            if zero is not None and not self.weight.zeros:
                codes, zero = _eight_bits(codes, zero), None
            self.weight.put(self.first + first, codes, scale, zero)

    def randomise(self, std: float, generator: torch.Generator) -> None:
        """Fill it with random numbers N(0, std^2), rounded to codes."""
        n, k = self.shape
        device, eight = self.weight.words.device, self.weight.format is Format.E4M3
        unit = std / 64 if eight else std / 4
        scale = torch.full((n, k // self.weight.group), unit, device=device)
        codes = torch.empty(n, k, device=device).normal_(0, std / unit, generator=generator)
        if eight:
            codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            codes = (codes.round() + SYMMETRIC).clamp(0, 15).to(torch.uint8)
        zero = None if not self.weight.zeros else torch.full_like(scale, SYMMETRIC, dtype=torch.uint8)
        self.weight.put(self.first, codes, scale, zero)


def _eight_bits(codes: Tensor, zero: Tensor) -> Tensor:
    """Codes of 4 bits [n, K] less their zero points [n, K / group], exactly, as codes of E4M3."""
    numbers = codes.float() - zero.float().repeat_interleave(codes.shape[1] // zero.shape[1], 1)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8)
