"""Which tiles suit linears with quantised weights? Times candidates by format and rows on this GPU.

All weights of a format share one list of tiles (`tables._TILES_QUANTISED`, of W8A8 `_TILES_ROUNDED`), so a
candidate counts by its sum over the matrices of a layer: qkv, o, gate and up with SwiGLU, down. Every
candidate is compared with the committed tile first, bit for bit, on rows whose sums show their order; one
that differs is named and never timed. A call of W8A8 rounds its rows first. Tiles of the linears in Gluon are
tried beside them, more rows than 128 in one tall tile and in two launches.

Random codes; a call reads weights that are not in the cache. Nothing is written but --json. The lines at the
end are those of the fastest tiles for src/orthrus_kernels/tables/gluon_codes.json."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import tables
from orthrus_kernels._gluon import HAS_GLUON
from orthrus_kernels.compile_ahead import compile_all, missing, recorded
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_gluon import Plan, multiprocessors
from orthrus_kernels.linear_gluon_codes import linear_gluon_codes, plan_with, rows_of_launches
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.quantise_rows import quantise_rows_triton
from orthrus_kernels.quantised import Format, QuantisedWeight, Scheme
from orthrus_kernels.quantised_triton import groups_at_once
from orthrus_kernels.rows import new_rows
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.tables.gluon import TALL, coded_tiles
from orthrus_kernels.workspace import workspace

from .command import Parser, fail, positive, run, short, writable
from .measure import Meter, Pool, machine, machine_line
from .models import QUANTISED, Shape
from .report import number, print_tables, write_json

COMMAND = "bench.tune_codes"
Call = Callable[..., Tensor]
COMMITTED, GLUON = "committed", "Gluon"
MOST_ROWS = 128  # of a tile in Gluon that is not tall
ROWS = (1, 32, 64, 128, 192)
NAMES = "qkv", "o", "gate_up", "down"
COPIES = 12  # of a weight, so that none is in the cache when it is read again
POOL = 1 << 23
# Candidates (block_t, block_n, split, warps, stages) by the least rows that they are for, each with one group
# and with two a round. Few rows wait for what follows one another in a round: more CTAs a multiprocessor, and
# fewer barriers a group. From 64 rows on what counts is how often words are widened: taller tiles.
CANDIDATES: dict[int, tuple[tuple[int, int, bool, int, int], ...]] = {
    1: ((16, 64, True, 4, 3), (16, 64, True, 4, 4), (16, 64, True, 4, 6), (16, 128, True, 4, 4),
        (16, 128, True, 8, 4)),
    32: ((32, 64, True, 4, 3), (32, 64, True, 4, 4), (32, 64, True, 4, 6), (32, 128, True, 8, 4)),
    64: ((64, 64, True, 4, 4), (64, 64, False, 4, 4), (64, 128, True, 8, 3), (64, 128, True, 8, 4)),
    128: ((64, 64, True, 4, 4), (64, 128, True, 8, 3), (64, 128, False, 8, 3), (128, 128, True, 8, 3),
          (128, 64, True, 4, 3)),
}  # fmt: skip
# Of W8A8, where nothing is widened: as wide as registers allow.
CANDIDATES_ROUNDED: dict[int, tuple[tuple[int, int, bool, int, int], ...]] = {
    1: ((16, 64, True, 4, 4), (16, 64, True, 4, 6), (16, 128, True, 8, 4)),
    32: ((32, 64, True, 4, 4), (32, 64, True, 4, 6), (32, 128, True, 8, 4)),
    64: ((64, 64, True, 4, 4), (64, 128, True, 8, 4), (64, 128, True, 4, 4)),
    128: ((64, 128, True, 8, 4), (64, 128, False, 8, 4), (128, 64, True, 4, 3), (128, 64, True, 4, 4),
          (128, 128, True, 8, 3), (128, 128, True, 8, 4), (256, 64, True, 8, 3), (64, 256, True, 8, 3)),
}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer, in several copies of random codes."""

    name: str
    n: int
    k: int
    copies: tuple[QuantisedWeight, ...]

    @property
    def scheme(self) -> Scheme:
        return self.copies[0].scheme

    def entry(self, tile: LinearTile, device: str) -> LinearEntry:
        """The weight's class with this tile; gate and up never split."""
        of = tables.linear_entry(self.n, self.k, torch.bfloat16, device, self.scheme)
        tile = replace(tile, rows=None, split=tile.split and self.name != "gate_up")
        entry = replace(of, tiles=(tile,), measured=None, apart=None)
        return tables.fitted(entry, torch.bfloat16, device, self.scheme)

    def calls(self, rows: int, device: str, gluon: bool) -> dict[str, Call]:
        """What is compared and timed, the products of rows with a copy: by the committed tiles, by each
        candidate, and, if asked for, in Gluon where its programs all run at once."""
        swiglu = self.name == "gate_up"
        kernel: Callable[..., Tensor] = linear_swiglu_triton if swiglu else linear_triton
        found: dict[str, Call] = {COMMITTED: lambda x, i: kernel(x, self.copies[i])}
        for tile in candidates(rows, self.scheme):
            entry = self.entry(tile, device)
            if groups_at_once(self.copies[0], entry, entry.tiles[0]) != tile.at_once:
                continue
            found[said(tile)] = lambda x, i, entry=entry: kernel(x, self.copies[i], entry=entry)
        heights = {rows_of_launches(rows, most, self.scheme.rounds) for most in (MOST_ROWS, TALL)}
        for height in sorted(heights) if gluon else ():
            for coded in coded_tiles(height, self.scheme.format.bits, self.scheme.rounds):
                plan = plan_with(self.copies[0], device, coded, swiglu)
                if self.runs(plan, device):
                    way = f"{GLUON}, {-(-rows // height)} x {coded.rows} rows by {64 * coded.groups}"
                    found[way] = partial(self.in_gluon, plan, height)
        return found

    def runs(self, plan: Plan, device: str) -> bool:
        """Whether the GPU takes a plan."""
        on = self.copies[0].words.device
        fits = plan.runs and plan.fits(multiprocessors(on), workspace(on))
        return fits and device == "sm_90" and HAS_GLUON and on.type == "cuda"

    def in_gluon(self, plan: Plan, height: int, x: Tensor, i: int) -> Tensor:
        """Rows in launches of `height`."""
        out = new_rows(x, len(x), self.n // 2 if plan.swiglu else self.n)
        taken = quantise_rows_triton(x) if self.scheme.rounds else x
        for first in range(0, len(x), height):
            rows = slice(first, first + height)
            linear_gluon_codes(plan, taken[rows], self.copies[i], out=out[rows])
        return out


def random_weight(n: int, k: int, scheme: Scheme, device: torch.device) -> QuantisedWeight:
    """Numbers of every size and no NaN."""
    weight = QuantisedWeight.new(
        n, k, scheme.format, scheme.group, zeros=scheme.zeros, scale=torch.bfloat16, dtype=torch.bfloat16,
        device=device, factor_rows=scheme.factor_rows, rounds=scheme.rounds,
    )  # fmt: skip
    codes = torch.randint(1 << scheme.format.bits, (n, k), dtype=torch.uint8, device=device)
    if scheme.format is Format.E4M3:
        codes[codes & 0x7F == 0x7F] = 0
    groups = n, k // scheme.group
    scale = torch.exp2(-8 * torch.rand(groups, device=device))
    scale = scale[:: scheme.factor_rows].repeat_interleave(scheme.factor_rows, 0)[:n]
    zero = torch.randint(17, groups, dtype=torch.uint8, device=device) if scheme.zeros else None
    weight.put(0, codes, scale, zero)
    return weight


def scheme_of(shape: Shape) -> Scheme:
    """Of the AR view's weights of a quantised model."""
    assert shape.form is not None
    eight = shape.form.name == Format.E4M3.value
    rounds = shape.activations is not None
    return Scheme(Format.E4M3, 128, False, 128, rounds) if eight else Scheme(Format.INT4, 128, True)


def matrices(shape: Shape, device: torch.device, copies: int = COPIES) -> list[Matrix]:
    """Of one layer."""
    scheme, sizes = scheme_of(shape), shape.weights()
    return [
        Matrix(name, *sizes[name], tuple(random_weight(*sizes[name], scheme, device) for _ in range(copies)))
        for name in NAMES
    ]


def candidates(rows: int, scheme: Scheme) -> list[LinearTile]:
    """Tiles to try for so many rows."""
    of_rows = CANDIDATES_ROUNDED if scheme.rounds else CANDIDATES
    least = max(least for least in of_rows if least <= rows)
    return [LinearTile(None, *of, at_once=at_once) for of in of_rows[least] for at_once in (1, 2)]


def hard_rows(rows: int, k: int, device: torch.device) -> Tensor:
    """Normal numbers scaled by 2^-6 .. 2^6, whose sums show their order: bf16."""
    scale = torch.exp2(torch.randint(-6, 7, (rows, k), device=device).float())
    return (torch.randn(rows, k, device=device) * scale).bfloat16()


@dataclass
class Found:
    """Of a model and a number of rows: µs by way and matrix. A way is COMMITTED, a tile, or one in GLUON."""

    model: str
    rows: int
    us: dict[str, dict[str, float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def total(self, way: str) -> float:
        """µs of a layer; infinite where a matrix is missing."""
        return sum(self.us[way].get(name, float("inf")) for name in NAMES)

    def lines(self, layers: int) -> list[list[str]]:
        """The fastest ways first."""
        found = []
        for way in sorted(self.us, key=self.total):
            every = [*(self.us[way].get(name) for name in NAMES), self.total(way) * layers / 1000]
            cells = ["-" if of in (None, float("inf")) else number(of) for of in every]
            found.append([self.model, str(self.rows), way, *cells])
        return found


def said(tile: LinearTile) -> str:
    """A tile in a few letters."""
    split = "split" if tile.split else "whole"
    pairs = ", pairs" if tile.at_once == 2 else ""
    return f"{tile.block_t} x {tile.block_n}, {split}, {tile.warps} warps, {tile.stages} stages{pairs}"


def measure(model: str, of: Sequence[Matrix], rows: int, meter: Meter, device: str, gluon: bool) -> Found:
    """Compare and time every way of every matrix."""
    found, on = Found(model, rows), meter.pool.device
    for matrix in of:
        x = hard_rows(rows, matrix.k, on)
        calls = matrix.calls(rows, device, gluon)
        want = calls[COMMITTED](x, 0)
        for way, call in calls.items():
            name = f"{model}, {rows} rows, {matrix.name}, {way}"
            try:
                if not torch.equal(call(x, 0).view(torch.int16), want.view(torch.int16)):
                    found.wrong.append(name)
                    continue
                us = meter.time(lambda i, call=call, x=x: call(x, i), len(matrix.copies)).median  # type: ignore[misc]
            except Exception as error:  # a tile that does not compile or fit is shown and left out
                found.left_out.append(f"{name}: {short(error)}")
                continue
            found.us.setdefault(way, {})[matrix.name] = us
    return found


def rehearse(of: Sequence[Matrix], rows: Sequence[int], device: str, gluon: bool) -> int:
    """Compile in processes what will be launched; how many kernels were not there."""
    with recorded() as launches:
        for matrix in of:
            for count in rows:
                x = torch.zeros(count, matrix.k, dtype=torch.bfloat16, device=matrix.copies[0].words.device)
                for call in matrix.calls(count, device, gluon).values():
                    call(x, 0)
    lacked = missing(launches)
    if lacked:
        compile_all(lacked, lambda: None)
    return len(lacked)


def table(results: Sequence[Found], stacks: dict[str, list[Matrix]], device: str, measured: str) -> list[str]:
    """Lines of gluon_codes.json: of each matrix the fastest tiles in Gluon, down to the rows where Triton's
    best is faster: what is faster below those has none. Fewer rows than the fewest measured run in Triton."""
    lines = []
    for model, of in stacks.items():
        for matrix in of:
            tiles, least = dict[int, int](), 1
            mine = [of for of in results if of.model == model]
            for found in sorted(mine, key=lambda of: -of.rows):
                us = {way: by[matrix.name] for way, by in found.us.items() if matrix.name in by}
                fastest = min(us, key=lambda way: us[way], default="")
                if not fastest.startswith(GLUON):
                    least = found.rows + 1
                    break
                least = found.rows
                rows, outputs = re.findall(r"x (\d+) rows by (\d+)", fastest)[0]
                tiles[int(rows)] = int(outputs) // 64
            if tiles:
                row = {"n": matrix.n, "k": matrix.k, "bits": matrix.scheme.format.bits, "device": device,
                       "least": least, "tiles": [list(of) for of in sorted(tiles.items())],
                       "measured": measured}  # fmt: skip
                row |= {"rounds": True} if matrix.scheme.rounds else {}
                lines.append(json.dumps(row))
    return lines


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m bench.tune_codes --models 8B-int4 --rows 1 64 --json runs/codes.json",
    )
    parser.add_argument("--models", nargs="+", choices=list(QUANTISED), default=["8B-fp8", "8B-int4"],
                        metavar="MODEL", help="such as 1.7B-int4; default: %(default)s")  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=positive, default=list(ROWS), help="default: %(default)s")
    parser.add_argument("--no-gluon", action="store_true", help="try Triton's tiles alone")
    parser.add_argument("--seconds", type=positive, default=240,
                        help="start nothing after this long; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "this measures kernels on a GPU, and there is none here")
    device = torch.device("cuda")
    key = tables.device_key(device)
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    print(machine_line(facts), flush=True)
    torch.manual_seed(0)
    meter = Meter(Pool(device, POOL), seconds=0.01)
    stacks = {model: matrices(QUANTISED[model], device) for model in given.models}
    gluon = not given.no_gluon
    compiled = sum(rehearse(of, given.rows, key, gluon) for of in stacks.values())
    print(f"{compiled} kernels compiled; {time.perf_counter() - began:.0f} s so far", flush=True)
    results: list[Found] = []
    for model, of in stacks.items():
        for rows in given.rows:
            if time.perf_counter() - began > given.seconds:
                print(f"{model}, {rows} rows: left out, {given.seconds} s were up (--seconds)")
                continue
            results.append(measure(model, of, rows, meter, key, gluon))
    head = ["model", "rows", "way", *(f"{name} µs" for name in NAMES), "all layers ms"]
    every = [line for found in results for line in found.lines(QUANTISED[found.model].layers)]
    print_tables([("Linears alone, each read from memory; fastest first", head, every)])
    for kind in ("wrong", "left_out"):
        for name in (name for found in results for name in getattr(found, kind)):
            print(f"{'DIFFERENT BITS' if kind == 'wrong' else 'left out'}: {name}")
    best = [found.lines(QUANTISED[found.model].layers)[0] for found in results if found.us]
    print_tables([("The fastest", head, best)])
    measured = f"{facts['gpu']}, {facts['date']}, {COMMAND}"
    print(*table(results, stacks, key, measured), sep=",\n")
    print(f"{time.perf_counter() - began:.0f} s")
    if given.json:
        write_json(given.json, {"machine": facts, "results": [asdict(found) for found in results]})
    return 1 if any(found.wrong for found in results) else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
