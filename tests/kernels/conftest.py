"""Kernel tests run where they can: compiled on a GPU, in the repaired interpreter elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import DEVICE

from orthrus_kernels import attention_triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def triton_cache(request, tmp_path_factory) -> Path:
    """Triton's cache for kernels that are compiled ahead of time. pytest keeps it from run to run, so that
    only what has changed is compiled; `pytest --cache-clear` empties it."""
    if request.config.pluginmanager.has_plugin("cacheprovider"):
        return request.config.cache.mkdir("triton")
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="session", autouse=True)
def cheap_folds():
    """The interpreter pays for every unrolled step of attention's folds and for programs without items; how
    many there are changes no bit (test_attention_kernels.py::test_partials_in_flight_do_not_touch_the_bits,
    test_a_rows_bits_depend_on_neither_programs_nor_padding_nor_capacity)."""
    if DEVICE == "cpu":
        attention_triton.COMBINE_UNROLL = attention_triton.FUSED_UNROLL = 1
        attention_triton.PROGRAMS = 8
