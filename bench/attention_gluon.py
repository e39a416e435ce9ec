"""Attention of many rows in Gluon beside Triton's kernels, one layer: bits first, then sustained times.

Both kernels are timed in turn in the same run: half a second of replays each time, of which the second half
counts, since a GPU that has paused runs faster for a while. SDPA's flash and cuDNN read a contiguous cache
without pages. Microseconds a layer; keys are read anew from memory or L2 as a layer of a model finds them:
several copies of the caches take turns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthrus_kernels import Rows
from orthrus_kernels.attention_compared import Inputs, both, same
from orthrus_kernels.attention_gluon import attention_gluon, new_tables_gluon
from orthrus_kernels.attention_triton import attention_triton, new_tables_triton
from orthrus_kernels.lay_triton import lay_triton
from orthrus_kernels.pdl import pdl_supported
from orthrus_kernels.plan import PassPlan

from .command import Parser, fail, positive, run
from .measure import machine, machine_line
from .models import MODELS

COMMAND = "bench.attention_gluon"
CACHED = 1 << 30  # bytes of keys and values that copies take together, more than L2 holds
COPIES = 8


def passes(contexts: Sequence[int], rows: Sequence[int]) -> dict[str, Rows]:
    """By name: trees and chains of so many rows, a mixed pass, a prompt of 4096 rows."""
    found: dict[str, Rows] = {}
    for context in contexts:
        for n in rows:
            parents = [-1, *(max(0, i - 1 - i % 4) for i in range(1, n))]
            found[f"tree-{n} at {context}"] = Rows.tree([1] * n, parents, context)
            found[f"chain-{n} at {context}"] = Rows.chain([1] * n, context)
        parents = [-1, *(max(0, i - 1 - i % 4) for i in range(1, 33))]
        mixed = Rows.tree_with_blocks([1] * 33, parents, context, range(24), 6, 96)
        found[f"mixed-33+24x6 at {context}"] = mixed
    for context in (0, 28672):
        found[f"prompt-4096 at {context}"] = Rows.chain([1] * 4096, context)
    return found


def copies_of(rows: Rows, heads: int, groups: int, device: torch.device) -> list[Inputs]:
    """Inputs on as many copies of the caches as L2 does not hold."""
    size = 4 * groups * 128 * (max(rows.contexts.values()) + 64)
    return [
        Inputs.random(rows, heads, groups, device, seed)
        for seed in range(max(2, min(COPIES, CACHED // size)))
    ]


def ours(
    kernel: Callable[..., Tensor], tables: Any, inputs: Sequence[Inputs], pdl: bool
) -> Callable[[], Any]:
    outs = [torch.empty(of.q.shape, dtype=of.q.dtype, device=of.q.device) for of in inputs]

    def call() -> None:
        for of, out in zip(inputs, outs, strict=True):
            caches = of.k_cache, of.v_cache, of.pages
            kernel(of.q, of.k, of.v, *caches, tables, 128**-0.5, out=out, pdl=pdl)

    return call


def sdpa(backend: SDPBackend, rows: Rows, inputs: Sequence[Inputs]) -> Callable[[], Any]:
    """As much work on contiguous keys: causal for a prompt without a context, else without a mask."""
    context = max(rows.contexts.values())
    made = []
    for of in inputs:
        heads, groups = of.q.shape[1], of.k.shape[1]
        k, v = (torch.randn(1, groups, context + len(rows), 128, device=of.q.device).bfloat16() for _ in "kv")
        made.append((of.q.transpose(0, 1)[None].contiguous(), k, v, heads > groups))

    def call() -> None:
        with sdpa_kernel(backend):
            for q, k, v, gqa in made:
                F.scaled_dot_product_attention(q, k, v, is_causal=context == 0, enable_gqa=gqa)

    return call


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def sustained(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    """Microseconds of a replay in the second half of so many seconds of replays, without a pause."""
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    half = max(3, int(seconds / 2 / max(time.perf_counter() - began, 1e-6)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(half):
        graph.replay()
    start.record()
    for _ in range(half):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / half


def clock_and_power() -> str:
    """What the driver says at this moment."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "clock and power unknown"


def measured(name: str, rows: Rows, heads: int, groups: int, given: Any, device: torch.device) -> list[str]:
    """A line of the table. Times are missing where bits differ."""
    inputs = copies_of(rows, heads, groups, device)
    plan, capacity, pdl = PassPlan.of(rows, device), max(rows.positions) + 1, pdl_supported(device)
    tables = {
        "Triton": new_tables_triton(plan.shape, capacity, heads, groups, 128, torch.bfloat16, device),
        "Gluon": new_tables_gluon(plan.shape, capacity, heads, groups, device),
    }
    for of in tables.values():
        lay_triton(plan, of)
    if not all(same(*both(inputs[0], rows, whole)) for whole in {of.whole for of in tables.values()}):
        return [name, "BITS DIFFER"]
    calls = {
        "Triton": ours(attention_triton, tables["Triton"], inputs, pdl),
        "Gluon": ours(attention_gluon, tables["Gluon"], inputs, pdl),
    }
    if name.startswith("prompt") or not rows.n_ar < len(rows):
        calls["flash"] = sdpa(SDPBackend.FLASH_ATTENTION, rows, inputs)
        calls["cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION, rows, inputs)
    times: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for kernel, call in calls.items():
            try:
                graph = captured(call)
                times.setdefault(kernel, []).append(sustained(graph, given.seconds) / len(inputs))
            except RuntimeError as error:  # a peer that refuses a shape
                print(f"  {kernel}, {name}: {str(error).splitlines()[0][:100]}")
    best = {kernel: min(of) for kernel, of in times.items()}
    cells = [
        f"{best[kernel]:.1f}" if kernel in best else "-" for kernel in ("Triton", "Gluon", "flash", "cuDNN")
    ]
    form = "whole" if tables["Gluon"].whole else "partial"
    return [name, form, *cells, f"{best['Gluon'] / best['Triton']:.2f}", clock_and_power()]


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(prog=f"python -m {COMMAND}", description=" ".join(str(__doc__).split("\n\n")[0].split()))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8B", "1.7B"])
    parser.add_argument("--rows", nargs="+", type=positive, default=[32, 64, 128, 192, 256])
    parser.add_argument("--contexts", nargs="+", type=positive, default=[1024, 32768])
    parser.add_argument("--rounds", type=positive, default=2, help="times that the kernels take turns")
    parser.add_argument("--seconds", type=float, default=0.5, help="of replays for a time")
    parser.add_argument("--only", default="", metavar="TEXT", help="passes whose name holds this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "needs a GPU")
    device = torch.device("cuda")
    print(machine_line(machine(f"python -m {COMMAND}")), flush=True)
    lines = []
    for model in given.models:
        shape = MODELS[model]
        for name, rows in passes(given.contexts, given.rows).items():
            if given.only in name:
                try:
                    cells = measured(f"{model} {name}", rows, shape.H, shape.G, given, device)
                except (RuntimeError, AssertionError) as error:
                    cells = [f"{model} {name}", f"FAILED: {type(error).__name__}: {str(error)[:200]}"]
                lines.append(cells)
                print(" | ".join(cells), flush=True)
                torch.cuda.empty_cache()
    print("\n| pass | form | Triton | Gluon | flash | cuDNN | Gluon over Triton | clock, power |")
    print("|---|---|---|---|---|---|---|---|")
    print(*(f"| {' | '.join(cells)} |" for cells in lines), sep="\n")
    return 1 if any("DIFFER" in cells[1] or "FAILED" in cells[1] for cells in lines) else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
