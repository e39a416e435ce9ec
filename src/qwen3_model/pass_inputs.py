"""What a forward pass reads besides weights and cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from orthrus_kernels import MaskedRows, PackedRows, Rows


@dataclass(frozen=True)
class PassInputs:
    """What a pass reads besides weights and cache, on one device."""

    ids: Tensor  # [2, T] int64: tokens, positions
    rows: Rows | PackedRows | MaskedRows  # as the backend's attention takes them
    n_ar: int
    logits_of: Tensor | None  # int64 indices of the rows whose logits are wanted; None: all

    def on(self, device: torch.device) -> PassInputs:
        """A copy on a device."""
        rows = self.rows if isinstance(self.rows, Rows) else self.rows.on(device)
        wanted = None if self.logits_of is None else self.logits_of.to(device)
        return replace(self, ids=self.ids.to(device), rows=rows, logits_of=wanted)

    def copy_into(self, other: PassInputs) -> None:
        """Put the numbers of this pass into the tensors of another one of its shape."""
        assert isinstance(self.rows, PackedRows) and isinstance(other.rows, PackedRows)
        other.ids.copy_(self.ids, non_blocking=True)
        other.rows.table.copy_(self.rows.table, non_blocking=True)
