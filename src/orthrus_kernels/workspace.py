"""Scratch memory of a device that launches share: partial sums, and counters of the programs that arrived."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """Partial sums of launches that follow one another on one stream, and their arrival counters."""

    partials: Tensor  # fp32
    counters: Tensor  # int32, zero between launches

    @staticmethod
    def new(device: torch.device, partials: int = 1 << 24, counters: int = 1 << 15) -> Workspace:
        """64 MiB by default: what does not fit runs its segments one after another, with the same bits."""
        return Workspace(
            torch.empty(partials, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )

    def fits(self, tiles: int, partials: int) -> bool:
        """Whether it has a counter for each of so many tiles, and room for so many numbers."""
        return tiles <= self.counters.numel() and partials <= self.partials.numel()


_workspaces: dict[torch.device, Workspace] = {}


def workspace(device: torch.device) -> Workspace:
    """The device's shared workspace, made on first use. Launches that share it must not overlap: one stream.
    Dependent launches (pdl.py) touch it after they have waited.

    Raises RuntimeError when first asked for during the capture of a CUDA graph: run the launch once
    before."""
    if device not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("run once before the capture, so that the workspace of the device exists")
        _workspaces[device] = Workspace.new(device, *((1 << 18, 1 << 10) if device.type == "cpu" else ()))
    return _workspaces[device]
