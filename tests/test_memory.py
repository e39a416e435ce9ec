"""Weights, caches and passes that memory does not hold are refused in one line with the size."""

from __future__ import annotations

import pytest
import torch
from small import small_model
from tiny_folder import write_tiny

from qwen3_model import InputError, Qwen3, checkpoint

# as torch words them on a CPU and on a GPU
ERRORS = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 12884901888 bytes. Error code 12 (Cannot allocate memory)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.0 GiB. GPU 0 has a total capacity of"),
    MemoryError("Unable to allocate 12.0 GiB for an array"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("memory") / "tiny")


def raising(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "cuda", "numpy"])
def test_weights(tiny, monkeypatch, error):
    load, calls = checkpoint.load_into, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        return load(*args, **kwargs) if len(calls) == 1 else raising(error)()

    monkeypatch.setattr(checkpoint, "load_into", second_fails)
    with pytest.raises(InputError, match=r"KiB of weights in float32, does not fit .*\(12.0 GiB .*smaller"):
        Qwen3.from_pretrained(tiny, device="cpu")


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "cuda", "numpy"])
@pytest.mark.parametrize("strategy", ["autoregressive", "two-pass"])
def test_a_pass(monkeypatch, error, strategy):
    model = small_model()
    monkeypatch.setattr(Qwen3, "states", raising(error))
    with pytest.raises(InputError, match=r"a pass of this text does not fit into memory \(12.0 GiB"):
        model.generate([5, 6], strategy, max_new_tokens=4)


def test_another_error_of_a_pass_is_not_hidden(monkeypatch):
    monkeypatch.setattr(Qwen3, "states", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        small_model().generate([5, 6], max_new_tokens=4)


def test_a_cache(monkeypatch):
    with pytest.raises(InputError, match=r"a cache for 1099511627776 positions takes \d+.0 GiB"):
        small_model().new_cache(2**40)
