"""Inputs of the kernel tests, on the device and in the dtype under test."""

from __future__ import annotations

import torch
from hypothesis import Phase, settings
from strategies import hard

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def given_rows(
    kind: str, *shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """`hard` inputs; in fp16 the large ones scaled by 2^-8, or they would pass its largest number, 65504."""
    x = hard(kind, *shape, seed=seed)
    return (x / 256 if dtype == torch.float16 and kind != "normal" else x).to(device, dtype)


def examples(count: int) -> settings:
    """Few examples, and none shrunk: an interpreted one takes 0.1 s or more, shrinking one many minutes."""
    return settings(max_examples=count, phases=(Phase.explicit, Phase.reuse, Phase.generate))
