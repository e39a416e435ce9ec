"""The clock inside kernels: marks in their order, where there is one."""

import pytest
import torch
from interpreter import DEVICE

from orthrus_kernels._triton import triton
from orthrus_kernels.clock import has_clock, mark, seconds_between


@triton.jit
def _mark_kernel(clock):
    mark(clock, 0)
    mark(clock, 1)


def test_seconds_between_marks():
    assert seconds_between(1_000, 251_000) == pytest.approx(250e-6)
    assert seconds_between(2**31 - 500, -(2**31) + 500) == pytest.approx(1e-6), "past the sign"
    assert seconds_between(-500, 500) == pytest.approx(1e-6), "past 2^32"


def test_the_interpreter_has_no_clock():
    assert not has_clock(torch.device("cpu"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's clock")
def test_marks_go_on():
    assert has_clock(torch.device(DEVICE))
    clock = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    _mark_kernel[(1,)](clock)
    first = clock.tolist()
    _mark_kernel[(1,)](clock)
    second = clock.tolist()
    assert 0 <= seconds_between(*first) < 1e-3 and 0 < seconds_between(first[1], second[0]) < 1
