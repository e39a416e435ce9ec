"""Make the launch tables of the linears anew on this GPU: src/orthrus_kernels/tables/linear.json for Triton,
gluon.json beside it for Gluon where that runs (tune_gluon.py).

Only what changes no bits is tuned: tile, warps, stages, and whether segments run side by side, for each
number of rows. A weight's reduction class (block_k, segments) stays what the table says, unless --new-class
is given, which changes the bits of every logit. First every candidate is compared with one row alone, bit for
bit; one that differs is named and never timed. A committed tile stays unless another is 2 % faster."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from orthrus_kernels import Weight, tables
from orthrus_kernels._gluon import HAS_GLUON
from orthrus_kernels.compile_ahead import compile_all, missing, recorded
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.tables import LinearEntry, LinearTile
from orthrus_kernels.tables.gluon import GluonTile
from qwen3_model.cli.output import write_atomically

from .command import Parser, fail, in_processes, positive, run, short, writable
from .kernels import POOL
from .measure import Meter, Pool, machine, machine_line
from .models import MODELS
from .report import number, print_tables, write_json
from .tune_gluon import ROWS as GLUON_ROWS
from .tune_gluon import Tuned, Tuner

COMMAND = "bench.tune"
TABLE = Path(tables.__file__).parent / "linear.json"
GLUON = TABLE.with_name("gluon.json")
KINDS = "triton", "gluon"
# Rows that a tile of the table serves: (up to, measured at). None: any number, a prompt's chunk.
BUCKETS: tuple[tuple[int | None, int], ...] = (
    (16, 8), (32, 32), (64, 64), (128, 128), (192, 192), (256, 256), (None, 1024),
)  # fmt: skip
# Values to try of each field that LinearTile has; what it has beyond these stays as in the committed tile.
# {least rows measured at: block_t}; multiples of 3 by descriptors alone
BLOCK_T = {1: (16,), 32: (32,), 64: (64,), 128: (64, 128), 192: (64, 96, 128, 192), 1024: (128, 192, 256)}
GRID: dict[str, tuple] = {
    "block_n": (32, 64, 128, 256),
    "split": (False, True),
    "warps": (4, 8),
    "stages": (3, 4, 6, 9),
    "tma": (False, True),
}
SHARED_KIB = 227  # of a CTA on sm_90; smaller devices refuse what does not fit, and that is shown
KEEP = 0.98  # time of another tile over the committed one's below which it takes its place
SLICES = ((0, 1), (3, 5), (0, 256), (7, 200), (128, 161), (17, 81), (250, 256), (0, 33))


@dataclass(frozen=True)
class NamedShape:
    """The shape of a linear weight of some models, and where its reduction class starts."""

    n: int
    k: int
    names: tuple[str, ...]
    entry: LinearEntry


def weights(models: Sequence[str], device: str) -> list[NamedShape]:
    """The distinct weights of the models with their committed or default entries."""
    named: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for name, shape in MODELS[model].weights().items():
            named.setdefault(shape, []).append(f"{model} {name}")
    return [
        NamedShape(n, k, tuple(names), tables.linear_entry(n, k, torch.bfloat16, device))
        for (n, k), names in named.items()
    ]


def candidates(entry: LinearEntry, rows: int) -> list[LinearTile]:
    """Tiles to try for `rows` rows within the class of `entry`, the committed one first. Extend GRID or
    BLOCK_T to try more.

    Left out: what does not fit shared memory, and accumulators of more than 128 registers a thread (two of
    them, when segments run one after another): those spill."""
    committed = replace(entry.tile(rows), rows=None)
    has = {f.name for f in fields(LinearTile)}
    block_t = BLOCK_T[max(least for least in BLOCK_T if least <= rows)]
    grid = {"block_t": block_t, **{name: values for name, values in GRID.items() if name in has}}
    found = [committed]
    for values in itertools.product(*grid.values()):
        tile = replace(committed, **dict(zip(grid, values, strict=True)))
        if (tile.split and entry.segments == 1) or (tile.block_t % 3 == 0 and not tile.tma):
            continue  # the same launch as without, or none
        shared = (tile.block_n + tile.block_t) * entry.block_k * 2 * tile.stages
        accumulators = 1 if tile.split or entry.segments == 1 else 2
        registers = tile.block_n * tile.block_t * accumulators / (32 * tile.warps)
        if shared <= SHARED_KIB * 1024 and registers <= 128 and (tile.warps == 4 or tile.block_n >= 128):
            found.append(tile)
    return list(dict.fromkeys(found))


def classes(weight: NamedShape, new: bool) -> list[tuple[int, int]]:
    """Reduction classes to try: the weight's own alone, unless new ones are asked for."""
    own = weight.entry.block_k, weight.entry.segments
    if not new:
        return [own]
    other = [
        (block_k, segments)
        for block_k in (64, 128)
        for segments in (1, 2, 4, 8)
        if weight.k // segments >= 512
    ]
    return list(dict.fromkeys([own, *other]))


def one_tile(entry: LinearEntry, tile: LinearTile) -> LinearEntry:
    """The entry with this tile for any number of rows."""
    return replace(entry, tiles=(replace(tile, rows=None),), measured=None)


def of_class(entry: LinearEntry, block_k: int, segments: int) -> LinearEntry:
    """The entry in another class. In its own class it stays as it is."""
    return replace(entry, block_k=block_k, segments=segments)


def differing(
    x: torch.Tensor, w: Weight, entry: LinearEntry, tiles: Iterable[LinearTile]
) -> dict[LinearTile, str]:
    """Tiles whose bits are not those of one row alone, or that fail, and why. x [256, K], w [N, K]."""
    bad: dict[LinearTile, str] = {}
    tiles = list(tiles)
    first = one_tile(entry, tiles[0])
    alone = torch.cat([linear_triton(x[i : i + 1], w, entry=first) for i in range(len(x))])
    slices = [(a, min(b, len(x))) for a, b in SLICES if a < len(x)]
    for tile in tiles:
        try:
            differ = sum(
                not torch.equal(linear_triton(x[a:b], w, entry=one_tile(entry, tile)), alone[a:b])
                for a, b in slices
            )
        except Exception as error:  # a tile that does not compile or fit is shown and left out
            bad[tile] = short(error)
            continue
        if differ:
            bad[tile] = f"DIFFERENT BITS in {differ} of {len(slices)} comparisons"
    return bad


def hard_rows(*shape: int, device: torch.device) -> torch.Tensor:
    """Normal numbers scaled by 2^-15 .. 2^15, whose sums show their order. bf16."""
    scale = torch.exp2(torch.randint(-15, 16, shape, device=device).float())
    return (torch.randn(*shape, device=device) * scale).bfloat16()


def choose(
    timed: dict[tuple[int, int], dict[int, dict[LinearTile, float]]],
    own: tuple[int, int],
    committed: dict[int, LinearTile],
) -> tuple[tuple[int, int], dict[int, LinearTile]]:
    """(class, tile by rows measured) from µs by class, rows and tile. Own class and committed tiles stay
    unless others are faster by more than 1 - KEEP; a class counts by its geometric mean over rows."""
    scores = {
        c: statistics.geometric_mean(min(tiles.values()) for tiles in by_rows.values())
        for c, by_rows in timed.items()
        if by_rows and all(by_rows.values())
    }
    best = min(scores, key=lambda c: scores[c])
    if own in scores and scores[best] > KEEP * scores[own]:
        best = own
    chosen = {}
    for rows, tiles in timed[best].items():
        fastest = min(tiles, key=lambda t: tiles[t])
        kept = committed[rows]
        stays = best == own and kept in tiles and tiles[fastest] > KEEP * tiles[kept]
        chosen[rows] = kept if stays else fastest
    return best, chosen


def table_row(
    weight: NamedShape, device: str, reduction: tuple[int, int], chosen: dict[int, LinearTile], measured: str
) -> dict[str, Any]:
    """A row of linear.json; tiles are lists in the order of LinearTile's fields."""
    tiles = [replace(chosen[rows], rows=limit) for limit, rows in BUCKETS]
    return {
        "n": weight.n, "k": weight.k, "dtype": "bfloat16", "device": device, "block_k": reduction[0],
        "segments": reduction[1], "tiles": [list(asdict(tile).values()) for tile in tiles],
        "apart": weight.entry.apart, "measured": measured,
    }  # fmt: skip


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows, those of the same weight, dtype and device replaced in place; new weights at the end."""

    def key(row: dict[str, Any]) -> tuple:
        return row["n"], row["k"], row["dtype"], row["device"]

    rows = {key(row): row for row in old}
    rows.update({key(row): row for row in new})
    return list(rows.values())


def table_text(rows: list[dict[str, Any]]) -> str:
    """linear.json: a JSON list, a row a line, so that a change of one weight is a change of one line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def compile_share(jobs: list[tuple[LinearEntry, LinearTile]], index: int, of: int) -> list[str]:
    """A compile worker: launch its share of the tiles once on a small weight, for Triton's disk cache."""
    x = torch.zeros(512, 4096, device="cuda", dtype=torch.bfloat16)
    w = Weight(torch.zeros_like(x))
    for entry, tile in jobs[index::of]:
        try:
            linear_triton(x, w, entry=one_tile(entry, tile))
        except Exception:  # noqa: S110  shown by `differing`, which tries it again
            continue
    torch.cuda.synchronize()
    return []


def tune(weight: NamedShape, meter: Meter, new_class: bool, device: torch.device) -> dict[str, Any]:
    """Check and time every candidate of a weight; its choice and all figures."""
    own = weight.entry.block_k, weight.entry.segments
    timed: dict[tuple[int, int], dict[int, dict[LinearTile, float]]] = {}
    dropped: list[str] = []
    for c in classes(weight, new_class):
        entry = of_class(weight.entry, *c)
        by_rows = {rows: candidates(entry, rows) for _, rows in BUCKETS}
        everything = list(dict.fromkeys(t for tiles in by_rows.values() for t in tiles))
        x = hard_rows(256, weight.k, device=device)
        w = Weight(hard_rows(weight.n, weight.k, device=device))
        bad = differing(x, w, entry, everything)
        del x, w
        dropped += [f"{weight.n}x{weight.k} {c} {tile}: {why}" for tile, why in bad.items()]
        timed[c] = {}
        for rows, tiles in by_rows.items():
            meter.pool.reset()
            x = meter.pool.take(rows, weight.k)
            out = torch.empty(rows, weight.n, dtype=x.dtype, device=device)
            copies = min(meter.pool.copies(weight.n * weight.k), 12)
            ws = [Weight(meter.pool.take(weight.n, weight.k)) for _ in range(copies)]
            times = {}
            for tile in (t for t in tiles if t not in bad):
                single = one_tile(entry, tile)
                try:
                    times[tile] = meter.time(
                        lambda i, x=x, ws=ws, out=out, single=single: linear_triton(  # type: ignore[misc]
                            x, ws[i], out=out, entry=single
                        ),
                        copies,
                    ).median
                except Exception as error:
                    dropped.append(f"{weight.n}x{weight.k} {c} {tile}: {short(error)}")
            timed[c][rows] = times
    committed = {rows: replace(weight.entry.tile(rows), rows=None) for _, rows in BUCKETS}
    chosen_class, chosen = choose(timed, own, committed)
    return {
        "weight": weight, "class": chosen_class, "own": own, "chosen": chosen, "committed": committed,
        "times": timed, "dropped": dropped,
    }  # fmt: skip


def report_line(result: dict[str, Any]) -> list[str]:
    """Name, class, and for each number of rows the committed and the chosen tile's µs."""
    weight, times = result["weight"], result["times"]
    before = times.get(result["own"], {})
    cells = []
    for rows, tile in result["chosen"].items():
        old = before.get(rows, {}).get(result["committed"][rows])
        new = times[result["class"]][rows][tile]
        cells.append(f"{old:.1f} > {new:.1f}" if old else f"{new:.1f}")
    changed = "" if result["class"] == result["own"] else " (new)"
    name = f"{weight.n}x{weight.k} {', '.join(weight.names)}"
    return [name, "k{} s{}".format(*result["class"]) + changed, *cells]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description="Make the launch table of the linears anew on this GPU.",
        epilog="example: python -m bench.tune --models 8B --out runs/linear.json",
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all"
    )
    parser.add_argument(
        "--out", type=writable, default=TABLE, help="the table to write; default: %(default)s"
    )
    parser.add_argument(
        "--gluon-out", type=writable, default=GLUON, help="the table of Gluon; default: %(default)s"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kernels to tune; default: %(default)s"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    parser.add_argument(
        "--new-class",
        action="store_true",
        help="try other reduction classes too: the bits of all logits change, and with them recorded texts",
    )
    parser.add_argument(
        "--workers", type=positive, default=min(12, os.cpu_count() or 1), help="processes that compile ahead"
    )
    given = parser.parse_args(arguments)
    if given.new_class and "gluon" in given.kinds:
        parser.error(
            "--new-class is of --kinds triton: tune Gluon behind it, in the classes of the new table"
        )
    return given


def tune_triton(
    given: Any, wanted: Sequence[NamedShape], meter: Meter, measured: str, began: float
) -> list[dict[str, Any]]:
    """Tune Triton's kernels and write their table; what was found of each weight."""
    device = meter.pool.device
    key = tables.device_key(device)
    jobs = dict.fromkeys(
        (replace(of_class(w.entry, *c), tiles=(), measured=None), tile)
        for w in wanted
        for c in classes(w, given.new_class)
        for _, rows in BUCKETS
        for tile in candidates(of_class(w.entry, *c), rows)
    )
    print(f"{len(wanted)} weights, {len(jobs)} kernels to compile with {given.workers} processes", flush=True)
    for line in in_processes(compile_share, (list(jobs),), min(given.workers, len(jobs)), 600):
        print(f"  {line}", flush=True)
    results = []
    for weight in wanted:
        results.append(tune(weight, meter, given.new_class, device))
        done = f"[{time.perf_counter() - began:.0f} s]"
        print(done, " | ".join(report_line(results[-1])), flush=True)
    rows = [table_row(r["weight"], key, r["class"], r["chosen"], measured) for r in results]
    write_atomically(given.out, table_text(merged(json.loads(TABLE.read_text()), rows)))
    head = ["weight", "class", *(f"{rows} rows µs" for _, rows in BUCKETS)]
    print_tables([("committed > chosen", head, [report_line(r) for r in results])])
    print(f"{given.out}: {len(rows)} weights for {key}; {time.perf_counter() - began:.0f} s")
    return results


def tune_gluon(
    given: Any, wanted: Sequence[NamedShape], meter: Meter, measured: str, began: float
) -> list[Tuned]:
    """Tune the linears in Gluon and write their table; what was found of each weight."""
    device = meter.pool.device
    key = tables.device_key(device)
    before = {(r["n"], r["k"], r["dtype"], r["device"]): r for r in json.loads(GLUON.read_text())}
    lines = [before.pop((w.n, w.k, "bfloat16", key), {}) for w in wanted]
    tuners = [
        Tuner(w.n, w.k, w.names, meter, device, [GluonTile(*tile) for tile in line.get("wide", ())])
        for w, line in zip(wanted, lines, strict=True)
    ]
    with recorded() as launches:
        for tuner in tuners:
            tuner.rehearse()
    lacked = missing(launches)
    print(f"{len(lacked)} kernels in Gluon to compile with {given.workers} processes", flush=True)
    compile_all(lacked, lambda: None, given.workers)
    found = []
    for tuner in tuners:
        found.append(tuner.tune())
        print(f"[{time.perf_counter() - began:.0f} s] {' | '.join(gluon_line(found[-1]))}", flush=True)
    made = [of.row(key, measured, line) for of, line in zip(found, lines, strict=True)]
    old, rows = list(before.values()), [row for row in made if row is not None]
    write_atomically(given.gluon_out, table_text([*old, *rows]))
    head = ["weight", *(f"{count} rows" for count in GLUON_ROWS), "both views"]
    print_tables([("µs in Gluon, of the fastest other launch", head, [gluon_line(of) for of in found])])
    print(f"{given.gluon_out}: {len(rows)} weights for {key}; {time.perf_counter() - began:.0f} s")
    return found


def gluon_line(found: Tuned) -> list[str]:
    """A weight, and for each number of rows the fastest tile's µs and those of what would run else."""
    cells = [", ".join(map(number, found.us[of])) if of in found.us else "-"
             for of in (*map(str, GLUON_ROWS), "mixed")]  # fmt: skip
    return [f"{found.n}x{found.k}", *cells]


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "tuning measures a GPU, and there is none here; the committed table serves as it is")
    began = time.perf_counter()
    device = torch.device("cuda")
    key = tables.device_key(device)
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    print(machine_line(facts), flush=True)
    torch.manual_seed(0)
    wanted, meter = weights(given.models, key), Meter(Pool(device, POOL), seconds=0.005)
    measured = f"{facts['gpu']}, triton {facts['triton']}, {facts['date']}: bench.tune"
    results, in_gluon = [], []
    if "triton" in given.kinds:
        results = tune_triton(given, wanted, meter, measured, began)
    if "gluon" in given.kinds and HAS_GLUON and key == "sm_90":
        linears = [w for w in wanted if not any(name.endswith(" head") for name in w.names)]
        in_gluon = tune_gluon(given, linears, meter, measured, began)
    dropped = [line for r in results for line in r["dropped"]] + [
        line for of in in_gluon for line in of.dropped
    ]
    wrong = [line for line in dropped if "DIFFERENT BITS" in line]
    print(*(f"left out: {line}" for line in dropped), sep="\n")
    if given.json:
        figures = [
            {"n": r["weight"].n, "k": r["weight"].k, "block_k": c[0], "segments": c[1], "rows": n,
             "tile": asdict(tile), "us": us}
            for r in results for c, by_rows in r["times"].items() for n, tiles in by_rows.items()
            for tile, us in tiles.items()
        ]  # fmt: skip
        gluon = [asdict(of) for of in in_gluon]
        write_json(given.json, {"machine": facts, "dropped": dropped, "times": figures, "gluon": gluon})
    if wrong:
        print(f"{len(wrong)} candidates gave other bits: the promise rests on this never happening")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
