"""Linears of many rows in Gluon over torch: indices, masks, the order of segments and the protocol between
warps (gluon_threads.py); and which tile is chosen. Its bits: tests/gpu/test_linear_gluon.py."""

import pytest
import torch
from gluon_threads import WIDE, Threads

from orthrus_kernels import Weight, tables
from orthrus_kernels import linear_gluon_wide as module
from orthrus_kernels.linear_gluon import plan_of
from orthrus_kernels.linear_gluon_wide import WidePlan, linear_gluon_wide, wide_plan_of
from orthrus_kernels.tables.gluon import MOST_ROWS, GluonEntry, GluonTile, gluon_entries
from orthrus_kernels.workspace import Workspace

BF16, NAN = torch.bfloat16, float("nan")


@pytest.fixture
def threads(monkeypatch):
    """The kernel over torch, on a GPU of 3 multiprocessors."""
    kernel = Threads("_linear_gluon_wide_kernel", WIDE)
    monkeypatch.setattr(module, "_linear_gluon_wide_kernel", kernel)
    monkeypatch.setattr(module, "multiprocessors", lambda device: 3)
    return kernel


def among_nan(rows: torch.Tensor, behind: int) -> torch.Tensor:
    whole = torch.full((len(rows) + behind, rows.shape[1]), NAN, dtype=BF16)
    whole[: len(rows)] = rows
    return whole[: len(rows)]


PLANS = (
    (WidePlan(200, 328, 1, GluonTile(64, 1)), 150), (WidePlan(200, 328, 3, GluonTile(48, 2)), 97),
    (WidePlan(392, 456, 4, GluonTile(32, 3)), 33), (WidePlan(200, 104, 1, GluonTile(256, 2)), 600),
    (WidePlan(64, 64 * 9, 2, GluonTile(16, 1)), 16 * 17 + 1), (WidePlan(200, 104, 1, GluonTile(16, 1)), 150),
)  # fmt: skip


@pytest.mark.parametrize("plan,rows", PLANS, ids=str)
def test_every_tile_is_computed_once(plan, rows, threads):
    """Whole numbers, whose sums are exact; memory behind x and around the result holds NaN."""
    torch.manual_seed(0)
    x = among_nan(torch.randint(-3, 4, (rows, plan.k)).to(BF16), 40)
    w = torch.randint(-3, 4, (plan.n, plan.k)).to(BF16)
    out = torch.full((rows + 2, plan.n + 8), NAN, dtype=BF16)
    linear_gluon_wide(plan, x, Weight(w), out=out[1 : 1 + rows, : plan.n])
    assert threads.programs == min(3, plan.count(rows)) and plan.count(rows) > 3
    assert torch.equal(out[1 : 1 + rows, : plan.n], (x.float() @ w.float().t()).to(BF16))
    assert int(out.isnan().sum()) == 2 * (plan.n + 8) + 8 * rows


def test_gate_and_up(threads):
    """Rows of both, in turns of 8, in one tile."""
    torch.manual_seed(0)
    plan = WidePlan(2 * 104, 136, 1, GluonTile(48, 1), None, True)
    x, w = torch.randint(-2, 3, (110, 136)).to(BF16), torch.randint(-2, 3, (2 * 104, 136)).to(BF16)
    out = torch.full((110, 104), NAN, dtype=BF16)
    linear_gluon_wide(plan, among_nan(x, 40), Weight(w), out=out)
    gate, up = (x.float() @ w.float().t()).to(BF16).float().chunk(2, 1)
    assert torch.equal(out, (gate * gate.sigmoid()).to(BF16) * up.to(BF16)) and plan.count(110) == 12


def test_segments_are_summed_apart_and_added_in_order(threads):
    """One product a block: 2^24, 1 | 1, -2^24 is 1 in two segments, 0 in one, 2 in any other order."""
    x = torch.zeros(5, 4 * 64)
    x[:, [3, 64, 128 + 9, 192 + 63]] = torch.tensor([2.0**24, 1, 1, -(2.0**24)])
    w = torch.ones(70, 4 * 64, dtype=BF16)
    for segments, want in ((1, 0.0), (2, 1.0), (4, 0.0)):
        plan = WidePlan(70, 4 * 64, segments, GluonTile(48, 1))
        out = linear_gluon_wide(plan, x.to(BF16), Weight(w), out=torch.empty(5, 70, dtype=BF16))
        assert out.eq(want).all(), segments


def test_what_a_launch_takes():
    """Tiles, programs that a GPU has at once, and a launch that shows all of a kernel."""
    plan = WidePlan(4096, 12288, 2, GluonTile(192, 1))
    assert plan.count(384) == 128 and plan.count(385) == 192
    assert plan.clocks(384, 132) == plan.clocks(1, 132) < plan.clocks(385, 132) == plan.clocks(768, 132)
    assert plan.fits(1, Workspace.new("cpu", 0, 0))
    for of in (plan, WidePlan(2048, 6144, 4, GluonTile(96, 1)), WidePlan(24576, 4096, 1, GluonTile(128, 3))):
        rows, programs = of.compared
        assert of.tile.rows < rows < 2 * of.tile.rows and 0 < 2 * programs <= of.count(rows)
    assert plan.parts == (128, 64) and WidePlan(64, 64, 1, GluonTile(MOST_ROWS, 2)).parts == (MOST_ROWS, 0)


def test_which_tile_is_chosen(monkeypatch):
    """That of the fewest clocks on the GPU that is there, for rows that no tile takes all at once."""
    one, two = GluonTile(192, 1), GluonTile(128, 2)
    entry = GluonEntry((GluonTile(16, 1), GluonTile(256, 1)), least=5, wide=(one, two))
    monkeypatch.setattr(module, "gluon_entries", lambda: {(4096, 4096, BF16, "sm_90"): entry})

    def tile(rows: int, multiprocessors: int = 132, swiglu: bool = False):
        plan = wide_plan_of(4096, 4096, BF16, "sm_90", rows, swiglu, multiprocessors)
        return plan and plan.tile

    assert (tile(384), tile(385), tile(512), tile(384, 32)) == (one, two, two, two)
    assert tile(256) is tile(1) is None and tile(384, swiglu=True) == one
    assert wide_plan_of(4096, 4096, BF16, "sm_80", 384, False, 132) is None
    classes = tables.LinearEntry(32, 1, ()), tables.LinearEntry(64, 65, ()), tables.LinearEntry(64, 2, ())
    for of, swiglu in zip(classes, (False, False, True), strict=True):
        monkeypatch.setattr(tables, "linear_entry", lambda *_, of=of: of)
        assert tile(384, swiglu=swiglu) is None, of


def test_the_table():
    """Each weight has wide tiles, and every one of them is the choice for some rows."""
    for (n, k, dtype, device), entry in gluon_entries().items():
        segments = tables.linear_entry(n, k, dtype, device).segments
        most = entry.tiles[-1].rows if entry.tiles else entry.least - 1
        chosen = {
            wide_plan_of(n, k, dtype, device, rows, False, 132).tile for rows in range(most + 1, 4097, 7)
        }
        assert chosen == set(entry.wide), (n, k)
        assert wide_plan_of(n, k, dtype, device, most, False, 132) is None
        assert plan_of(n, k, dtype, device, most + 1) is None
        assert all(WidePlan(n, k, segments, tile).runs for tile in entry.wide)
