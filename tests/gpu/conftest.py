"""Tests of whole models and full sizes, compiled; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels():
    """Needed by every test of this folder, before any model is built."""
    if DEVICE != "cuda" or not torch.cuda.is_available():
        pytest.skip("needs a GPU and compiled kernels")


@pytest.fixture(params=["poisoned memory", "early starts"])
def memory(request, poisoned_memory):
    """Once without poison: filling fresh memory between two kernels keeps the second from starting early."""
    if request.param == "early starts":
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = False
