"""Shared by the suite: fresh memory poisoned with NaN, a hypothesis profile
without deadlines.
"""

from __future__ import annotations

import gc
import signal

import interpreter  # before anything that imports triton
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "orthrus", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("orthrus")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a command that a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # a worker a core: matrices this small gain nothing from a second thread


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What collection makes, modules and tests, stays to the end: nobody looks for garbage there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def farewells():
    """SIGTERM and SIGHUP as a shell's command gets them; under nohup the latter is ignored."""
    numbers = signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys):
    """Calls a command that must end with one line on stderr, exit code 2 and nothing on stdout: that line."""

    def call(main, *arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), (ended.value.code, out, err)
        return err

    return call


@pytest.fixture(autouse=True)
def order_of_programs():
    """A test's launches have the same orders of programs whatever ran before it."""
    interpreter.order.restart()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN in every test, so that reading what nobody wrote shows. (The debug mode is
    `use_deterministic_algorithms` without its import of torch's compiler, a second of each process.)"""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.set_deterministic_debug_mode(before[1])
