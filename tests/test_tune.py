"""Tuning without a GPU: candidates stay in the reduction class, the choice, the table that is written."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from interpreter import DEVICE
from strategies import hard

from bench import tune, tune_gluon, tune_wide
from bench.measure import Pool, Timing
from bench.models import Shape
from orthrus_kernels import Weight, tables
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.tables.gluon import GluonTile

DEVICE_KEY = "sm_90"


def weight(name="o"):
    return next(w for w in tune.weights(["8B"], DEVICE_KEY) if w.names == (f"8B {name}",))


def test_models_share_weights_of_one_shape():
    got = {(w.n, w.k): w.names for w in tune.weights(["0.6B", "1.7B", "8B"], DEVICE_KEY)}
    assert len(got) == 15 and got[4096, 4096] == ("8B o",)


@pytest.mark.parametrize("rows", [rows for _, rows in tune.BUCKETS])
def test_candidates_take_any_rows_and_fit(rows):
    for w in tune.weights(["8B", "1.7B"], DEVICE_KEY):
        tiles = tune.candidates(w.entry, rows)
        assert tiles[0] == replace(w.entry.tile(rows), rows=None) and len(set(tiles)) == len(tiles) > 10
        for tile in tiles[1:]:
            assert tile.rows is None and not (tile.split and w.entry.segments == 1)
            assert tile.block_t % 3 or tile.tma
            assert (tile.block_n + tile.block_t) * w.entry.block_k * 2 * tile.stages <= 227 * 1024


def test_a_class_is_kept_unless_asked():
    w = weight()
    own = w.entry.block_k, w.entry.segments
    assert tune.classes(w, False) == [own]
    other = tune.classes(w, True)
    assert other[0] == own and (128, 8) in other and len(other) == len(set(other)) == 8


def test_candidates_have_the_bits_of_one_row_alone():
    """The comparison itself, on one small weight and a few tiles; and a tile of another class is found."""
    entry = LinearEntry(32, 2, (LinearTile(None, 16, 64, True, 4, 3),))
    x, w = hard("heavy", 20, 88).to(DEVICE), Weight(hard("normal", 40, 88, seed=1).to(DEVICE))
    tiles = [*entry.tiles, LinearTile(None, 32, 64, False, 4, 3), LinearTile(None, 16, 32, True, 4, 2)]
    assert tune.differing(x, w, entry, tiles) == {}
    impossible = replace(tiles[0], block_t=17)
    assert list(tune.differing(x, w, entry, [*tiles, impossible])) == [impossible]


def test_other_bits_are_found(monkeypatch):
    tiles = [LinearTile(None, 16, 64, True, 4, 3), LinearTile(None, 32, 64, True, 4, 3)]

    def launch(x, w, entry):
        return x + (len(x) > 5 and entry.tiles[0].block_t == 32)

    monkeypatch.setattr(tune, "linear_triton", launch)
    found = tune.differing(torch.zeros(40, 4), Weight(torch.zeros(3, 4)), LinearEntry(64, 1, ()), tiles)
    assert list(found) == tiles[1:] and found[tiles[1]].startswith("DIFFERENT BITS in 4 of 6")


A, B = LinearTile(None, 16, 64, True, 4, 3), LinearTile(None, 32, 64, True, 4, 3)


@pytest.mark.parametrize(
    "timed, chosen",
    [
        ({(64, 2): {8: {A: 10.0, B: 9.9}}}, ((64, 2), {8: A})),  # within 2 %: stays
        ({(64, 2): {8: {A: 10.0, B: 9.0}}}, ((64, 2), {8: B})),
        ({(64, 2): {8: {B: 9.0}}}, ((64, 2), {8: B})),  # the committed one failed
        ({(64, 2): {8: {A: 10.0}}, (64, 4): {8: {A: 9.9}}}, ((64, 2), {8: A})),
        ({(64, 2): {8: {A: 10.0}}, (64, 4): {8: {A: 8.0}}}, ((64, 4), {8: A})),
        ({(64, 2): {8: {}}, (64, 4): {8: {A: 80.0}}}, ((64, 4), {8: A})),
    ],
)
def test_the_choice(timed, chosen):
    assert tune.choose(timed, (64, 2), {8: A}) == chosen


def test_the_committed_table_is_as_tuning_writes_it():
    """Reading and writing it changes no character, and one weight's row is one line."""
    text = tune.TABLE.read_text()
    rows = json.loads(text)
    assert tune.table_text(rows) == text and tune.merged(rows, rows[3:5]) == rows


def test_a_written_table_is_read_back(monkeypatch, tmp_path):
    w = weight("qkv")
    assert w.entry.apart is not None
    chosen = {rows: tune.candidates(w.entry, rows)[-1] for _, rows in tune.BUCKETS}
    row = tune.table_row(w, DEVICE_KEY, (64, 2), chosen, "here")
    new = row | {"device": "sm_99"}
    rows = tune.merged(json.loads(tune.TABLE.read_text()), [row, new])
    (tmp_path / "linear.json").write_text(tune.table_text(rows))
    monkeypatch.setattr(tables.resources, "files", lambda package: tmp_path)
    got, before = tables.linear_entries.__wrapped__(), tables.linear_entries()
    assert len(got) == len(before) + 1
    entry = got[w.n, w.k, torch.bfloat16, DEVICE_KEY]
    assert (
        entry.measured == "here"
        and entry.apart == w.entry.apart
        and [t.rows for t in entry.tiles] == [b for b, _ in tune.BUCKETS]
    )
    for limit, rows_measured in tune.BUCKETS:
        assert replace(entry.tile(limit or 5000), rows=None) == chosen[rows_measured]
    untouched = {k: v for k, v in got.items() if k[:2] != (w.n, w.k)}
    assert untouched == {k: v for k, v in before.items() if k[:2] != (w.n, w.k)}


@pytest.mark.skipif(DEVICE != "cpu", reason="what is said where there is no GPU")
def test_tuning_needs_a_gpu(refused, tmp_path):
    assert "there is none here" in refused(tune.main, "--out", str(tmp_path / "t.json"))
    assert not list(tmp_path.iterdir())


class FakeMeter:
    """Says that each later candidate is faster, and runs nothing."""

    def __init__(self, pool, seconds):
        self.pool, self.now = pool, 1e6

    def time(self, call, copies):
        self.now /= 1.1
        return Timing(self.now, self.now, self.now)


def test_a_class_and_tiles_in_gluon_are_not_tuned_together(refused):
    assert "--new-class is of --kinds triton" in refused(tune.main, "--new-class")


def test_a_whole_run(monkeypatch, tmp_path, capsys):
    """`main` as on a GPU with two toy weights' shapes: the table has their entries, every class kept."""
    toy = Shape(layers=1, E=64, H=2, F=40, G=1, D=16, V=90)
    monkeypatch.setitem(tune.MODELS, "toy", toy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tables, "device_key", lambda device: DEVICE_KEY)
    monkeypatch.setattr(tune, "machine", lambda said: {"gpu": "fake", "triton": "3", "date": "d"})
    monkeypatch.setattr(tune, "in_processes", lambda *arguments: [])
    monkeypatch.setattr(tune, "hard_rows", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(tune, "differing", lambda x, w, entry, tiles: {tiles[-1]: "DIFFERENT BITS in 1"})
    monkeypatch.setattr(tune, "Pool", lambda device, size: Pool(torch.device("cpu"), 1 << 18))
    monkeypatch.setattr(tune, "Meter", FakeMeter)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **how: empty(*shape, **how))
    out, figures = tmp_path / "t.json", tmp_path / "f.json"
    options = ["--models", "toy", "--kinds", "triton", "--out", str(out), "--json", str(figures)]
    assert tune.main(options) == 1, "a candidate differed: the exit code says so"
    assert "gave other bits" in capsys.readouterr().out
    before = json.loads(tune.TABLE.read_text())
    rows = json.loads(out.read_text())
    assert rows[: len(before)] == before and len(rows) == len(before) + 5
    for row in rows[len(before) :]:
        entry = tables.default_entry(row["n"], row["k"], torch.bfloat16)
        assert (row["block_k"], row["segments"]) == (entry.block_k, entry.segments)
        assert row["measured"] == "fake, triton 3, d: bench.tune" and len(row["tiles"]) == len(tune.BUCKETS)
    assert json.loads(figures.read_text())["times"][0]["tile"]["block_t"] == 16


ONE, TWO = GluonTile(16, 1), GluonTile(16, 2)
MORE = GluonTile(32, 1)


@pytest.mark.parametrize(
    "us, triton, chosen",
    [
        ({16: {ONE: 5.0, TWO: 4.0}, 32: {MORE: 6.0}}, {16: 6.0, 32: 7.0}, [TWO, MORE]),
        ({16: {ONE: 5.0}, 32: {MORE: 8.0}}, {16: 6.0, 32: 7.0}, [ONE]),  # Triton is faster from there on
        ({16: {ONE: 6.1}, 32: {MORE: 1.0}}, {16: 6.0, 32: 7.0}, [ONE, MORE]),  # by 1.7 %: noise
        ({16: {ONE: 6.2}, 32: {MORE: 1.0}}, {16: 6.0, 32: 7.0}, []),
        ({16: {}, 32: {MORE: 1.0}}, {16: 6.0, 32: 7.0}, []),  # none has the bits
    ],
)
def test_the_choice_in_gluon(us, triton, chosen):
    assert tune_gluon.chosen(us, triton) == chosen


def test_a_line_without_narrow_tiles_begins_behind_them():
    """Else a token's one row would take a wide tile. A line without any goes."""
    found = tune_gluon.Tuned(64, 40)
    row = found.row("sm_90", "here", {"least": 17, "wide": [[32, 1]], "wide_measured": "elsewhere"})
    assert row is not None and (row["least"], row["tiles"], row["measured"]) == (257, [], None)
    assert found.row("sm_90", "here", {"least": 17}) is None


def test_a_tile_gives_way_to_a_wide_one():
    """Which runs in its place with so many rows, as Triton's kernel would."""
    meter = FakeMeter(Pool(torch.device("cpu"), 1 << 18), 0.1)
    tuner = tune_gluon.Tuner(64, 40, ["toy o"], meter, torch.device("cpu"), [GluonTile(32, 1)])
    took = {None: 9.0, tuner.wide[0]: 5.0}
    tuner.timed = lambda plan, rows, n_ar=None: took[plan]
    assert tuner.other(64) == 5.0
    tuner.wide.clear()
    assert tuner.other(64) == 9.0


class RisingMeter(FakeMeter):
    """Says that each later candidate is slower."""

    def time(self, call, copies):
        call(copies - 1)
        self.now *= 1.1
        return Timing(self.now, self.now, self.now)


@pytest.mark.skipif(DEVICE != "cpu", reason="with a fake of a kernel that runs on a GPU alone")
@pytest.mark.parametrize("wrong", [False, True])
def test_a_whole_run_in_gluon(wrong, monkeypatch, tmp_path, capsys):
    """The first candidate is the fastest; with `wrong` all of one and three groups have other bits."""

    def fake(plan, x, *views, out, **how):
        if plan.swiglu:
            linear_swiglu_triton(x, views[0], out=out)
        else:
            linear_triton(x, *views, out=out)
        if wrong and plan.tile.groups != 2:
            out[-1, -1] = 7
        return out

    monkeypatch.setitem(tune.MODELS, "toy", Shape(layers=1, E=64, H=2, F=40, G=1, D=16, V=90))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tables, "device_key", lambda device: DEVICE_KEY)
    monkeypatch.setattr(tune, "machine", lambda said: {"gpu": "fake", "triton": "3", "date": "d"})
    monkeypatch.setattr(tune, "Pool", lambda device, size: Pool(torch.device("cpu"), 1 << 18))
    monkeypatch.setattr(tune, "Meter", RisingMeter)
    monkeypatch.setattr(tune, "compile_all", lambda *of: None)
    monkeypatch.setattr(tune, "missing", sorted)
    monkeypatch.setattr(tune, "recorded", lambda: nullcontext(set()))
    monkeypatch.setattr(tune, "GLUON_ROWS", (16, 32))
    monkeypatch.setattr(tune_gluon, "ROWS", (16, 32))
    monkeypatch.setattr(tune_gluon, "MIXED", (9, 20))
    monkeypatch.setattr(tune_gluon, "MIXED_TILES", (16, 32))
    monkeypatch.setattr(tune_gluon, "linear_gluon", fake)
    kept = {"wide": [[32, 1]], "wide_measured": "elsewhere"}
    of_down = {"n": 64, "k": 40, "dtype": "bfloat16", "device": DEVICE_KEY, "least": 9, **kept}
    before, table = json.loads(tune.GLUON.read_text()), tmp_path / "before.json"
    table.write_text(json.dumps([of_down, *before]))
    monkeypatch.setattr(tune, "GLUON", table)
    monkeypatch.setattr(tune_gluon, "linear_gluon_wide", fake)
    out = tmp_path / "g.json"
    code = tune.main(["--models", "toy", "--kinds", "gluon", "--gluon-out", str(out)])
    rows = json.loads(out.read_text())
    assert rows[: len(before)] == before and len(rows) == len(before) + 4, "the head runs in Triton"
    for row in rows[len(before) :]:
        assert row["tiles"] == [[16, 1 + wrong], [32, 1 + wrong]] and row["measured"].endswith("bench.tune")
        mine = (row["n"], row["k"]) == (64, 40)
        assert {name: row.get(name) for name in kept} == (kept if mine else dict.fromkeys(kept))
        assert row.get("least") == (9 if mine else None)
    said = capsys.readouterr().out
    assert code == wrong and ("DIFFERENT BITS" in said) is wrong
    pairs = [pair for row in rows[len(before) :] for pair in row["both"]]
    assert not wrong or all(ar[1] == 2 for ar, _ in pairs)


@pytest.mark.skipif(DEVICE != "cpu", reason="with a fake of a kernel that runs on a GPU alone")
@pytest.mark.parametrize("wrong", [False, True])
def test_wide_tiles(wrong, monkeypatch, tmp_path, capsys):
    """Those near the fewest clocks are timed, and what the table takes; one with other bits is named."""

    def fake(plan, x, weight, *, out, programs=None):
        (linear_swiglu_triton if plan.swiglu else linear_triton)(x, weight, out=out)
        if wrong and plan.tile.groups == 1:
            out[-1, -1] = 7
        return out

    monkeypatch.setitem(tune.MODELS, "toy", Shape(layers=1, E=64, H=2, F=40, G=1, D=16, V=90))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tables, "device_key", lambda device: "sm_90")
    monkeypatch.setattr(tune_wide, "HAS_GLUON", True)
    monkeypatch.setattr(tune_wide, "machine", lambda said: {"gpu": "fake", "triton": "3", "date": "d"})
    monkeypatch.setattr(tune_wide, "machine_line", lambda facts: "fake")
    monkeypatch.setattr(tune_wide, "Pool", lambda device, size: Pool(torch.device("cpu"), 1 << 18))
    monkeypatch.setattr(tune_wide, "Meter", RisingMeter)
    monkeypatch.setattr(tune_wide, "compile_all", lambda *of: None)
    monkeypatch.setattr(tune_wide, "missing", sorted)
    monkeypatch.setattr(tune_wide, "recorded", lambda: nullcontext(set()))
    monkeypatch.setattr(tune_wide, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(tune_wide, "HEIGHTS", (16, 32))
    monkeypatch.setattr(tune_wide, "linear_gluon_wide", fake)
    out = tmp_path / "wide.json"
    assert tune_wide.main(["--models", "toy", "--rows", "40", "--json", str(out)]) == wrong
    figures = json.loads(out.read_text())
    assert [of["name"] for of in figures["times"]] == [
        f"toy {name}" for name in ("qkv", "o", "gate_up", "down")
    ]
    for of in figures["times"]:
        tried = [name for name in of["us"] if " x " in name]
        assert tried and list(of["us"])[:2] == ["cuBLAS", "Triton"], of
        assert not wrong or all(name.endswith("x 2") or name.endswith("x 3") for name in tried), of
    assert ("DIFFERENT BITS" in capsys.readouterr().out) is wrong is bool(figures["dropped"])


def test_the_committed_table_of_gluon_is_as_tuning_writes_it():
    text = tune.GLUON.read_text()
    assert tune.table_text(json.loads(text)) == text
