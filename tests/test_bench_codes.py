"""Tiles of quantised weights, tuned without a GPU: what is compared, the table, and codes without NaN."""

import json
from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE
from test_bench_linears import ON_THE_CPU

from bench import tune_codes
from bench.measure import Timing
from bench.models import Shape
from bench.tune_codes import (
    COMMITTED,
    NAMES,
    Found,
    candidates,
    matrices,
    measure,
    random_weight,
    said,
    scheme_of,
)
from orthrus_kernels.quantised import Format, Scheme
from orthrus_kernels.tables import LinearTile
from qwen3_model.quantising.written import Fp8, Int4

TOY = Shape(2, 128, 2, 256, G=1, D=64, V=64, form=Int4(128))


class Clock:
    """A meter whose times fall: the last way is the fastest."""

    def __init__(self) -> None:
        self.us, self.pool = 100.0, type("Pool", (), {"device": torch.device(DEVICE)})

    def time(self, call, copies):
        call(copies - 1)
        self.us -= 1
        return Timing(self.us, self.us, self.us)


@pytest.fixture
def few(monkeypatch):
    tiles = ((16, 128, True, 4, 2), (16, 64, False, 4, 3))
    monkeypatch.setattr(tune_codes, "CANDIDATES", {1: tiles})


def test_ways_are_compared_and_the_fastest_stands_first(few, monkeypatch):
    of = matrices(TOY, torch.device(DEVICE), copies=2)
    assert [matrix.name for matrix in of] == list(NAMES)
    found = measure("toy", of, 3, Clock(), "sm_90", True)
    found_tiles = candidates(3, of[0].scheme)
    tiles = [said(tile) for tile in found_tiles if tile.at_once == 1]  # the matrices have one group
    assert list(found.us)[:3] == [COMMITTED, *tiles] and not found.wrong and not found.left_out
    lines = found.lines(TOY.layers)
    assert [line[2] for line in lines][:3] == [*reversed(tiles), COMMITTED] and len(lines[0]) == 8
    right = tune_codes.linear_triton

    def wrong(x, weight, *, entry=None):
        y = right(x, weight, entry=entry)
        return y + (entry is not None and entry.tiles[0].block_n == 64)

    monkeypatch.setattr(tune_codes, "linear_triton", wrong)
    found = measure("toy", of[:1], 3, Clock(), "sm_90", True)
    assert found.wrong == [f"toy, 3 rows, qkv, {tiles[1]}"] and tiles[1] not in found.us
    assert found.lines(2)[0][4:] == ["-"] * 4, "a matrix that was not timed"


@pytest.mark.parametrize(
    "scheme", [Scheme(Format.E4M3, 128, False, 128), Scheme(Format.INT4, 128, True)], ids=str
)
def test_random_codes_are_numbers(scheme):
    weight = random_weight(1000, 1024, scheme, torch.device("cpu"))
    assert weight.dense().isfinite().all() and weight.scheme == scheme
    assert len(weight.codes().unique()) == (254 if scheme.format is Format.E4M3 else 16)
    assert len(weight.scale.unique()) > 50 and (weight.zero is None or int(weight.zero.max()) == 16)


def test_schemes_are_those_of_the_models():
    assert scheme_of(replace(TOY, form=Fp8())) == Scheme(Format.E4M3, 128, False, 128)
    w8a8 = replace(TOY, form=Fp8(), activations="fp8")
    assert scheme_of(w8a8) == Scheme(Format.E4M3, 128, False, 128, True)
    assert all(of.copies[0].rounds for of in matrices(w8a8, torch.device("cpu"), copies=1))
    assert scheme_of(TOY) == Scheme(Format.INT4, 128, True)


def test_lines_of_the_table_are_of_the_fastest_tiles_down_to_where_triton_leads():
    of = matrices(TOY, torch.device("cpu"), copies=1)
    gluon, wide = "Gluon, 1 x 16 rows by 128", "Gluon, 2 x 96 rows by 64"
    us = {
        1: {"committed": {"qkv": 9.0, "o": 7.0}, gluon: {"qkv": 8.0, "o": 6.0}},
        32: {"committed": {"o": 5.0}, gluon: {"qkv": 7.0, "o": 6.0}},
        192: {"committed": {"qkv": 9.0, "o": 9.0}, wide: {"qkv": 7.0, "o": 8.0}},
    }
    results = [Found("toy", rows, by) for rows, by in us.items()]
    qkv, o = map(json.loads, tune_codes.table(results, {"toy": of}, "sm_90", "today"))
    line = {"k": 128, "bits": 4, "device": "sm_90", "measured": "today"}
    assert qkv == {"n": of[0].n, "least": 1, "tiles": [[16, 2], [96, 1]], **line}
    assert o == {"n": of[1].n, "least": 33, "tiles": [[96, 1]], **line}


@pytest.mark.parametrize("rows", tune_codes.ROWS)
def test_candidates_are_tiles_by_pointers(rows):
    for scheme in (scheme_of(TOY), scheme_of(replace(TOY, form=Fp8(), activations="fp8"))):
        tiles = candidates(rows, scheme)
        assert len(set(tiles)) == len(tiles) > 3
        assert all(isinstance(of, LinearTile) and not of.tma for of in tiles)


@ON_THE_CPU
def test_a_whole_run(few, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tune_codes.QUANTISED, "toy", TOY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name, real=torch.device: real("cpu"))
    monkeypatch.setattr(tune_codes, "machine", lambda said: {"gpu": "fake", "date": "today"})
    monkeypatch.setattr(tune_codes, "Pool", lambda device, size: None)
    monkeypatch.setattr(tune_codes, "Meter", lambda pool, seconds: Clock())
    monkeypatch.setattr(tune_codes, "rehearse", lambda *of: 3)
    out = tmp_path / "c.json"
    assert tune_codes.main(["--models", "toy", "--rows", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6 kernels" not in printed and "3 kernels compiled" in printed and "The fastest" in printed
    assert "16 x 64, whole" in out.read_text()


@ON_THE_CPU
def test_it_needs_a_gpu(refused):
    assert "none here" in refused(tune_codes.main)
