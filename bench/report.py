"""What a bench run leaves: a table for every kernel, JSON, and a roofline picture."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3_model.cli.output import write_atomically

from .cases import OPS, OURS, Case
from .measure import Timing


@dataclass(frozen=True)
class Roofs:
    """What the machine does at best, measured in the same run: GB/s of a read, TFLOP/s of a bf16 matmul."""

    read: float
    matmul: float


@dataclass
class Result:
    """One case: times by name, and a word for each call that has none."""

    case: Case
    times: dict[str, Timing] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def gb_s(self) -> float | None:
        """Bytes that must move over our time."""
        return self.case.bytes / self.times[OURS].median / 1e3 if OURS in self.times else None

    @property
    def best_peer(self) -> tuple[str, float] | None:
        """The fastest peer and its median."""
        peers = {name: t.median for name, t in self.times.items() if name != OURS}
        return min(peers.items(), key=lambda item: item[1]) if peers else None

    @property
    def gain(self) -> float | None:
        """The fastest peer's time over ours: above 1 ours is faster."""
        best = self.best_peer
        return best[1] / self.times[OURS].median if best and OURS in self.times else None


def tables(results: Sequence[Result], roofs: Roofs) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, lines) for every operation that has results."""
    found = []
    for op in OPS:
        mine = [r for r in results if r.case.op == op]
        if not mine:
            continue
        peers = [n for n in dict.fromkeys(n for r in mine for n in (*r.times, *r.notes)) if n != OURS]
        what = "weight" if op == "linear" else "setting"
        optional = {
            what: lambda r: f"{r.case.name} {_nk(r.case)}" if r.case.name else "",
            "context": lambda r: f"{r.case.context}" if r.case.context is not None else "",
        }
        shown = {name: of for name, of in optional.items() if any(of(r) for r in mine)}
        head = ["model", *shown, "rows", "µs", "p20", "p80", "GB/s", "of roof", *peers, "best peer / ours"]
        lines = []
        for r in mine:
            ours = r.times.get(OURS)
            lines.append([
                r.case.model, *(of(r) for of in shown.values()), str(r.case.rows),
                *(number(t) for t in (ours.median, ours.p20, ours.p80)),
                f"{r.gb_s:.0f}", f"{r.gb_s / roofs.read:.0%}",
                *(_peer(r, name) for name in peers), f"{r.gain:.2f}x" if r.gain else "-",
            ] if ours and r.gb_s else [
                r.case.model, *(of(r) for of in shown.values()), str(r.case.rows), r.notes.get(OURS, "-"),
                "", "", "", "", *(_peer(r, name) for name in peers), "-",
            ])  # fmt: skip
        found.append((f"{op}: µs a call, cold L2", head, lines))
    return found


def card(cases: Sequence[Case], read: float) -> list[tuple[str, list[str], list[list[str]]]]:
    """What can be said without a GPU: bytes, operations and the time of reading the bytes at `read` GB/s."""
    found = []
    for op in OPS:
        lines = [
            [c.model, f"{c.name} {_nk(c)}".strip(), str(c.rows), str(c.context or ""), f"{c.bytes / 1e6:.2f}",
             f"{c.flops / 1e9:.2f}", number(c.bytes / read / 1e3)]
            for c in cases if c.op == op
        ]  # fmt: skip
        if lines:
            title = f"{op}: floor at {read:.0f} GB/s"
            found.append((title, ["model", "weight", "rows", "context", "MB", "GFLOP", "floor µs"], lines))
    return found


def summary(results: Sequence[Result]) -> list[str]:
    """For every operation and number of rows, the geometric mean of the best peer's time over ours."""
    said = []
    for op in OPS:
        gains: dict[int, list[float]] = {}
        for r in results:
            if r.case.op == op and r.gain:
                gains.setdefault(r.case.rows, []).append(r.gain)
        if gains:
            means = (f"{statistics.geometric_mean(g):.2f} at {rows}" for rows, g in sorted(gains.items()))
            said.append(f"{op}: best peer's time / ours, geometric mean by rows: {', '.join(means)}")
    return said


def print_tables(tables: Sequence[tuple[str, list[str], list[list[str]]]]) -> None:
    """On stdout, as wide as the terminal at most (80 columns where there is none, or what COLUMNS says)."""
    room = shutil.get_terminal_size((80, 24)).columns
    for title, head, lines in tables:
        print(f"\n{title}")
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        for shown in fitting(lines, widths, room):
            for line in [head, *lines]:
                first, *others = (line[i].rjust(widths[i]) for i in shown)
                print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
            print()


def fitting(lines: Sequence[Sequence[str]], widths: Sequence[int], room: int) -> list[list[int]]:
    """Columns of the tables that a table is printed as, each `room` wide at most with two spaces between
    columns. Every one begins with the columns that tell the lines apart."""
    names = next((n for n in range(1, len(widths)) if len({tuple(x[:n]) for x in lines}) == len(lines)), 1)
    found = [list(range(names))]
    for i in range(names, len(widths)):
        if len(found[-1]) > names and sum(widths[j] + 2 for j in (*found[-1], i)) - 2 > room:
            found.append(list(range(names)))
        found[-1].append(i)
    return found


def to_json(
    machine: dict[str, Any], roofs: Roofs, results: Sequence[Result], left_out: int
) -> dict[str, Any]:
    """The whole run; times in µs."""
    return {
        "machine": machine,
        "roof": {"read_gb_s": round(roofs.read, 1), "bf16_tflop_s": round(roofs.matmul, 1)},
        "cases": [
            {
                "op": r.case.op, "model": r.case.model, "name": r.case.name, "rows": r.case.rows,
                "context": r.case.context, "bytes": r.case.bytes, "flops": r.case.flops,
                "us": {name: asdict(timing) for name, timing in r.times.items()},
                "gb_s": r.gb_s and round(r.gb_s, 1),
                "share_of_read_roof": r.gb_s and round(r.gb_s / roofs.read, 4),
                "best_peer_over_ours": r.gain and round(r.gain, 4), "notes": r.notes,
            }
            for r in results
        ],
        "left_out": left_out,
    }  # fmt: skip


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def plot(path: Path, run: dict[str, Any], title: str) -> None:
    """`draw_roofline` of a run as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    draw_roofline(axes, run)
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_roofline(axes: Any, run: dict[str, Any]) -> None:
    """FLOP a byte against TFLOP/s on matplotlib's axes, one point a case of linear and attention, its best
    peer hollow; the lines are the roofs of the same run, a dict as of `to_json`."""
    read, matmul = run["roof"]["read_gb_s"], run["roof"]["bf16_tflop_s"]
    timed = [case for case in run["cases"] if case["flops"] and OURS in case["us"]]
    ridge = matmul * 1e3 / read
    top = max([2 * ridge, *(case["flops"] / case["bytes"] for case in timed)])
    axes.plot([0.5, ridge, top], [0.5 * read / 1e3, matmul, matmul], color="black", lw=1)
    axes.annotate(f"read roof {read:.0f} GB/s, matmul roof {matmul:.0f} TFLOP/s",
                  (ridge, matmul), ha="right", va="bottom")  # fmt: skip
    for op, colour in {"linear": "tab:blue", "attention": "tab:orange"}.items():
        points = [case for case in timed if case["op"] == op]
        if not points:
            continue
        x = [case["flops"] / case["bytes"] for case in points]
        y = [case["flops"] / case["us"][OURS]["median"] / 1e6 for case in points]
        axes.scatter(x, y, s=18, color=colour, label=f"{op}, ours", zorder=3)
        peers = [(a, b / case["best_peer_over_ours"]) for a, b, case in zip(x, y, points, strict=True)
                 if case["best_peer_over_ours"]]  # fmt: skip
        axes.scatter(*zip(*peers, strict=True) if peers else ([], []), s=30, facecolors="none",
                     edgecolors=colour, label=f"{op}, best peer")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that must move", ylabel="TFLOP/s")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right")


def number(value: float) -> str:
    """Three figures: 0.412, 12.3, 1234."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _nk(case: Case) -> str:
    """N x K of a linear."""
    return "{}x{}".format(*case.build.args[:2]) if case.op == "linear" else ""  # type: ignore[attr-defined]


def _peer(result: Result, name: str) -> str:
    return number(result.times[name].median) if name in result.times else result.notes.get(name, "-")[:24]
