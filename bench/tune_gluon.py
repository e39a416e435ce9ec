"""The table of the linears in Gluon, src/orthrus_kernels/tables/gluon.json: which weights run in Gluon, with
how many rows, and in which tiles. A part of `make tune` (tune.py).

Every candidate is compared with Triton's kernel on all rows that it takes, bit for bit; one that differs is
named and never timed. For each number of rows the fastest number of warpgroups is taken, up to the rows
where Triton's kernel, or the wide tile that the weight's line has for them (tune_wide.py), is faster. For
weights of which each view has its own, one launch of both is measured too, at the rows of a one-pass
cycle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import Weight, tables
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_gluon import Plan, linear_gluon, multiprocessors
from orthrus_kernels.linear_gluon_wide import WidePlan, linear_gluon_wide
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.rows import SPARE_ROWS
from orthrus_kernels.tables.gluon import MOST_GROUPS, MOST_ROWS, GluonTile
from orthrus_kernels.workspace import workspace

from .command import short
from .measure import Meter

ROWS = (16, 32, 64, 96, 128, 192, 256)
MIXED = 33, 144  # rows of each view of a one-pass cycle
MIXED_TILES = 48, 144
OF_A_VIEW = "qkv", "o"  # names of weights of which each view has its own
KEPT = 1.02  # time over Triton's up to which a tile stays, so that noise cuts no table short


@dataclass
class Tuned:
    """What was found of a weight. us: of the fastest tile and of the fastest other launch, by rows."""

    n: int
    k: int
    tiles: list[GluonTile] = field(default_factory=list)
    both: list[tuple[GluonTile, GluonTile]] = field(default_factory=list)
    us: dict[str, tuple[float, float]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def row(self, device: str, measured: str, line: Mapping[str, Any]) -> dict[str, Any] | None:
        """Of gluon.json; None where Triton's kernel is faster with any rows. line: the one before, whose wide
        tiles stay, as tune_wide.py times them, and whose least rows."""
        kept = {name: line[name] for name in ("wide", "wide_measured") if name in line}
        if not self.tiles and not kept:
            return None
        least = line.get("least", 1) if self.tiles else MOST_ROWS + 1
        return {
            "n": self.n, "k": self.k, "dtype": "bfloat16", "device": device,
            **({"least": least} if least > 1 else {}),
            "tiles": [[tile.rows, tile.groups] for tile in self.tiles],
            "both": [[[tile.rows, tile.groups] for tile in pair] for pair in self.both],
            "measured": measured if self.tiles else None,
        } | kept  # fmt: skip


def tiles(rows: int) -> list[GluonTile]:
    """Every number of groups that a tile of so many rows may have."""
    found = []
    for groups in range(1, MOST_GROUPS + 1):
        try:
            found.append(GluonTile(rows, groups))
        except ValueError:  # too many registers
            continue
    return found


def chosen(us: dict[int, dict[GluonTile, float]], others: dict[int, float]) -> list[GluonTile]:
    """The fastest tile of each number of rows, up to the first where another launch is faster."""
    found = []
    for rows in sorted(us):
        if not us[rows]:
            break
        fastest = min(us[rows], key=lambda tile: us[rows][tile])
        if us[rows][fastest] > KEPT * others[rows]:
            break
        found.append(fastest)
    return found


class Tuner:
    """Compares and times the launches of one weight."""

    def __init__(
        self, n: int, k: int, names: Sequence[str], meter: Meter, device: torch.device,
        wide: Sequence[GluonTile] = (),
    ) -> None:  # fmt: skip
        """wide: those that the table has for many rows."""
        self.found, self.meter, self.device = Tuned(n, k), meter, device
        entry = tables.linear_entry(n, k, torch.bfloat16, tables.device_key(device))
        self.segments, self.space, self.most = entry.segments, workspace(device), multiprocessors(device)
        of = [name.split()[-1] for name in names]
        self.swiglu, self.two_views = "gate_up" in of, bool(set(of) & set(OF_A_VIEW))
        self.runs = entry.block_k == 64 and not (self.swiglu and entry.segments > 1)
        self.wide = [WidePlan(n, k, self.segments, tile, None, self.swiglu) for tile in wide]

    def operands(self, rows: int, copies: int) -> tuple[Tensor, list[Weight]]:
        """Rows with memory behind them, and so many copies of the weight."""
        self.meter.pool.reset()
        x = self.meter.pool.take(rows + SPARE_ROWS, self.found.k)[:rows]
        return x, [Weight(self.meter.pool.take(self.found.n, self.found.k)) for _ in range(copies)]

    def in_triton(self, x: Tensor, *of: Any, out: Tensor) -> Tensor:
        """What Gluon is compared with."""
        return linear_swiglu_triton(x, of[0], out=out) if self.swiglu else linear_triton(x, *of, out=out)

    def timed(self, plan: Plan | None, rows: int, n_ar: int | None = None) -> float:
        """Microseconds of a plan, or of Triton's kernel. n_ar: of both views."""
        copies = max(2, min(self.meter.pool.copies(self.found.n * self.found.k), 12))
        x, weights = self.operands(rows, copies)
        out = torch.empty(rows, self.found.n // (2 if self.swiglu else 1), dtype=x.dtype, device=self.device)
        run: Callable[..., Any] = self.in_triton
        if plan is not None:
            run = partial(linear_gluon_wide if isinstance(plan, WidePlan) else linear_gluon, plan)
        views = [(w, weights[i - 1], n_ar) if n_ar else (w,) for i, w in enumerate(weights)]
        return self.meter.time(lambda i: run(x, *views[i], out=out), copies).median

    def same(self, plan: Plan) -> bool:
        """Whether a plan has Triton's bits on all rows that it takes; else, and where it fails, it is
        dropped."""
        rows = sum(tile.rows for tile in plan.tiles)
        x, (w, w_diff) = self.operands(rows, 2)
        views = (w, w_diff, plan.tile.rows) if plan.tile_diff else (w,)
        width = self.found.n // (2 if self.swiglu else 1)
        got, want = (torch.full((rows, width), float("nan"), dtype=x.dtype, device=self.device) for _ in "ab")
        try:
            linear_gluon(plan, x, *views, out=got)
            self.in_triton(x, *views, out=want)
            why = "" if torch.equal(got.view(torch.int16), want.view(torch.int16)) else "DIFFERENT BITS"
        except Exception as error:  # a tile that does not compile is shown and left out
            why = short(error)
        if why:
            self.found.dropped.append(f"{self.found.n}x{self.found.k} in Gluon, {plan.tiles}: {why}")
        return not why

    def rehearse(self) -> None:
        """Launch everything once, for a recording."""
        if not self.runs:
            return
        for plan in [plan for rows in ROWS for plan in self.plans(rows)] + self.pairs():
            self.same(plan)
        self.found.dropped.clear()

    def other(self, rows: int) -> float:
        """Microseconds of what would run in place of a tile for so many rows: Triton's kernel, or the wide
        tile of the fewest clocks."""
        wide = min(self.wide, key=lambda plan: plan.clocks(rows, self.most), default=None)
        return min(self.timed(None, rows), self.timed(wide, rows) if wide else float("inf"))

    def plans(self, rows: int) -> list[Plan]:
        """Launches of one view for so many rows."""
        found, swiglu = self.found, self.swiglu
        plans = [Plan(found.n, found.k, self.segments, tile, None, swiglu) for tile in tiles(rows)]
        return [plan for plan in plans if plan.runs and plan.fits(self.most, self.space)]

    def pairs(self) -> list[Plan]:
        """Launches of both views, where each has a weight of its own. Of two numbers of groups the lower
        is 1."""
        found = [
            Plan(self.found.n, self.found.k, self.segments, ar, diffusion)
            for ar, diffusion in product(*map(tiles, MIXED_TILES))
            if ar.groups == diffusion.groups or 1 in (ar.groups, diffusion.groups)
        ]
        fit = [plan for plan in found if plan.runs and plan.fits(self.most, self.space)]
        return fit if self.two_views else []

    def apart(self, us: dict[int, dict[GluonTile, float]]) -> float:
        """Microseconds of a launch a view at MIXED rows, by the tiles that were chosen."""
        taken = [next((t for t in self.found.tiles if rows <= t.rows), None) for rows in MIXED]
        return sum(us[tile.rows][tile] if tile else float("inf") for tile in taken)

    def tune(self) -> Tuned:
        """All candidates of one view, then those of both."""
        found = self.found
        if not self.runs:
            return found
        us: dict[int, dict[GluonTile, float]] = {}
        others: dict[int, float] = {}
        for rows in ROWS:
            us[rows] = {plan.tile: self.timed(plan, rows) for plan in self.plans(rows) if self.same(plan)}
            others[rows] = self.other(rows)
            found.us[str(rows)] = min(us[rows].values(), default=float("inf")), others[rows]
        found.tiles = chosen(us, others)
        both = {plan: self.timed(plan, sum(MIXED), MIXED[0]) for plan in self.pairs() if self.same(plan)}
        if both:
            before = min(self.timed(None, sum(MIXED), MIXED[0]), self.apart(us))
            fastest = min(both, key=lambda plan: both[plan])
            found.us["mixed"] = both[fastest], before
            if both[fastest] < before and found.tiles and fastest.tile_diff is not None:
                found.both = [(fastest.tile, fastest.tile_diff)]
        return found
