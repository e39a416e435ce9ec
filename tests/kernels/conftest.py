"""Kernel tests run where they can: compiled on a GPU, in the repaired interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)
