"""Backends: the same names and signatures, and every kernel in its place."""

import dataclasses
import inspect

import pytest

from orthrus_kernels.backends import Ops, backend_ops


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Ops)])
def test_a_kernel_takes_what_its_twin_takes(field):
    twin, kernel = (getattr(backend_ops(name), field) for name in ("reference", "triton"))
    wanted = list(inspect.signature(twin).parameters.values())
    got = list(inspect.signature(kernel).parameters.values())
    assert [(p.name, p.default) for p in got[: len(wanted)]] == [(p.name, p.default) for p in wanted]
    assert all(p.kind is p.KEYWORD_ONLY for p in got[len(wanted) :])


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'cuda'"):
        backend_ops("cuda")
