"""Stacks of linears without a GPU: what is compared, how a difference shows, and the table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE

from bench import linears
from bench.linears import Calls, Stack, Sustained
from bench.measure import Pool
from bench.models import Shape

TOY = Shape(layers=2, E=64, H=2, F=40, G=1, D=16, V=90)
ON_THE_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="what is done where there is no GPU")


@pytest.fixture
def pool():
    return Pool(torch.device(DEVICE), 1 << 18)


@pytest.mark.parametrize(("rows", "n_ar"), [(5, 5), (7, 3)])
def test_every_linear_of_every_layer_is_compared(rows, n_ar, pool):
    stack = Stack(TOY, rows, n_ar, pool)
    triton, ours, cublas = (stack.calls(form, pdl=False) for form in ("Triton", "Gluon", "cuBLAS"))
    assert stack.different(ours, triton) == (8, 0)

    def wrong(x, *of, out):
        ours.linear(x, *of, out=out)
        out[-1, 0] += 1
        return out

    assert stack.different(Calls(wrong, ours.swiglu), triton) == (8, 6), "all but gate and up"
    assert [len(weights) for weights in stack.layers[0].values()] == [1 + (n_ar < rows)] * 2 + [1, 1]
    stack.run(triton)
    kept = {name: out.clone() for name, out in stack.outputs.items()}
    stack.run(cublas)
    for name in ("qkv", "o", "down"):
        torch.testing.assert_close(stack.outputs[name], kept[name], atol=0.1, rtol=0.02)
    assert stack.in_gluon() == "0 of 4"


def test_weights_come_again_where_the_pool_ends():
    small = Pool(torch.device(DEVICE), 1 << 16)
    stack = Stack(replace(TOY, layers=9), 5, 5, small)
    first = {weights[0].pointer.data_ptr() for layer in stack.layers for weights in layer.values()}
    assert len(stack.layers) == 9 and len(first) < 9 * 4


@ON_THE_CPU
def test_a_whole_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(linears.MODELS, "toy", TOY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(linears, "machine", lambda said: {"gpu": "fake"})
    monkeypatch.setattr(linears, "Pool", lambda device, size: Pool(torch.device("cpu"), 1 << 20))
    monkeypatch.setattr(linears, "compile_ahead", lambda *of: 3)
    monkeypatch.setattr(linears, "pdl_kinds", lambda device: ())
    times = iter(Sustained(ms, 1500.0, 690.0) for ms in [3.0, 4.0, 3.5] * 2)
    monkeypatch.setattr(linears, "sustained", lambda call: next(times))
    out = tmp_path / "l.json"
    assert linears.main(["--models", "toy", "--rows", "5", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "16 linears compared, 0 differ" in said and "8: equal" in said and "0.875" in said
    first, mixed = json.loads(out.read_text())["results"]
    assert (first["rows"], mixed["rows"]) == ("5", "33 + 144") and first["times"]["Gluon"]["watt"] == 690
    monkeypatch.setattr(Stack, "different", lambda self, ours, theirs: (8, 1))
    monkeypatch.setattr(linears, "sustained", lambda call: Sustained(1.0, None, None))
    assert linears.main(["--models", "toy", "--rows", "5"]) == 1
    assert "8: 1 differ" in capsys.readouterr().out
    monkeypatch.setenv("ORTHRUS_GLUON", "off")
    with pytest.raises(SystemExit):
        linears.main(["--models", "toy"])
    assert "leave it out" in capsys.readouterr().err


@ON_THE_CPU
def test_it_needs_a_gpu(refused):
    assert "none here" in refused(linears.main)
    assert "more than 4096" in refused(linears.main, "--rows", "5000")
