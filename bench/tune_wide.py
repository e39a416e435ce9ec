"""Wide tiles of the linears in Gluon (linear_gluon_wide.py): how long does each take with many rows, beside
Triton's kernel, cuBLAS and the narrow tile that takes all rows, where there is one?

Every candidate is compared with Triton's kernel bit for bit; one that differs is named and never timed.
Candidates are the tiles whose rounds of programs come close to the fewest clocks for the number of rows
(`WidePlan.clocks`). The one marked * is what the table takes with these rows; ** is the same with a tile a
program, in place of programs that take tiles in turn. Times are those of a GPU that is not yet warm: for
those of a warm one run bench.linears."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import Weight, tables
from orthrus_kernels._gluon import HAS_GLUON
from orthrus_kernels.compile_ahead import compile_all, missing, recorded
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_gluon import linear_gluon, multiprocessors, plan_of
from orthrus_kernels.linear_gluon_wide import WidePlan, linear_gluon_wide, wide_plan_of
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.rows import SPARE_ROWS
from orthrus_kernels.workspace import workspace

from . import report
from .command import Parser, fail, positive, run, short, writable
from .kernels import POOL
from .measure import Meter, Pool, machine, machine_line
from .models import MODELS
from .tune import weights
from .tune_gluon import tiles

COMMAND = "bench.tune_wide"
ROWS = 256, 384, 512, 1024, 2048, 4096
HEIGHTS = 96, 128, 192, 256
MOST_ROWS = 4096  # for which the pool of operands has room
NEAR = 1.12  # clocks over the fewest up to which a tile is a candidate
MOST = 6  # candidates for a number of rows
HEAD = ["weight", "rows", "cuBLAS µs", "Triton µs", "narrow µs", "wide tiles, rows x warpgroups: µs"]


@dataclass
class Found:
    """Of a weight with so many rows: µs by name."""

    name: str
    rows: int
    us: dict[str, float] = field(default_factory=dict)

    @property
    def line(self) -> list[str]:
        """For the table, the fastest tile first."""
        wide = sorted((name for name in self.us if " x " in name), key=lambda name: self.us[name])
        others = (self.us.get(name) for name in ("cuBLAS", "Triton", "narrow"))
        cells = ["-" if us is None else report.number(us) for us in others]
        tiles = ", ".join(f"{name}: {report.number(self.us[name])}" for name in wide)
        return [self.name, str(self.rows), *cells, tiles]


def candidates(plans: Sequence[WidePlan], rows: int, most: int) -> list[WidePlan]:
    """Those near the fewest clocks on a GPU of `most` multiprocessors."""
    by_clocks = sorted(plans, key=lambda plan: plan.clocks(rows, most))
    least = by_clocks[0].clocks(rows, most)
    return [plan for plan in by_clocks if plan.clocks(rows, most) <= NEAR * least][:MOST]


class Tuner:
    """Compares and times the launches of one weight."""

    def __init__(self, name: str, n: int, k: int, meter: Meter) -> None:
        self.name, self.n, self.k, self.meter, self.dropped = name, n, k, meter, list[str]()
        self.checked: dict[WidePlan, bool] = {}
        self.device = meter.pool.device
        self.key, self.most = tables.device_key(self.device), multiprocessors(self.device)
        self.swiglu = name.endswith("gate_up")
        segments = tables.linear_entry(n, k, torch.bfloat16, self.key).segments
        every = [tile for height in HEIGHTS for tile in tiles(height)]
        plans = [WidePlan(n, k, segments, tile, None, self.swiglu) for tile in every]
        self.plans = [plan for plan in plans if plan.runs]

    def operands(self, rows: int, copies: int) -> tuple[Tensor, list[Weight], Tensor]:
        """Rows with memory behind them, so many copies of the weight, and room for the result."""
        self.meter.pool.reset()
        x = self.meter.pool.take(rows + SPARE_ROWS, self.k)[:rows]
        width = self.n // (2 if self.swiglu else 1)
        out = torch.full((rows, width), float("nan"), dtype=x.dtype, device=x.device)
        return x, [Weight(self.meter.pool.take(self.n, self.k)) for _ in range(copies)], out

    def in_triton(self, x: Tensor, weight: Weight, *, out: Tensor) -> Tensor:
        return (linear_swiglu_triton if self.swiglu else linear_triton)(x, weight, out=out)

    def same(self, plan: WidePlan) -> bool:
        """Whether a plan has Triton's bits, found out once; else, and where it fails, it is dropped."""
        if plan not in self.checked:
            self.checked[plan] = not (why := self.difference(plan))
            if why:
                self.dropped.append(f"{self.name} {plan.tile}: {why}")
        return self.checked[plan]

    def difference(self, plan: WidePlan) -> str:
        """What is wrong with a plan's results; "" where nothing is."""
        rows, programs = plan.compared
        x, (w,), got = self.operands(rows, 1)
        try:
            linear_gluon_wide(plan, x, w, out=got, programs=programs)
            want = self.in_triton(x, w, out=torch.empty_like(got))
        except Exception as error:  # a tile that does not compile is shown and left out
            return short(error)
        return "" if torch.equal(got.view(torch.int16), want.view(torch.int16)) else "DIFFERENT BITS"

    def forms(self, rows: int) -> dict[str, Callable[..., Any]]:
        """What is timed with so many rows, by name."""
        of = self.n, self.k, torch.bfloat16, self.key
        narrow, taken = (
            plan_of(*of, rows, swiglu=self.swiglu),
            wide_plan_of(*of, rows, self.swiglu, self.most),
        )
        found: dict[str, Callable[..., Any]] = {"Triton": self.in_triton}
        if narrow is not None and narrow.fits(self.most, workspace(self.device)):
            found["narrow"] = partial(linear_gluon, narrow)
        for plan in dict.fromkeys([*([taken] if taken else []), *candidates(self.plans, rows, self.most)]):
            if not self.same(plan):
                continue
            name = f"{plan.tile.rows} x {plan.tile.groups}{'*' if plan == taken else ''}"
            found[name] = partial(linear_gluon_wide, plan)
            if plan == taken and plan.count(rows) > self.most:
                found[f"{name}*"] = partial(linear_gluon_wide, plan, programs=plan.count(rows))
        return found

    def rehearse(self, counts: Sequence[int]) -> None:
        """Launch everything once, for a recording."""
        for rows in counts:
            x, (w,), out = self.operands(rows, 1)
            for plan in candidates(self.plans, rows, self.most):
                self.difference(plan)
            for call in self.forms(rows).values():
                call(x, w, out=out)
        self.checked.clear()
        self.dropped.clear()

    def tune(self, rows: int) -> Found:
        """Times of all forms that have the bits."""
        found, calls = Found(self.name, rows), self.forms(rows)
        copies = max(2, min((1 << 28) // (self.n * self.k), 12))
        x, ws, out = self.operands(rows, copies)
        products = torch.empty(rows, self.n, dtype=x.dtype, device=self.device)  # cuBLAS leaves SwiGLU out
        calls = {"cuBLAS": lambda x, w, out: torch.mm(x, w.dense().t(), out=products)} | calls
        for name, call in calls.items():
            found.us[name] = self.meter.time(partial(_on_copy, call, x, ws, out), copies).median
        return found


def _on_copy(call: Callable[..., Any], x: Tensor, weights: list[Weight], out: Tensor, i: int) -> Any:
    return call(x, weights[i], out=out)


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m bench.tune_wide --models 8B --rows 384 1024 --json runs/wide.json",
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8B"],
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=positive, default=list(ROWS), help="default: %(default)s")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    given = parser.parse_args(arguments)
    if max(given.rows) > MOST_ROWS:
        parser.error(f"--rows {max(given.rows)} is more than {MOST_ROWS}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "this measures kernels on a GPU, and there is none here")
    device = torch.device("cuda")
    if not HAS_GLUON or tables.device_key(device) != "sm_90":
        fail(COMMAND, "wide tiles are Gluon's, which needs a GPU of sm_90 and a Triton with Gluon")
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    print(machine_line(facts), flush=True)
    torch.manual_seed(0)
    meter = Meter(Pool(device, POOL), seconds=0.01)
    wanted = [(of.names[0], of.n, of.k) for of in weights(given.models, "sm_90")]
    tuners = [Tuner(*of, meter) for of in wanted if not of[0].endswith(" head")]
    with recorded() as launches:
        for tuner in tuners:
            tuner.rehearse(given.rows)
    lacked = missing(launches)
    compile_all(lacked, lambda: None)
    print(f"{len(lacked)} kernels compiled; {time.perf_counter() - began:.0f} s so far", flush=True)
    found: list[Found] = []
    for tuner in tuners:
        for rows in given.rows:
            found.append(tuner.tune(rows))
            print(" | ".join(found[-1].line), flush=True)
    title = "µs; * what the table takes, ** with a tile a program"
    report.print_tables([(title, HEAD, [of.line for of in found])])
    dropped = [line for tuner in tuners for line in tuner.dropped]
    print(*(f"left out: {line}" for line in dropped), sep="\n")
    print(f"{time.perf_counter() - began:.0f} s")
    if given.json:
        figures = {"machine": facts, "dropped": dropped, "times": [asdict(of) for of in found]}
        report.write_json(given.json, figures)
    return 1 if any("DIFFERENT BITS" in line for line in dropped) else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
