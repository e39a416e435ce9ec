"""A forward pass: its rows, the tables of its attention, and whose logits are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthrus_kernels import PassPlan


@dataclass(frozen=True)
class Pass:
    """What a forward pass reads besides weights and cache, on the model's device."""

    plan: PassPlan
    tables: Any  # of the plan, as the backend's attention takes them
    logits_of: Tensor | None = None  # [rows] int64, of which the states are wanted; None: of all
