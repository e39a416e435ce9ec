"""What a forward pass reads besides weights and cache."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from orthrus_kernels import MaskedRows, PassPlan, PassTables


@dataclass(frozen=True)
class PassInputs:
    """What a pass reads besides weights and cache, on one device."""

    plan: PassPlan
    tables: PassTables | MaskedRows  # as the backend's attention takes them
    logits_of: Tensor | None  # int64 indices of the rows whose logits are wanted; None: all

    def put(self, plan: PassPlan) -> None:
        """The numbers of another plan of this shape in place of those here."""
        assert plan.shape == self.plan.shape, (plan.shape, self.plan.shape)
        for field in fields(plan):
            if field.name != "shape":
                getattr(self.plan, field.name).copy_(getattr(plan, field.name), non_blocking=True)
