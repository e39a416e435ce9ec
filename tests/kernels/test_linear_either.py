"""Which kernel a linear runs in, with fakes of Gluon's, which runs on a GPU alone: the launches that it
takes, the comparison before the first of them, and the switch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from codes import ROUNDED, Coding, random_weight
from strategies import hard

from orthrus_kernels import Weight, backend_ops, tables
from orthrus_kernels.compile_ahead import is_recorded
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_gluon import Plan, linear_gluon, plan_of
from orthrus_kernels.linear_gluon_codes import ROUNDED_ROWS_BEGIN, plans_of, rows_of_launches
from orthrus_kernels.linear_gluon_wide import WidePlan
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.quantised import Format, QuantisedWeight
from orthrus_kernels.rows import new_rows
from orthrus_kernels.switches import gluon_is_on
from orthrus_kernels.tables.gluon import (
    CodedEntry,
    CodedTile,
    GluonEntry,
    GluonTile,
    coded_entries,
    gluon_entries,
)
from orthrus_kernels.workspace import Workspace
from qwen3_model.errors import InputError
from qwen3_model.settings import pick_backend

either = sys.modules["orthrus_kernels.linear_either"]
gluon_table = sys.modules["orthrus_kernels.tables.gluon"]
BF16 = torch.bfloat16
N, K = 128, 64
GROUP = 128  # of codes in Gluon
TILES = GluonTile(16, 1), GluonTile(32, 1)
ENTRY = GluonEntry(TILES, ((GluonTile(16, 1), GluonTile(32, 1)),))


class Fake:
    """In Gluon's place: counts launches, and computes what Triton does, or `wrong` at one place, or fails."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.wrong: torch.Tensor | None = None
        self.fails: Exception | None = None

    def __call__(
        self, plan, x, weight, weight_diff=None, n_ar=None, *, out, space=None, pdl=False, early=True
    ):
        self.plans.append(plan)
        if self.fails:
            raise self.fails
        if plan.swiglu:
            linear_swiglu_triton(x, weight, out=out)
        else:
            linear_triton(x, weight, weight_diff, n_ar, out=out)
        if self.wrong is not None:
            out[-1, -1] = self.wrong
        return out


@pytest.fixture
def fake(monkeypatch):
    """As on an H100 with a table of one weight, in the interpreter; nothing is trusted yet."""
    of = Fake()
    monkeypatch.setattr(either, "linear_gluon", of)
    monkeypatch.setattr(either, "triton_interprets", lambda: False)
    monkeypatch.setattr(either, "_trusted", set())
    monkeypatch.setattr(either, "_distrusted", [])
    monkeypatch.setattr(tables, "device_key", lambda device: "sm_90")
    monkeypatch.setattr(
        sys.modules["orthrus_kernels.linear_gluon"], "gluon_entries", lambda: {(N, K, BF16, "sm_90"): ENTRY}
    )
    return of


def operands(rows: int, n: int = N, k: int = K, dtype: torch.dtype = BF16):
    x = hard("heavy", rows, k).to(dtype)
    return x, *(Weight(hard("normal", n, k, seed=seed).to(dtype)) for seed in (1, 2))


@pytest.fixture
def coded(fake, monkeypatch):
    """The same with tiles of 16 and 32 rows for codes of 4 bits; calls in Gluon's place go to `fake`."""
    of = sys.modules["orthrus_kernels.linear_gluon_codes"]
    table = {(N, 2 * GROUP, 4, "sm_90"): CodedEntry((CodedTile(16, 1, 4), CodedTile(32, 2, 4)))}
    monkeypatch.setattr(of, "coded_entries", lambda rounds: table)
    monkeypatch.setattr(either, "linear_gluon_codes", fake)
    return fake


def words(seed: int, zeros: bool = True, group: int = GROUP, format=Format.INT4):
    return random_weight(Coding(format, group, zeros, BF16), N, 2 * GROUP, seed=seed)


@pytest.mark.parametrize(
    ("rows", "want"), [(1, [(16, 1)]), (17, [(32, 17)]), (32, [(32, 32)]), (33, [(32, 17), (32, 16)]),
                       (64, [(32, 32)] * 2), (70, [(32, 24), (32, 24), (32, 22)])]
)  # fmt: skip
def test_rows_of_codes_are_cut_into_equal_launches(coded, rows, want):
    x = hard("heavy", rows, 2 * GROUP).to(BF16)
    launches = either.launches_of(x, (words(1), None), rows, False, None)
    assert [(of.plan.tile.rows, of.last - of.first) for of in launches] == want
    assert [of.first for of in launches] == [0, *(of.last for of in launches[:-1])]
    assert launches[-1].last == rows
    assert {of.plan.block_k for of in launches} == {GROUP}
    assert torch.equal(either.linear_either(x, words(1)), linear_triton(x, words(1)))
    assert [tiles(plan) for plan in coded.plans[1:]] == [(height,) for height, _ in want], "compared once"


def test_codes_of_both_views_have_launches_of_their_own(coded):
    x, w, w_diff = hard("heavy", 40, 2 * GROUP).to(BF16), words(1), words(2, zeros=False)
    got = either.linear_either(x, w, w_diff, 9)
    assert torch.equal(got, linear_triton(x, w, w_diff, 9))
    assert [tiles(plan) for plan in coded.plans] == [(16,), (32,), (16,), (32,)], (
        "each compared, then each run"
    )
    swiglu = either.linear_swiglu_either(x[:9], w)
    assert torch.equal(swiglu, linear_swiglu_triton(x[:9], w)) and coded.plans[-1].swiglu
    coded.wrong = torch.tensor(0.0)
    either._trusted.clear()
    assert torch.equal(either.linear_either(x, w), linear_triton(x, w)) and "other bits" in either.why_not()


@pytest.mark.parametrize("both", [False, True])
def test_rows_are_rounded_once_for_all_launches(coded, both, monkeypatch):
    """40 rows of one view in two launches: their codes are made at once. Of both views in one and two: the
    seven rows of the first end where no launch on codes can begin."""
    of = sys.modules["orthrus_kernels.linear_gluon_codes"]
    entry = CodedEntry((CodedTile(16, 1, 8, True), CodedTile(32, 2, 8, True)))
    table = {False: {}, True: {(N, 2 * GROUP, 8, "sm_90"): entry}}
    monkeypatch.setattr(of, "coded_entries", table.get)
    rounded, right = [], either.quantise_rows_triton
    monkeypatch.setattr(
        either, "quantise_rows_triton", lambda x, pdl: rounded.append(len(x)) or right(x, pdl=pdl)
    )
    x, (w, w_diff) = (
        hard("heavy", 40, 2 * GROUP).to(BF16),
        [random_weight(ROUNDED, N, 2 * GROUP, seed=i) for i in (1, 2)],
    )
    views = (w, w_diff, 7) if both else (w,)
    assert torch.equal(either.linear_either(x, *views), linear_triton(x, *views))
    heights = [16, 32, 16, 32, 32] if both else [32, 32, 32]
    assert sorted(tiles(plan)[0] for plan in coded.plans) == sorted(heights), "each tile compared"
    assert rounded == ([40, 33] if both else [40])
    assert torch.equal(either.linear_swiglu_either(x[:9], w), linear_swiglu_triton(x[:9], w))
    assert rounded[-1] == 9
    assert either.why_not() == ""


def test_few_rows_run_in_triton(coded, monkeypatch):
    entry = CodedEntry((CodedTile(32, 1, 4),), least=9)
    of = sys.modules["orthrus_kernels.linear_gluon_codes"]
    monkeypatch.setattr(of, "coded_entries", lambda rounds: {(N, 2 * GROUP, 4, "sm_90"): entry})
    w, x = words(1), hard("heavy", 9, 2 * GROUP).to(BF16)
    assert either.launches_of(x[:8], (w, None), 8, False, None) == []
    assert len(either.launches_of(x, (w, None), 9, False, None)) == 1
    assert either.launches_of(x, (w, words(2)), 1, False, None) == [], "then both views do"


def test_other_codes_run_in_triton(coded):
    x = hard("heavy", 9, 2 * GROUP).to(BF16)
    for w in (words(1, group=64), words(1, zeros=False, format=Format.E4M3)):
        assert either.launches_of(x, (w, None), 9, False, None) == []
    assert either.launches_of(x.float(), (words(1), None), 9, False, None) == []
    assert either.launches_of(x, (words(1), Weight(words(1).dense())), 4, False, None) == [], (
        "one view has none"
    )


def tiles(plan: Plan) -> tuple[int, ...]:
    return tuple(tile.rows for tile in plan.tiles)


def test_a_launch_is_compared_once_before_it_runs(fake, monkeypatch):
    x, w, _ = operands(9)
    want = linear_triton(x, w)
    for _ in range(3):
        assert torch.equal(either.linear_either(x, w), want)
    assert [tiles(plan) for plan in fake.plans] == [(16,)] * 4, "one launch on random rows, three on these"
    either.linear_either(operands(20)[0], w)
    assert [tiles(plan) for plan in fake.plans[4:]] == [(32,)] * 2, "another tile is another kernel"
    asked = []
    monkeypatch.setattr(either, "same_bits", lambda launch, pdl: asked.append(pdl) or True)
    for pdl in (False, True, True):
        either.linear_either(x, w, pdl=pdl)
    assert asked == [True], "and so is a dependent launch"


@pytest.mark.parametrize("wrong", [float("nan"), 0.0])
def test_one_bit_that_differs_turns_gluon_off(fake, wrong, capsys):
    """And one line says so, once."""
    fake.wrong = torch.tensor(wrong)
    x, w, _ = operands(9)
    for rows in (9, 9, 20):
        x = operands(rows)[0]
        assert torch.equal(either.linear_either(x, w), linear_triton(x, w))
    said = capsys.readouterr().err
    assert len(fake.plans) == 1 and said.count("\n") == 1
    assert "Triton's linears run" in said and "128x64" in said and "other bits" in said


def test_what_does_not_compile_turns_gluon_off(fake, capsys):
    fake.fails = RuntimeError("no such\ninstruction")
    x, w, _ = operands(9)
    assert torch.equal(either.linear_swiglu_either(x, w), linear_swiglu_triton(x, w))
    assert torch.equal(either.linear_either(x, w), linear_triton(x, w))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "RuntimeError: no such instruction" in said and len(fake.plans) == 1


def test_memory_that_is_short_is_no_reason_to_turn_it_off(fake):
    fake.fails = torch.cuda.OutOfMemoryError("short")
    x, w, _ = operands(9)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        either.linear_either(x, w)
    assert not either._distrusted


def test_views(fake):
    """Together where a pair of tiles holds both, else a launch a view, else Triton's kernel."""
    for rows, n_ar, want in (
        (40, 9, [(16, 32)]), (40, 20, [(32,), (32,)]), (9, 0, [(16,)]), (9, 9, [(16,)]), (70, 20, []),
        (70, 60, []),
    ):  # fmt: skip
        fake.plans.clear()
        either._trusted.clear()
        x, w, w_diff = operands(rows)
        got = either.linear_either(x, w, w_diff, n_ar)
        assert torch.equal(got, linear_triton(x, w, w_diff, n_ar)), (rows, n_ar)
        assert [tiles(plan) for plan in fake.plans[len(fake.plans) - len(want) :]] == want, (rows, n_ar)


def test_rows_that_no_tile_takes(fake, monkeypatch):
    """In row tiles, a launch a view, compared on several tiles a program; of two views the other one may be
    narrow."""
    wide = replace(ENTRY, wide=(GluonTile(48, 1), GluonTile(16, 2)))
    entries = {(N, K, BF16, "sm_90"): wide}
    for name in ("linear_gluon", "linear_gluon_wide"):
        monkeypatch.setattr(sys.modules[f"orthrus_kernels.{name}"], "gluon_entries", lambda: entries)
    seen = []

    def in_row_tiles(plan, x, weight, *, out, programs=None, pdl=False, early=True):
        seen.append((len(x), programs))
        return fake(plan, x, weight, out=out, pdl=pdl, early=early)

    monkeypatch.setattr(either, "linear_gluon_wide", in_row_tiles)
    monkeypatch.setattr(either, "multiprocessors", lambda device: 3)
    for rows, n_ar in ((40, 40), (97, 97), (80, 9), (80, 40), (49, 0)):
        x, w, w_diff = operands(rows)
        got = either.linear_either(x, w, w_diff, n_ar, space=Workspace.new(torch.device("cpu"), 1, 1))
        assert torch.equal(got, linear_triton(x, w, w_diff, n_ar)), (rows, n_ar)
    x, w, _ = operands(40)
    assert torch.equal(either.linear_swiglu_either(x, w), linear_swiglu_triton(x, w))
    compared = [(rows, programs) for rows, programs in seen if programs]
    assert compared == [(25, 1), (73, 2), (25, 1)], "two row tiles of 16 and of 48, then SwiGLU"
    assert [rows for rows, programs in seen if not programs] == [40, 97, 71, 40, 40, 49, 40]
    assert [plan.tile.rows for plan in fake.plans if not isinstance(plan, WidePlan)] == [16, 16]
    fake.wrong = torch.tensor(0.0)
    either._trusted.clear()
    assert torch.equal(either.linear_either(x, w), linear_triton(x, w)) and "other bits" in either.why_not()


def test_results_go_where_they_are_asked_for(fake):
    x, w, w_diff = operands(40)
    for n_ar in (9, 20):
        out = torch.full((42, N), float("nan"), dtype=BF16)[1:41]
        assert either.linear_either(x, w, w_diff, n_ar, out=out) is out
        assert torch.equal(out, linear_triton(x, w, w_diff, n_ar)) and out._base.isnan().sum() == 2 * N
    out = new_rows(x, 9, N // 2)
    assert either.linear_swiglu_either(x[:9], w, out=out) is out
    assert either.linear_swiglu_either(x[:9], w)._base is not None, "memory behind what a linear reads"


@pytest.mark.parametrize("rows,n,k,dtype", [(0, N, K, BF16), (33, N, K, BF16), (9, 64, K, BF16),
                                            (9, N, K, torch.float32)])  # fmt: skip
def test_what_gluon_does_not_take(fake, rows, n, k, dtype):
    x, w, _ = operands(rows, n, k, dtype)
    assert torch.equal(either.linear_either(x, w), linear_triton(x, w)) and not fake.plans


def test_other_outputs_entries_and_devices_run_in_triton(fake, monkeypatch):
    x, w, _ = operands(9)
    assert either.linear_either(x, w, out_dtype=torch.float32).dtype == torch.float32
    either.linear_either(x, w, out=torch.empty(9, N))
    either.linear_either(x, w, entry=tables.linear_entry(N, K, BF16, "sm_90"))
    either.linear_either(hard("heavy", 9, K + 1).to(BF16)[:, 1:], w)  # rows at odd addresses
    monkeypatch.setattr(tables, "device_key", lambda device: "sm_100")
    either.linear_either(x, w)
    assert not fake.plans


def test_too_few_multiprocessors_for_segments_run_in_triton(fake, monkeypatch):
    """Programs that wait for each other must all run; without segments they may take turns."""
    one, two = Plan(4096, 12288, 1, TILES[0]), Plan(4096, 12288, 2, TILES[0])
    space = Workspace.new(torch.device("cpu"), 1 << 24, 1 << 10)
    assert two.programs == 128
    assert two.fits(128, space) and not two.fits(127, space) and one.fits(1, space)
    assert not two.fits(132, Workspace.new(torch.device("cpu"), 1 << 24, 63))
    assert not two.fits(132, Workspace.new(torch.device("cpu"), 64 * 2 * 16 * 64 - 1, 64))
    entry = tables.LinearEntry(64, 2, (tables.LinearTile(None, 16, 64, False, 4, 3),))
    monkeypatch.setattr(tables, "linear_entry", lambda *of: entry)
    monkeypatch.setattr(either, "multiprocessors", lambda device: 3)
    x, w, _ = operands(9, N, 128)
    monkeypatch.setattr(
        sys.modules["orthrus_kernels.linear_gluon"], "gluon_entries", lambda: {(N, 128, BF16, "sm_90"): ENTRY}
    )
    either.linear_either(x, w)
    assert not fake.plans
    monkeypatch.setattr(either, "multiprocessors", lambda device: 4)
    either.linear_either(x, w)
    assert len(fake.plans) == 2


def test_no_segment_is_empty():
    """Programs learn from rows of x that the grid in front has ended: each must copy some."""
    for blocks in range(1, 70):
        for segments in range(1, 9):
            each = -(-blocks // segments)
            full = all(min(each, blocks - i * each) > 0 for i in range(segments))
            assert Plan(64, 64 * blocks, segments, TILES[0]).runs == full, (blocks, segments)


def test_a_recording_compares_nothing_and_trusts_nothing(fake, monkeypatch):
    """Launches do not run then: whatever they leave is no verdict. Both kernels are recorded."""
    monkeypatch.setattr(either, "is_recorded", lambda: True)
    fake.wrong = torch.tensor(float("nan"))
    x, w, _ = operands(9)
    either.linear_either(x, w)
    assert len(fake.plans) == 2 and not either._trusted and not either._distrusted
    assert not is_recorded()


def test_a_comparison_does_not_fall_into_a_capture(fake, monkeypatch):
    x, w, _ = operands(9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Weight, "pointer", type("On", (), {"device": torch.device("cuda")}))
    (launch,) = [either.Launch(Plan(N, K, 1, TILES[0]), (w, None), 0, 9, 9)]
    with pytest.raises(RuntimeError, match="launch once before the capture"):
        either.trusted(launch, False)


def test_the_switch(monkeypatch):
    ops = backend_ops("triton")
    assert (ops.linear, ops.linear_swiglu) == (either.linear_either, either.linear_swiglu_either)
    monkeypatch.setenv("ORTHRUS_GLUON", "off")
    ops = backend_ops("triton")
    assert (ops.linear, ops.linear_swiglu) == (linear_triton, linear_swiglu_triton)
    dependent = backend_ops("triton", {"linear"}).linear
    assert isinstance(dependent, partial) and dependent.func is linear_triton
    monkeypatch.setenv("ORTHRUS_GLUON", "on")
    assert gluon_is_on() and backend_ops("triton").linear is either.linear_either
    for said in ("1", "", "Off"):
        monkeypatch.setenv("ORTHRUS_GLUON", said)
        with pytest.raises(ValueError, match="ORTHRUS_GLUON is on or off"):
            backend_ops("triton")
        with pytest.raises(InputError, match="ORTHRUS_GLUON is on or off"):
            pick_backend("auto", torch.device("cpu"))


def test_the_table():
    """Every entry's tiles fit a multiprocessor, and the launches of a class with segments fit an H100."""
    assert len(gluon_entries()) >= 8
    space = Workspace.new(torch.device("cpu"))
    for (n, k, dtype, device), entry in gluon_entries().items():
        assert device == "sm_90" and dtype == BF16
        assert bool(entry.measured) == bool(entry.tiles) and bool(entry.wide_measured) == bool(entry.wide)
        if not entry.tiles:
            assert entry.wide and plan_of(n, k, dtype, device, entry.least) is None
            continue
        for rows in {entry.least, max(entry.least, 16), 17, entry.tiles[-1].rows}:
            plan = plan_of(n, k, dtype, device, rows)
            assert plan is not None and plan.tile.rows >= rows and plan.fits(132, space)
        for rows in (entry.least - 1, entry.tiles[-1].rows + 1):
            assert plan_of(n, k, dtype, device, rows) is None
        for ar, diffusion in entry.both:
            plan = plan_of(n, k, dtype, device, ar.rows, diffusion.rows)
            assert plan is not None and plan.tiles == (ar, diffusion) and plan.fits(132, space)
            assert plan_of(n, k, dtype, device, ar.rows + 1, 1) is None
    assert plan_of(6144, 4096, BF16, "sm_80", 1) is None


def test_tiles():
    for rows, groups, parts in ((16, 1, (16, 0)), (48, 3, (32, 16)), (144, 1, (128, 16)), (192, 3, (128, 64)),
                                (256, 2, (128, 128))):  # fmt: skip
        tile = GluonTile(rows, groups)
        assert tile.parts == parts and 4 <= tile.stages <= 10
        assert tile.stages * (rows + 64 * groups) * 128 <= gluon_table.ROOM
    for rows, groups in ((0, 1), (8, 1), (40, 1), (112, 1), (320, 1), (256, 3), (16, 0), (16, 4)):
        with pytest.raises(ValueError, match="a tile in Gluon"):
            GluonTile(rows, groups)


@pytest.mark.parametrize(
    "tiles,both,why",
    [([], [], "rise"), ([[32, 1], [16, 1]], [], "rise"), ([[16, 1], [16, 1]], [], "rise"),
     ([[16, 1]], [[[16, 3], [16, 2]]], "1 group")],
)  # fmt: skip
def test_a_malformed_table_is_refused(tiles, both, why, monkeypatch, tmp_path):
    row = {
        "n": 64,
        "k": 64,
        "dtype": "bfloat16",
        "device": "sm_90",
        "tiles": tiles,
        "both": both,
        "measured": "x",
    }
    (tmp_path / "gluon.json").write_text(gluon_table.json.dumps([row]))
    monkeypatch.setattr(gluon_table.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=why):
        gluon_entries.__wrapped__()


CODED = {"n": 6144, "k": 4096, "bits": 4, "device": "sm_90", "least": 9, "tiles": [[64, 2]], "measured": "x"}


@pytest.mark.parametrize(
    "lines, why",
    [([CODED | {"least": 0}], "1 to 64"), ([CODED | {"least": 65}], "1 to 64"),
     ([CODED | {"least": "9"}], "'9'"),
     ([CODED | {"least": True}], "True"), ([CODED | {"tiles": [[64, 2], [64, 1]]}], "rise"),
     ([CODED | {"tiles": []}], "rise"), ([CODED | {"tiles": [[64.0, 2]]}], "gluon_codes.json"),
     ([CODED | {"tiles": [["64", 2]]}], "gluon_codes.json"),
     ([CODED | {"tiles": [[160, 2]]}], "or 192, not 160"),
     ([CODED | {"tiles": [[192, 3]]}], "48 rows at most"), ([CODED | {"bits": 16}], "4 or 8 bits"),
     ([CODED | {"rounds": 1}], "rounds"), ([CODED | {"rounds": True}], "have 8 bits"),
     ([CODED | {"k": 100}], "multiple of 128"), ([CODED, CODED], "two lines"),
     ([{name: CODED[name] for name in CODED if name != "least"}], "least")],
)  # fmt: skip
def test_a_malformed_table_of_codes_is_refused(lines, why, monkeypatch, tmp_path):
    (tmp_path / "gluon_codes.json").write_text(gluon_table.json.dumps(lines))
    monkeypatch.setattr(gluon_table.resources, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=why):
        for rounds in (False, True):
            coded_entries.__wrapped__(rounds)


@pytest.mark.parametrize("rounds", [False, True])
def test_the_table_of_codes(rounds):
    """Every line plans what it says, in launches that an H100 takes, and the fewest rows are Triton's."""
    assert len(coded_entries(rounds)) >= (4 if rounds else 8)
    space = Workspace.new(torch.device("cpu"))
    for (n, k, bits, device), entry in coded_entries(rounds).items():
        assert device == "sm_90" and entry.measured
        format, swiglu = {4: Format.INT4, 8: Format.E4M3}[bits], n == 24576
        w = QuantisedWeight.new(n, k, format, 128, zeros=False, scale=BF16, dtype=BF16, device="meta",
                                rounds=rounds)  # fmt: skip
        for rows in {entry.least, *(tile.rows for tile in entry.tiles), 2 * entry.tiles[-1].rows + 1}:
            plans = plans_of(w, device, rows, swiglu)
            counts = [count for _, count in plans]
            assert sum(counts) == rows
            assert not rounds or not any(count % ROUNDED_ROWS_BEGIN for count in counts[:-1])
            assert all(plan.fits(132, space) and count <= plan.tile.rows for plan, count in plans)
        assert entry.least == 1 or not plans_of(w, device, entry.least - 1, swiglu)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("most", [32, 128, 192])
def test_rows_of_launches(most, rounds):
    for rows in range(1, 400):
        height = rows_of_launches(rows, most, rounds)
        assert 0 < height <= most and -(-rows // height) == -(-rows // most)
        assert not (rounds and height % ROUNDED_ROWS_BEGIN)
        assert rounds or height * -(-rows // height) - rows < -(-rows // most)


@pytest.mark.parametrize(
    ("cuts", "rounded"), [((0, 9), [0]), ((0, 8, 20), [0]), ((0, 5, 9), [0, 5]), ((0, 5, 9, 20), [0, 5])]
)
def test_rows_are_rounded_once_where_launches_can_begin_in_their_middle(cuts, rounded, monkeypatch):
    """TMA reads scales at multiples of 16 bytes: a launch whose rows begin elsewhere has codes of its own."""
    x, out, begun, seen = torch.arange(32.0)[:, None], torch.empty(32, 1), [], []
    w = QuantisedWeight.new(64, 128, Format.E4M3, 128, zeros=False, scale=BF16, dtype=BF16, device="meta",
                            rounds=True)  # fmt: skip

    def quantise(rows, *, pdl):
        begun.append(int(rows[0]))
        return rows

    def run(launch, rows, *, out, pdl):
        seen.extend(rows.flatten().tolist())
        assert len(out) == len(rows) == launch.last - launch.first

    monkeypatch.setattr(either, "quantise_rows_triton", quantise)
    monkeypatch.setattr(either.Launch, "run", run)
    launches = [either.Launch(None, (w, None), a, b, b - a) for a, b in pairwise(cuts)]
    assert either.launched(launches, x, out, pdl=False) is out
    assert begun == rounded and seen == list(range(cuts[-1]))


def test_what_the_kernel_takes_as_given():
    x, w, _ = operands(9)
    plan = Plan(N, K, 1, TILES[0])
    for wrong in ({"x": x[:, 1:]}, {"x": x.float()}, {"out": torch.empty(8, N, dtype=BF16)},
                  {"n_ar": 17}, {"weight_diff": w}, {"out": torch.empty(9, N)}):  # fmt: skip
        given = {"x": x, "weight": w, "out": torch.empty(9, N, dtype=BF16)} | wrong
        with pytest.raises(AssertionError):
            linear_gluon(plan, **given)


def test_the_word_of_a_kernel_that_gave_up(monkeypatch, capsys):
    late = sys.modules["orthrus_kernels.late"]
    monkeypatch.setattr(late, "_words", {})
    assert late.stopped() == ""
    word = late.late_word(torch.device("cpu"))
    assert late.late_word(torch.device("cpu")) is word and late.stopped() == ""
    word.fill_(1)
    assert "linear_gluon stopped the GPU" in late.stopped() and "ORTHRUS_GLUON=off" in late.stopped()
    late._say()
    assert capsys.readouterr().err == late.STOPPED + "\n"


WITHOUT = """
import os, sys, torch
for missing in ("triton", "triton.experimental.gluon"):
    if os.fork() == 0:
        sys.modules[missing] = None
        from orthrus_kernels import backend_ops
        from orthrus_kernels._gluon import HAS_GLUON
        print(missing, HAS_GLUON, backend_ops("triton").linear.__name__)
        break
    os.wait()
"""


def test_without_gluon_triton_runs():
    """Nor without all of Triton does an import fail."""
    said = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=100)
    lines = ["triton False linear_either", "triton.experimental.gluon False linear_either"]
    assert said.stdout.splitlines() == lines, said.stderr[-500:]
