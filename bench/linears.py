"""The linears of all layers in one graph, in Triton, in Gluon and in cuBLAS: are the bits equal, and how long
does it take?

Random weights at the shapes of Qwen3, bf16; gate and up with SwiGLU, which cuBLAS leaves out. Before a stack
is timed every layer's results of both kernels are compared, bit for bit. Times are **sustained**: half a
second of replays in a row, of which the second half counts, since a GPU that was idle runs faster until it is
warm. Its clock and power are read in that half."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels import Weight, backend_ops, pdl_kinds
from orthrus_kernels.compile_ahead import compile_all, missing, recorded
from orthrus_kernels.linear import linear_triton
from orthrus_kernels.linear_either import launches_of, why_not
from orthrus_kernels.linear_swiglu import linear_swiglu_triton
from orthrus_kernels.rows import SPARE_ROWS
from orthrus_kernels.switches import GLUON, gluon_is_on

from . import report
from .command import Parser, fail, positive, run, writable
from .measure import Pool, machine, machine_line
from .models import MODELS, Shape

COMMAND = "bench.linears"
ROWS = (1, 32, 64, 128, 192, 256)
MIXED = 33, 144  # rows of each view of a one-pass cycle
POOL = 1 << 31  # bf16 numbers: memory comes again behind 4 GiB of other weights
SECONDS = 0.5  # of replays in a row
FORMS = "cuBLAS", "Triton", "Gluon"
NAMES = "qkv", "o", "gate_up", "down"
OF_A_VIEW = "qkv", "o"  # weights that each view has of its own


@dataclass(frozen=True)
class Calls:
    """How a form computes a linear of both views, and gate and up."""

    linear: Callable[..., Any]
    swiglu: Callable[..., Any]


class Stack:
    """All layers' linears on rows [0, n_ar) of the AR view and the others of the diffusion view."""

    def __init__(self, shape: Shape, rows: int, n_ar: int, pool: Pool) -> None:
        self.rows, self.n_ar = rows, n_ar
        self.sizes = {name: shape.weights()[name] for name in NAMES}
        self.inputs = {name: pool.take(rows + SPARE_ROWS, k)[:rows] for name, (_, k) in self.sizes.items()}
        like: dict[str, Any] = {"dtype": torch.bfloat16, "device": pool.device}
        self.outputs = {name: torch.empty(rows, n, **like) for name, (n, _) in self.sizes.items()}
        self.activated = torch.empty(rows, shape.F, **like)
        self.layers = [self._layer(pool) for _ in range(shape.layers)]

    def _layer(self, pool: Pool) -> dict[str, tuple[Weight, ...]]:
        """The weights of a layer by name, of each view that has rows."""
        mixed = self.n_ar < self.rows
        return {
            name: tuple(_weight(pool, *size) for _ in range(2 if mixed and name in OF_A_VIEW else 1))
            for name, size in self.sizes.items()
        }

    def results(self, calls: Calls) -> Iterator[Tensor]:
        """The output of one linear after another. The next layer writes over it."""
        for layer in self.layers:
            for name, (weight, *diffusion) in layer.items():
                x = self.inputs[name]
                if name == "gate_up":
                    yield calls.swiglu(x, weight, out=self.activated)
                else:
                    views = (weight, *diffusion, self.n_ar) if diffusion else (weight,)
                    yield calls.linear(x, *views, out=self.outputs[name])

    def run(self, calls: Calls) -> None:
        """Launch everything."""
        for _ in self.results(calls):
            pass

    def calls(self, form: str, pdl: bool) -> Calls:
        """Of one of FORMS. pdl: ours as dependent launches."""
        if form == "cuBLAS":
            wide = self.outputs["gate_up"]
            return Calls(_cublas, lambda x, w, *, out: torch.mm(x, w.dense().t(), out=wide))
        if form == "Triton":
            return Calls(partial(linear_triton, pdl=pdl), partial(linear_swiglu_triton, pdl=pdl))
        ops = backend_ops("triton", {"linear"} if pdl else ())
        return Calls(ops.linear, ops.linear_swiglu)

    def different(self, ours: Calls, theirs: Calls) -> tuple[int, int]:
        """(comparisons, those where a bit differs) of two forms: every linear of every layer."""
        wrong, count = torch.zeros((), dtype=torch.int64, device=self.activated.device), 0
        kept = (result.clone() for result in self.results(ours))
        for got, want in zip(kept, self.results(theirs), strict=True):
            wrong += (got.view(torch.int16) != want.view(torch.int16)).any()
            count += 1
        return count, int(wrong)

    def in_gluon(self) -> str:
        """How many of a layer's linears Gluon takes."""
        taken = 0
        for name, (weight, *diffusion) in self.layers[0].items():
            views = weight, diffusion[0] if diffusion else None
            n_ar = self.n_ar if diffusion else self.rows
            taken += bool(launches_of(self.inputs[name], views, n_ar, name == "gate_up", None))
        return f"{taken} of {len(NAMES)}"


def _weight(pool: Pool, n: int, k: int) -> Weight:
    """The next piece of the pool, from its beginning again where that is used up."""
    try:
        return Weight(pool.take(n, k))
    except ValueError:
        pool.reset()
        return Weight(pool.take(n, k))


def _cublas(x: Tensor, weight: Weight, *diffusion: Any, out: Tensor) -> None:
    """Both views. diffusion: their weight and the number of rows before them."""
    n_ar = diffusion[1] if diffusion else len(x)
    torch.mm(x[:n_ar], weight.dense().t(), out=out[:n_ar])
    if diffusion:
        torch.mm(x[n_ar:], diffusion[0].dense().t(), out=out[n_ar:])


@dataclass
class Sustained:
    """Of a stack: milliseconds, and the GPU's clock and power while it ran."""

    ms: float
    mhz: float | None
    watt: float | None


def sustained(call: Callable[[], object], seconds: float = SECONDS) -> Sustained:
    """Replays of a call, captured behind a first run, in a row; the second half of them counts."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def replays(count: int, last: torch.cuda.Event) -> None:
        for _ in range(count):
            graph.replay()
        last.record()

    begin.record()
    replays(10, middle)
    middle.synchronize()
    half = max(5, int(seconds * 500 / max(begin.elapsed_time(middle) / 10, 1e-3)))
    replays(half, middle)
    replays(half, end)
    middle.synchronize()
    mhz, watt = clock_and_power()
    end.synchronize()
    return Sustained(round(middle.elapsed_time(end) / half, 4), mhz, watt)


def clock_and_power() -> tuple[float | None, float | None]:
    """MHz of the multiprocessors and W, now; None where nvidia-smi says nothing."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        mhz, watt = said.splitlines()[0].split(",")
        return float(mhz), float(watt)
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None, None


@dataclass
class Result:
    """One stack. taken: linears of a layer in Gluon; compared, different: of all layers, with Triton's."""

    model: str
    rows: str
    taken: str
    compared: int
    different: int
    times: dict[str, Sustained] = field(default_factory=dict)

    @property
    def line(self) -> list[str]:
        """For the table."""
        times = [report.number(self.times[form].ms) for form in FORMS]
        ours = self.times["Gluon"]
        drawn = ["-" if value is None else f"{value:.0f}" for value in (ours.mhz, ours.watt)]
        bits = f"{self.different} differ" if self.different else "equal"
        ratio = f"{ours.ms / self.times['Triton'].ms:.3f}"
        return [self.model, self.rows, self.taken, f"{self.compared}: {bits}", *times, ratio, *drawn]


HEAD = ["model", "rows", "in Gluon", "bits", *(f"{of} ms" for of in FORMS), "Gluon / Triton", "MHz", "W"]


def measure(name: str, rows: int, n_ar: int, pool: Pool, pdl: bool) -> Result:
    """Compare and time one stack."""
    pool.reset()
    stack = Stack(MODELS[name], rows, n_ar, pool)
    calls = {form: stack.calls(form, pdl) for form in FORMS}
    compared, wrong = stack.different(calls["Gluon"], calls["Triton"])
    said = str(rows) if n_ar == rows else f"{n_ar} + {rows - n_ar}"
    result = Result(name, said, stack.in_gluon(), compared, wrong)
    for form in FORMS:
        result.times[form] = sustained(partial(stack.run, calls[form]))
    return result


def compile_ahead(wanted: Sequence[tuple[str, int, int]], pool: Pool, pdl: bool) -> int:
    """Compile in processes what the stacks launch; how many kernels were not there."""
    with recorded() as found:
        for name, rows, n_ar in wanted:
            pool.reset()
            stack = Stack(replace(MODELS[name], layers=1), rows, n_ar, pool)
            for form in ("Triton", "Gluon"):
                stack.run(stack.calls(form, pdl))
    lacked = missing(found)
    if lacked:
        compile_all(lacked, lambda: None)
    return len(lacked)


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m bench.linears --models 8B --rows 1 192 --json runs/linears.json",
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8B", "1.7B"],
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=positive, default=list(ROWS),
                        help="of one view; default: %(default)s")  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=170,
                        help="start no stack after this long; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    given = parser.parse_args(arguments)
    if max(given.rows) > 4096:
        parser.error(f"--rows {max(given.rows)} is more than 4096")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "this measures kernels on a GPU, and there is none here")
    if not gluon_is_on():
        fail(COMMAND, f"{GLUON} is off, so that nothing runs in Gluon: leave it out")
    device = torch.device("cuda")
    facts = machine(" ".join([f"python -m {COMMAND}", *sys.argv[1:]]))
    print(machine_line(facts), flush=True)
    torch.manual_seed(0)
    pool, pdl = Pool(device, POOL), bool(pdl_kinds(device))
    rows = [*((count, count) for count in given.rows), (sum(MIXED), MIXED[0])]
    wanted = [(name, count, n_ar) for name in given.models for count, n_ar in rows]
    compiled = compile_ahead(wanted, pool, pdl)
    print(f"{compiled} kernels compiled; {time.perf_counter() - began:.0f} s so far", flush=True)
    results: list[Result] = []
    for stack in wanted:
        if time.perf_counter() - began > given.seconds:
            left = len(wanted) - len(results)
            print(f"{left} of {len(wanted)} stacks were left out: {given.seconds} s were up (--seconds)")
            break
        results.append(measure(*stack, pool, pdl))
        print(" | ".join(results[-1].line), flush=True)
    title = "All layers' linears, ms, sustained; cuBLAS without SwiGLU"
    report.print_tables([(title, HEAD, [result.line for result in results])])
    compared, wrong = (sum(getattr(of, name) for of in results) for name in ("compared", "different"))
    print(f"{compared} linears compared, {wrong} differ; {time.perf_counter() - began:.0f} s")
    if why_not():
        print(f"Gluon was turned off: {why_not()}")
    if given.json:
        report.write_json(given.json, {"machine": facts, "results": [asdict(result) for result in results]})
    return 1 if wrong or why_not() else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
