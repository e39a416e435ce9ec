"""Every kernel at the shapes of Qwen3, beside its peers in the same run: microseconds, GB/s, share of the
read roof of this machine.

Peers: cuBLAS for linears; SDPA (flash, cuDNN, efficient; plain and with query heads folded into rows) and
FlexAttention for attention; unfused torch for the rest. Before a case is timed its outputs are compared with
the peers'; where they differ no time is given. Without a GPU: bytes, operations and floors."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from orthrus_kernels import tables as launch_tables

from . import report
from .cases import OPS, OURS, Case, cases
from .command import Parser, fail, in_processes, positive, run, short, writable
from .measure import Call, Meter, Pool, machine, machine_line
from .models import MODELS
from .report import Result, Roofs

COMMAND = "bench.kernels"
ROWS, CONTEXTS = (1, 8, 32, 64, 128, 192), (1024, 16384, 40960)
QUICK = {"models": ["8B", "1.7B"], "rows": [1, 32, 128], "contexts": [1024, 40960], "seconds": 50}
POOL = 1 << 31  # bf16 numbers, 4 GiB: two copies of the largest head
WORKER_POOL = 1 << 30
NOMINAL_GB_S = 3350  # an H100 SXM's data sheet: floors where nothing can be measured
# Largest difference from a peer over its largest output: sums in another order and up to three roundings to
# bf16. A wrong index or mask is off by 1.
TOLERANCE = 0.03
FLEX_SHARE = 0.2  # of all seconds: each shape of FlexAttention compiles for several


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(
        prog=f"python -m {COMMAND}",
        description=" ".join(str(__doc__).split("\n\n")[0].split()),
        epilog="example: python -m bench.kernels --ops linear --models 8B --rows 1 32 --json out.json",
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="kernels to measure")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all")
    parser.add_argument("--rows", nargs="+", type=positive, help=f"rows of a pass; default: {_list(ROWS)}")
    parser.add_argument(
        "--contexts", nargs="+", type=positive, help=f"cached keys, 16k is 16384; default: {_list(CONTEXTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="two models, three row counts, under 60 s")
    parser.add_argument("--seconds", type=positive, help="start no new case after this long; default: 280")
    parser.add_argument(
        "--workers", type=positive, default=min(12, os.cpu_count() or 1), help="processes that compile ahead"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=writable, metavar="FILE", help="write a roofline picture to FILE")
    given = parser.parse_args(arguments)
    default = QUICK if given.quick else {}
    given.models = given.models or default.get("models", list(MODELS))
    given.rows = given.rows or default.get("rows", list(ROWS))
    given.contexts = given.contexts or default.get("contexts", list(CONTEXTS))
    given.seconds = given.seconds or default.get("seconds", 280)
    if max(given.rows) > 4096:
        parser.error(f"--rows {max(given.rows)} is more than 4096")
    if max(given.contexts) > 1 << 20:
        parser.error(f"--contexts {max(given.contexts)} is more than 1024k")
    return given


def _list(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def difference(got: Any, want: Any) -> float:
    """Largest difference over the largest wanted number, of tensors or tuples of them; NaN counts as 1."""
    if isinstance(want, tuple):
        return max(difference(g, w) for g, w in zip(got, want, strict=True))
    if got.shape != want.shape:
        raise ValueError(f"shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    scale = want.double().abs().max().clamp(min=1e-30)
    return ((got.double() - want.double()).abs().max() / scale).nan_to_num(1.0).item()


def clone(value: Any) -> Any:
    return tuple(v.clone() for v in value) if isinstance(value, tuple) else value.clone()


def measure(case: Case, meter: Meter, skipped: Sequence[str] = ()) -> Result:
    """One case. A call that fails, or that is in `skipped`, gets a word; when ours differs from every peer
    that ran, nothing is timed."""
    result = Result(case)
    meter.pool.reset()
    copies, calls = case.build(meter.pool)
    ready: dict[str, Call] = {}
    outputs: dict[str, Any] = {}
    for name, call in calls.items():
        if isinstance(call, str) or name in skipped:
            result.notes[name] = call if isinstance(call, str) else "no time left"
            continue
        try:
            outputs[name] = clone(call(0))
            ready[name] = call
        except Exception as error:  # one peer that refuses a shape must not end the run
            result.notes[name] = _word(error)
    peers = {n: difference(outputs[OURS], o) for n, o in outputs.items() if n != OURS and OURS in outputs}
    if peers and min(peers.values()) > TOLERANCE:
        result.notes[OURS] = f"WRONG: differs from the peers by {min(peers.values()):.1%}"
        return result
    for name, call in ready.items():
        if peers.get(name, 0) > TOLERANCE:
            result.notes[name] = f"differs by {peers[name]:.1%}"
            continue
        try:
            result.times[name] = meter.time(call, copies)
        except Exception as error:
            result.notes[name] = _word(error)
    return result


def _word(error: Exception) -> str:
    return "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else short(error)


def compile_share(wanted: list[Case], index: int, of: int) -> list[str]:
    """A compile worker: call our kernel of its share of the cases once, for Triton's disk cache."""
    pool = Pool(torch.device("cuda"), WORKER_POOL)
    said = []
    for case in wanted[index::of]:
        pool.reset()
        try:
            case.build(pool)[1][OURS](0)  # type: ignore[operator]
        except ValueError:
            continue  # larger than a worker's pool
        except Exception as error:
            said.append(f"{case.op}: {short(error)}")
    torch.cuda.synchronize()
    return said


def without_gpu(given: Any, wanted: list[Case]) -> int:
    report.print_tables(report.card(wanted, NOMINAL_GB_S))
    print(
        "No GPU here: nothing was measured; floors are bytes over the read bandwidth of an H100's data sheet."
        " `make test` runs the kernels in the interpreter."
    )
    if given.json:
        floors = [
            {"op": c.op, "model": c.model, "name": c.name, "rows": c.rows, "context": c.context,
             "bytes": c.bytes, "flops": c.flops}
            for c in wanted
        ]  # fmt: skip
        facts = {"machine": machine(_command()), "roof": None, "cases": floors, "left_out": len(wanted)}
        report.write_json(given.json, facts)
    return 0


def _command() -> str:
    return " ".join([f"python -m {COMMAND}", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    given = parse(arguments)
    if not torch.cuda.is_available():
        wanted = list(cases(given.ops, given.models, given.rows, given.contexts, "sm_90"))
        if given.plot:
            print("No GPU here: no picture is drawn.")
        return without_gpu(given, wanted)
    if given.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail(COMMAND, "--plot needs matplotlib: pip install -e '.[bench]'")
    device = torch.device("cuda")
    key = launch_tables.device_key(device)
    wanted = list(cases(given.ops, given.models, given.rows, given.contexts, key))
    warnings.simplefilter("ignore")  # SDPA explains every shape it refuses; the table has a word for it
    torch.manual_seed(0)
    facts = machine(_command())
    print(machine_line(facts), flush=True)
    apart = list({case.kernel: case for case in wanted}.values())
    for line in in_processes(compile_share, (apart,), min(given.workers, len(apart)), given.seconds / 3):
        print(f"  compiling ahead: {line}", flush=True)
    meter = Meter(Pool(device, POOL), seconds=0.01 if given.quick else 0.02)
    roofs = Roofs(meter.read_roof(), meter.matmul_roof())
    print(
        f"read roof {roofs.read:.0f} GB/s, bf16 matmul roof {roofs.matmul:.0f} TFLOP/s; {len(wanted)} cases,"
        f" {time.perf_counter() - began:.0f} s so far",
        flush=True,
    )
    results: list[Result] = []
    flex_seconds = 0.0
    for case in wanted:
        if time.perf_counter() - began > given.seconds:
            break
        start = time.perf_counter()
        results.append(measure(case, meter, ["flex"] if flex_seconds > FLEX_SHARE * given.seconds else []))
        if "flex" in results[-1].times:
            flex_seconds += time.perf_counter() - start
    left_out = len(wanted) - len(results)
    report.print_tables(report.tables(results, roofs))
    print(*report.summary(results), sep="\n")
    reasons = {f"{r.case.op}, {n}: {why}" for r in results for n, why in r.notes.items()}
    print(*(f"not measured: {reason}" for reason in sorted(reasons)), sep="\n")
    if left_out:
        print(f"{left_out} of {len(wanted)} cases were left out: {given.seconds} s were up (--seconds)")
    print(f"{machine_line(facts)}; {time.perf_counter() - began:.0f} s")
    run = report.to_json(facts, roofs, results, left_out)
    if given.json:
        report.write_json(given.json, run)
    if given.plot:
        report.plot(given.plot, run, f"{facts['gpu']}, triton {facts['triton']}, {facts['date']}")
    wrong = [r for r in results if OURS in r.notes]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
