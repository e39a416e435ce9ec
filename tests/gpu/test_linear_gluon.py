"""The linears in Gluon have the bits of Triton's kernels: every tile of their tables, both views, SwiGLU,
codes of every format, every row index, whatever lies beside the rows, as dependent launches and in graphs;
and their programs, which wait for each other, end where another stream holds half of the GPU."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from codes import ROUNDED, Coding, name_of, random_weight

from orthrus_kernels import Weight, backend_ops, tables
from orthrus_kernels._gluon import HAS_GLUON, gl, gluon
from orthrus_kernels._triton import tl
from orthrus_kernels.compile_ahead import compile_all, missing, recorded
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_either import launches_of, linear_either, linear_swiglu_either, why_not
from orthrus_kernels.linear_gluon import Plan, linear_gluon, multiprocessors, plan_of
from orthrus_kernels.linear_gluon_codes import linear_gluon_codes, plan_with
from orthrus_kernels.linear_gluon_wide import WidePlan, linear_gluon_wide
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.quantise_rows import quantise_rows_triton
from orthrus_kernels.quantised import Format, QuantisedWeight
from orthrus_kernels.tables.gluon import TALL, CodedEntry, GluonTile, coded_tiles, gluon_entries
from orthrus_kernels.workspace import Workspace

DEVICE, BF16, NAN = "cuda", torch.bfloat16, float("nan")
MOST = 256
GATE_UP = (24576, 4096), (19456, 2560), (12288, 2048)
ENTRIES = {
    (n, k): of for (n, k, dtype, device), of in gluon_entries().items() if (dtype, device) == (BF16, "sm_90")
}
WEIGHTS = [size for size, of in ENTRIES.items() if of.tiles]
WIDE = [size for size, of in ENTRIES.items() if of.wide]
MANY = 193, 256, 257, 384, 385, 1000, 4096  # rows of the tests of wide tiles
TOGETHER = [of for of in WEIGHTS if gluon_entries()[(*of, BF16, "sm_90")].both]
# Classes and sizes that the table lacks: ragged N and K, up to 8 segments, each number of groups.
OTHERS = (
    Plan(200, 328, 1, GluonTile(16, 1)), Plan(200, 328, 3, GluonTile(48, 2)),
    Plan(392, 1000, 8, GluonTile(96, 3)), Plan(1024, 2048, 4, GluonTile(192, 1)),
    Plan(512, 4096, 8, GluonTile(192, 2)), Plan(2560, 4096, 3, GluonTile(144, 1)),
)  # fmt: skip
OTHER_PAIRS = (
    Plan(200, 328, 1, GluonTile(16, 1), GluonTile(32, 3)),
    Plan(200, 328, 3, GluonTile(32, 1), GluonTile(16, 1)),
    Plan(2048, 2048, 3, GluonTile(48, 3), GluonTile(144, 1)),
    Plan(640, 1024, 2, GluonTile(64, 2), GluonTile(96, 1)),
)
# In groups of 128, the only ones that Gluon takes.
CODES = (
    Coding(Format.E4M3, 128, False, BF16, 128), Coding(Format.INT4, 128, True, BF16),
    Coding(Format.INT4, 128, True, torch.float16), Coding(Format.INT4, 128, False, torch.float32),
    Coding(Format.E4M3, 128, False, BF16), ROUNDED, ROUNDED._replace(factor_rows=1),
)  # fmt: skip
HEIGHTS = 16, 32, 48, 64, 96, 128, TALL
EXCHANGED = (
    Plan(4096, 12288, 2, GluonTile(64, 1)), Plan(2048, 2048, 3, GluonTile(192, 1)),
    Plan(2048, 2048, 3, GluonTile(16, 1)), Plan(2048, 6144, 4, GluonTile(16, 1)),
    Plan(2048, 6144, 4, GluonTile(192, 1)),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def hopper():
    if not HAS_GLUON or tables.device_key(torch.device(DEVICE)) != "sm_90":
        pytest.skip("needs a GPU of sm_90 and a Triton with Gluon")


def heavy(*shape: int) -> torch.Tensor:
    """Normal numbers scaled by 2^-6 .. 2^6, whose sums show their order: bf16 [*shape]."""
    scale = torch.exp2(torch.randint(-6, 7, shape, device=DEVICE).float())
    return (torch.randn(*shape, device=DEVICE) * scale).to(BF16)


def weights(n: int, k: int) -> list[Weight]:
    """One for each view, as wide as the sums of a model are."""
    return [Weight(heavy(n, k) * k**-0.5) for _ in "ab"]


def among_nan(rows: torch.Tensor) -> torch.Tensor:
    """The rows with NaN before and behind them in memory."""
    buffer = torch.full((len(rows) + 2 * MOST, rows.shape[1]), NAN, dtype=rows.dtype, device=DEVICE)
    buffer[MOST : MOST + len(rows)] = rows
    return buffer[MOST : MOST + len(rows)]


def new_space() -> Workspace:
    """Room for the sums of any launch here."""
    return Workspace.new(torch.device(DEVICE), 1 << 22)


def check(plan: Plan, x, views, n_ar: int, want: torch.Tensor, space: Workspace, pdl: bool = False) -> None:
    """A launch on rows among NaN, with partials of NaN, writes the wanted rows and nothing beside them, and
    leaves its counters at 0."""
    buffer = torch.full((len(x) + 2, want.shape[1]), NAN, dtype=BF16, device=DEVICE)
    space.partials.fill_(NAN)
    out = buffer[1 : 1 + len(x)]
    if isinstance(views[0], QuantisedWeight):
        linear_gluon_codes(plan, among_nan(x), views[0], out=out, space=space, pdl=pdl)
    else:
        linear_gluon(plan, among_nan(x), *views, n_ar, out=out, space=space, pdl=pdl)
    assert torch.equal(out.view(torch.int16), want.view(torch.int16)), (plan, len(x), n_ar, pdl)
    assert buffer[0].isnan().all() and buffer[-1].isnan().all(), (plan, len(x))
    assert not space.counters.any(), plan


def entry_of(plan: Plan) -> tables.LinearEntry:
    """Triton's tiles in the reduction class of a plan."""
    tile = tables.LinearTile(None, 64, 64, False, 4, 4)
    return tables.LinearEntry(plan.block_k, plan.segments, (tile,))


def coded_plans(n: int, k: int, segments: int, scheme: Coding, swiglu: bool = False) -> list[Plan]:
    """Every tile that codes may have."""
    tiles = [tile for rows in HEIGHTS for tile in coded_tiles(rows, scheme.format.bits, scheme.rounds)]
    found = [Plan(n, k, segments, tile, None, swiglu, 128) for tile in tiles]
    return [plan for plan in found if plan.fits(multiprocessors(torch.device(DEVICE)), new_space())]


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("scheme", CODES, ids=name_of)
@pytest.mark.parametrize(
    ("n", "k", "segments"), [(200, 128, 1), (392, 1408, 1), (392, 1408, 4), (2048, 4096, 4)]
)
def test_every_tile_of_codes(scheme, n, k, segments, pdl):
    """Ragged N, one group, segments of unequal length; rows [0, count) for every count of a tile."""
    torch.manual_seed(0)
    x, w, space = heavy(MOST, k), random_weight(scheme, n, k, DEVICE), new_space()
    plans = coded_plans(n, k, segments, scheme)
    want = linear_triton(x, w, entry=entry_of(plans[0]))
    assert len(plans) >= 12
    for plan in plans:
        counts = range(1, plan.tile.rows + 1) if n == 392 else {1, plan.tile.rows // 2 + 1, plan.tile.rows}
        for rows in counts:
            check(plan, x[:rows], (w, None), rows, want[:rows], space, pdl)


@pytest.mark.parametrize("scheme", CODES, ids=name_of)
def test_gate_and_up_of_codes(scheme):
    """A scale of an up row lies far from that of its gate row."""
    torch.manual_seed(0)
    for n, k in ((2 * 200, 512), (2 * 1024, 2048)):
        x, w, space = heavy(MOST, k) / 64, random_weight(scheme, n, k, DEVICE), new_space()
        for plan in coded_plans(n, k, 1, scheme, True):
            want = linear_swiglu_triton(x, w, entry=entry_of(plan))
            for rows in {1, plan.tile.rows // 2 + 1, plan.tile.rows}:
                check(plan, x[:rows], (w, None), rows, want[:rows], space)


@pytest.mark.parametrize("scheme", (*CODES[:2], ROUNDED), ids=name_of)
def test_thousands_of_exchanges_of_codes(scheme):
    torch.manual_seed(0)
    for plan in coded_plans(2048, 4096, 4, scheme):
        x, w, space = (
            heavy(plan.tile.rows, plan.k),
            random_weight(scheme, plan.n, plan.k, DEVICE),
            new_space(),
        )
        want = linear_triton(x, w, entry=entry_of(plan))
        used = space.partials[: plan.programs * plan.tile.rows * 64 * plan.tile.groups]
        out, different = torch.empty_like(want), torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(300):
            used.fill_(NAN)
            linear_gluon_codes(plan, x, w, out=out, space=space, pdl=True)
            different += (out.view(torch.int16) != want.view(torch.int16)).any()
        assert int(different) == 0 and not space.counters.any(), plan


@pytest.mark.parametrize("scheme", (*CODES[:2], ROUNDED), ids=name_of)
def test_what_a_model_calls_with_codes(scheme, monkeypatch):
    """By a table: rows beyond a tile in launches of equal parts, a launch a view; Gluon is not turned off."""
    torch.manual_seed(0)
    n, k, bits = 4096, 4096, scheme[0].bits
    tiles = tuple(coded_tiles(rows, bits, scheme.rounds)[1] for rows in (16, 64, TALL))
    of = sys.modules["orthrus_kernels.linear_gluon_codes"]
    monkeypatch.setattr(of, "coded_entries", lambda rounds: {(n, k, bits, "sm_90"): CodedEntry(tiles)})
    w, w_diff = (random_weight(scheme, n, k, DEVICE, seed) for seed in (1, 2))
    plan, device = plan_with(w, "sm_90", tiles[0], False), torch.device(DEVICE)
    assert plan.fits(multiprocessors(device), new_space()) and plan.segments > 1
    for rows in (1, 16, 17, 64, 65, 97, 177, 192, 300):
        x = heavy(rows, k)
        for n_ar in {1, rows // 3 + 1, rows}:
            views = w, w_diff if n_ar < rows else None
            assert len(launches_of(x, views, n_ar, False, None)) >= -(-rows // TALL)
            assert torch.equal(linear_either(x, w, w_diff, n_ar), linear_triton(x, w, w_diff, n_ar)), (
                rows,
                n_ar,
            )
    big = random_weight(scheme, 24576, k, DEVICE)
    monkeypatch.setattr(of, "coded_entries", lambda rounds: {(24576, k, bits, "sm_90"): CodedEntry(tiles)})
    for rows in (1, 33, 100):
        x = heavy(rows, k) / 64
        assert launches_of(x, (big, None), rows, True, None)
        assert torch.equal(linear_swiglu_either(x, big), linear_swiglu_triton(x, big)), rows
    assert why_not() == ""


def test_rows_of_codes_that_begin_behind_others():
    """Their scales are copied from the memory of all rows, from where TMA can read."""
    torch.manual_seed(0)
    x, w, space = heavy(MOST, 1024), random_weight(ROUNDED, 392, 1024, DEVICE), new_space()
    coded = quantise_rows_triton(x)
    for plan in coded_plans(392, 1024, 2, ROUNDED):
        want = linear_triton(x, w, entry=entry_of(plan))
        for first in (0, 4, 36, MOST - plan.tile.rows):
            rows = slice(first, first + plan.tile.rows)
            out = torch.full_like(want[rows], NAN)
            linear_gluon_codes(plan, coded[rows], w, out=out, space=space)
            assert torch.equal(out.view(torch.int16), want[rows].view(torch.int16)), (plan, first)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_every_tile_and_row_of_the_table(n, k, pdl):
    """Rows [0, count) of 256 for every count, which shows every index; in Triton each row has the bits that
    it has alone (test_linear_rows.py)."""
    torch.manual_seed(0)
    x, (w, _) = heavy(MOST, k), weights(n, k)
    swiglu, space = (n, k) in GATE_UP, new_space()
    want = linear_swiglu_triton(x, w) if swiglu else linear_triton(x, w)
    plain = linear_triton(x, w) if swiglu else want
    entry = gluon_entries()[n, k, BF16, "sm_90"]
    for rows in range(entry.least, entry.tiles[-1].rows + 1):
        plan = plan_of(n, k, BF16, "sm_90", rows, swiglu=swiglu)
        check(plan, x[:rows], (w, None), rows, want[:rows], space, pdl)
        if swiglu and rows % 64 == 1:
            check(replace(plan, swiglu=False), x[:rows], (w, None), rows, plain[:rows], space, pdl)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("n", "k"), TOGETHER)
def test_both_views_in_one_launch(n, k, pdl):
    torch.manual_seed(0)
    x, (w, w_diff) = heavy(MOST, k), weights(n, k)
    ar, diffusion, space = linear_triton(x, w), linear_triton(x, w_diff), new_space()
    for pair in gluon_entries()[n, k, BF16, "sm_90"].both:
        for n_ar in range(1, pair[0].rows + 1):
            for others in {1, n_ar, pair[1].rows // 2 + 1, pair[1].rows}:
                plan = plan_of(n, k, BF16, "sm_90", n_ar, others)
                want = torch.cat([ar[:n_ar], diffusion[n_ar : n_ar + others]])
                check(plan, x[: n_ar + others], (w, w_diff), n_ar, want, space, pdl)


def wide_plans(n: int, k: int) -> list[WidePlan]:
    """Of every wide tile of a weight; of gate and up with SwiGLU, then as a plain linear."""
    segments = tables.linear_entry(n, k, BF16, "sm_90").segments
    kinds = (True, False) if (n, k) in GATE_UP else (False,)
    return [WidePlan(n, k, segments, tile, None, swiglu) for swiglu in kinds for tile in ENTRIES[n, k].wide]


# Ragged N and K, every class, and tiles that no weight of the table has.
OTHER_WIDE = (
    WidePlan(200, 328, 1, GluonTile(16, 1)), WidePlan(200, 328, 3, GluonTile(48, 2)),
    WidePlan(392, 1000, 8, GluonTile(96, 3)), WidePlan(2560, 4096, 3, GluonTile(144, 1)),
    WidePlan(1024, 2048, 4, GluonTile(128, 3)), WidePlan(200, 1000, 1, GluonTile(256, 1)),
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled_side_by_side(hopper):
    """What the tests of wide tiles launch, compiled in processes: one after another takes minutes."""
    with recorded() as launches:
        for n, k in WIDE:
            x, w = (torch.empty(count, k, dtype=BF16, device=DEVICE) for count in (300, n))
            linear_triton(x, Weight(w))
        for plan in [plan for size in WIDE for plan in wide_plans(*size)] + list(OTHER_WIDE):
            x, w = (torch.empty(rows, plan.k, dtype=BF16, device=DEVICE) for rows in (300, plan.n))
            out = torch.empty(300, plan.n // 2 if plan.swiglu else plan.n, dtype=BF16, device=DEVICE)
            for pdl in (False, True):
                linear_gluon_wide(plan, x, Weight(w), out=out, pdl=pdl)
            if plan in OTHER_WIDE:
                linear_triton(x, Weight(w), entry=entry_of(plan))
    compile_all(missing(launches), lambda: None)


def check_wide(plan: WidePlan, x, weight, want: torch.Tensor, pdl: bool, programs: int | None = None) -> None:
    """As `check`."""
    buffer = torch.full((len(x) + 2, want.shape[1]), NAN, dtype=BF16, device=DEVICE)
    out = buffer[1 : 1 + len(x)]
    linear_gluon_wide(plan, among_nan(x), weight, out=out, programs=programs, pdl=pdl)
    assert torch.equal(out.view(torch.int16), want.view(torch.int16)), (plan, len(x), pdl, programs)
    assert buffer[0].isnan().all() and buffer[-1].isnan().all(), (plan, len(x))


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("n", "k"), WIDE)
def test_every_wide_tile_of_the_table(n, k, pdl, compiled_side_by_side):
    """Row tiles that are full and not, a tile a program and many, as many programs as tiles."""
    torch.manual_seed(0)
    x, (w, _) = heavy(max(MANY), k), weights(n, k)
    want = {False: linear_triton(x, w)}
    if (n, k) in GATE_UP:
        want[True] = linear_swiglu_triton(x, w)
    for plan in wide_plans(n, k):
        for rows in MANY:
            check_wide(plan, x[:rows], w, want[plan.swiglu][:rows], pdl)
        check_wide(plan, x[:385], w, want[plan.swiglu][:385], pdl, programs=7)
        check_wide(plan, x[:1000], w, want[plan.swiglu][:1000], pdl, programs=plan.count(1000))


@pytest.mark.parametrize("plan", OTHER_WIDE, ids=str)
def test_other_wide_tiles_and_ragged_sizes(plan, compiled_side_by_side):
    torch.manual_seed(0)
    x, (w, _) = heavy(700, plan.k), weights(plan.n, plan.k)
    want = linear_triton(x, w, entry=entry_of(plan))
    for rows in (1, plan.tile.rows, plan.tile.rows + 1, 700):
        check_wide(plan, x[:rows], w, want[:rows], False)
        check_wide(plan, x[:rows], w, want[:rows], True, programs=2)


@pytest.mark.parametrize("plan", OTHERS, ids=str)
def test_other_classes_and_ragged_sizes(plan):
    torch.manual_seed(0)
    x, (w, _) = heavy(plan.tile.rows, plan.k), weights(plan.n, plan.k)
    want = linear_triton(x, w, entry=entry_of(plan))
    for rows in {1, plan.tile.rows // 2 + 1, plan.tile.rows}:
        check(plan, x[:rows], (w, None), rows, want[:rows], new_space())


@pytest.mark.parametrize("plan", OTHER_PAIRS, ids=str)
def test_other_pairs_of_tiles(plan):
    torch.manual_seed(0)
    most, others = plan.tile.rows, plan.tile_diff.rows
    x, (w, w_diff) = heavy(most + others, plan.k), weights(plan.n, plan.k)
    for n_ar, behind in {(1, 1), (most, 1), (1, others), (most - 3, others - 5), (most, others)}:
        want = linear_triton(x[: n_ar + behind], w, w_diff, n_ar, entry=entry_of(plan))
        check(plan, x[: n_ar + behind], (w, w_diff), n_ar, want, new_space())


def test_rows_and_weights_that_are_parts_of_larger_ones():
    """Strides of their own: rows of a wider matrix, weights that are slices of one."""
    torch.manual_seed(0)
    plan = Plan(192, 320, 2, GluonTile(48, 1), GluonTile(16, 1))
    wide, both = heavy(60, 320 + 64), heavy(2 * 192, 320 + 8)
    x, w, w_diff = wide[:, 32:352], Weight(both[:192, 8:]), Weight(both[192:, 8:])
    out = torch.full((60, 192 + 8), NAN, dtype=BF16, device=DEVICE)
    linear_gluon(plan, x, w, w_diff, 45, out=out[:, 4:196], space=new_space())
    want = linear_triton(x, w, w_diff, 45, entry=entry_of(plan))
    assert torch.equal(out[:, 4:196], want) and int(out.isnan().sum()) == 60 * 8


@pytest.mark.parametrize("pdl", [(), ("linear",)])
@pytest.mark.parametrize(("n", "k"), list(ENTRIES))
def test_what_a_model_calls(n, k, pdl, compiled_side_by_side):
    """Any rows of one view and of both, by the tables; Gluon runs some of them and is not turned off."""
    torch.manual_seed(0)
    x, views = heavy(700, k), weights(n, k)
    ops, taken = backend_ops("triton", pdl), 0
    for rows in (1, 2, 16, 17, 33, 64, 96, 97, 128, 177, 192, 193, 256, 257, 400, 700):
        if (n, k) in GATE_UP:
            assert torch.equal(
                ops.linear_swiglu(x[:rows], views[0]), linear_swiglu_triton(x[:rows], views[0])
            )
            taken += bool(launches_of(x[:rows], (views[0], None), rows, True, None))
            continue
        for n_ar in {0, 1, rows // 3, rows - 1, rows}:
            got = ops.linear(x[:rows], *views, n_ar)
            assert torch.equal(got, linear_triton(x[:rows], *views, n_ar)), (rows, n_ar)
            taken += bool(launches_of(x[:rows], (views[0], None), rows, False, None))
    assert taken >= (9 if (n, k) in WEIGHTS else 3) and why_not() == ""


@pytest.mark.parametrize("rows", [1, 64, 177, 600])
@pytest.mark.parametrize("size", [((6144, 4096), (4096, 4096), (4096, 12288)), ((2048, 2048), (2048, 6144))])
def test_chains_of_dependent_launches_in_a_graph(size, rows):
    """A linear starts while the one in front ends and reads what that one writes; partials and counters are
    those of all. Ordinary launches of Triton's kernels say what is wanted."""
    torch.manual_seed(0)
    links = [(weights(n, k), heavy(rows, k)) for n, k in size for _ in range(6)]
    ops = backend_ops("triton", ("linear", "rowwise"))

    def chain(linear, norm) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        carried = torch.zeros(rows, 1, dtype=BF16, device=DEVICE)
        for (w, w_diff), x in links:
            rest = norm(x + carried, torch.ones(x.shape[1], device=DEVICE, dtype=BF16), 1e-6)
            found.append(linear(rest, w, w_diff, rows - rows // 2))
            found.append(linear(rest, w_diff, w, rows - rows // 2))
            carried = found[-1][:, :1]
        return found

    plain = backend_ops("triton")
    want = chain(linear_triton, plain.rms_norm)
    chain(ops.linear, ops.rms_norm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(ops.linear, ops.rms_norm)
    for _ in range(20):
        for of in got:
            of.fill_(NAN)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("plan", EXCHANGED, ids=str)
def test_thousands_of_exchanges(plan):
    """Partials are poisoned before each launch, so that a sum that is taken too early is NaN."""
    torch.manual_seed(0)
    x, (w, _) = heavy(plan.tile.rows, plan.k), weights(plan.n, plan.k)
    want, space = linear_triton(x, w, entry=entry_of(plan)), new_space()
    used = space.partials[: plan.programs * plan.tile.rows * 64 * plan.tile.groups]
    out, different = torch.empty_like(want), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(3000):
        used.fill_(NAN)
        linear_gluon(plan, x, w, out=out, space=space)
        different += (out != want).any()
    assert int(different) == 0 and not space.counters.any()


@gluon.jit
def _hold_kernel(flag, out):
    """Keep a multiprocessor, by 224 KB of its shared memory, until the flag is set, or 20 s."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    taken = gl.allocate_shared_memory(gl.float32, [7, 8192], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    taken.index(0).store(gl.zeros([8192], gl.float32, layout))
    began = tl.extra.cuda.globaltimer()
    while (gl.load(flag, volatile=True) == 0) & (tl.extra.cuda.globaltimer() - began < 20000000000):
        pass
    gl.store(out + gl.program_id(0), tl.extra.cuda.smid() + gl.sum(taken.index(0).load(layout)).to(gl.int32))


@pytest.mark.parametrize("plan", EXCHANGED, ids=str)
def test_another_stream_holds_half_of_the_gpu(plan):
    """10^4 launches whose programs do not all run at once: none hangs, and none differs."""
    torch.manual_seed(0)
    held = multiprocessors(torch.device(DEVICE)) // 2
    x, (w, _) = heavy(plan.tile.rows, plan.k), weights(plan.n, plan.k)
    want, space = linear_triton(x, w, entry=entry_of(plan)), new_space()
    out, different = torch.empty_like(want), torch.zeros((), dtype=torch.int64, device=DEVICE)

    def launches(count: int) -> None:
        for _ in range(count):
            linear_gluon(plan, x, w, out=out, space=space, pdl=True)

    launches(2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches(100)
        different += (out != want).any()
    flag, where = (torch.zeros(count, dtype=torch.int32, device=DEVICE) for count in (1, held))
    hold = partial(_hold_kernel[(held,)], flag=flag, out=where, num_warps=4)
    flag.fill_(1)
    hold()  # compiled
    flag.zero_()
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        hold()
    ended = torch.cuda.Event()
    for _ in range(100):
        graph.replay()
    ended.record()
    ended.synchronize()
    still = not other.query()
    flag.fill_(1)
    torch.cuda.synchronize()
    assert still, "the other stream held its multiprocessors all the while"
    assert len(where.unique()) == held, "one each"
    assert int(different) == 0 and not space.counters.any()


ALONE = """
import torch
from orthrus_kernels import Weight
from orthrus_kernels.linear_gluon import Plan, linear_gluon
from orthrus_kernels.late import stopped
from orthrus_kernels.tables.gluon import GluonTile
from orthrus_kernels.workspace import Workspace

x, w = (torch.zeros(n, 1024, device="cuda", dtype=torch.bfloat16) for n in (16, 64))
space = Workspace.new(torch.device("cuda"))
space.counters.fill_(-5)  # as if five programs were missing
out = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
linear_gluon(Plan(64, 1024, 2, GluonTile(16, 1)), x, Weight(w), out=out, space=space)
try:
    torch.cuda.synchronize()
except RuntimeError:
    print("failed:", stopped())
"""


def test_a_wait_that_takes_too_long_ends_and_names_the_kernel():
    """In a process of its own, since it loses its GPU."""
    said = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert "failed: linear_gluon stopped the GPU" in said.stdout, said
    assert "linear_gluon stopped the GPU" in said.stderr, "at the end of the process too"
