"""Attention of many rows, one layer: trees in the partial form, in the shared one, and in that in Gluon; with
--chains also chains and prompts in Gluon beside Triton's kernels. Bits first, then sustained times.

Kernels are timed in turn in the same run: half a second of replays each time, of which the second half
counts, since a GPU that has paused runs faster for a while. SDPA's flash and cuDNN read a contiguous cache
without pages. Microseconds a layer; keys are read anew from memory or L2 as a layer of a model finds them:
several copies of the caches take turns. Contexts that are edges of key segments, such as 1024 and 32768, have
no whole page in the segment of the paths: there is nothing more to share."""

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
from orthrus_kernels.attention_compared import Inputs, same
from orthrus_kernels.attention_gluon import attention_gluon, new_tables_gluon
from orthrus_kernels.attention_triton import attention_triton, new_tables_triton
from orthrus_kernels.lay_triton import lay_triton
from orthrus_kernels.pass_tables import PassTables
from orthrus_kernels.pdl import pdl_supported
from orthrus_kernels.plan import PassPlan

from .command import Parser, fail, positive, run
from .measure import machine, machine_line
from .models import MODELS

COMMAND = "bench.attention_gluon"
CACHED = 1 << 30  # bytes of keys and values that copies take together, more than L2 holds
COPIES = 8
# What is timed of a pass, in columns; each but the first, and no peer, over the first in columns behind.
TREES = ("partial", "shared", "shared, Gluon")
CHAINS = ("Triton", "Gluon", "flash", "cuDNN")
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
TEXTS, NODES, SHORT = 64, 8, 1024  # a pass of many texts, of about SHORT positions


def trees(contexts: Sequence[int], rows: Sequence[int]) -> dict[str, Rows]:
    """By name: trees of so many rows, a mixed pass, many texts."""
    found: dict[str, Rows] = {}
    for context in contexts:
        for n in rows:
            found[f"tree-{n} at {context}"] = tree(n, context)
        mixed = tree(33, context)
        found[f"mixed-33+24x6 at {context}"] = Rows.tree_with_blocks(
            mixed.tokens, mixed.parents, context, range(24), 6, 96
        )
    texts = [tree(NODES, SHORT - 32 + s, s) for s in range(TEXTS)]
    return found | {f"texts-{TEXTS}x{NODES} at {SHORT}": Rows.batch(texts)}


def tree(nodes: int, context: int, sequence: int = 0) -> Rows:
    """Of many branches."""
    parents = [-1, *(max(0, i - 1 - i % 4) for i in range(1, nodes))]
    return Rows.tree([1] * nodes, parents, context, sequence)


def chains(contexts: Sequence[int], rows: Sequence[int]) -> dict[str, Rows]:
    """By name: chains of so many rows, and prompts: whole ones, and the last piece of a long one."""
    found = {f"chain-{n} at {context}": Rows.chain([1] * n, context) for context in contexts for n in rows}
    prompts = (4096, 0), (4096, 28672), (32768, 0)
    return found | {f"prompt-{n} at {context}": Rows.chain([1] * n, context) for n, context in prompts}


def copies_of(rows: Rows, heads: int, groups: int, device: torch.device) -> list[Inputs]:
    """Inputs on as many copies of the caches as L2 does not hold."""
    size = 4 * groups * 128 * (sum(rows.contexts.values()) + 64)
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
    """A line of a table. Times are missing where bits differ."""
    inputs = copies_of(rows, heads, groups, device)
    pdl = pdl_supported(device)
    kinds = TREES if branches(rows) else CHAINS
    tables = {kind: tables_of(rows, inputs[0], kind, device) for kind in kinds if kind not in PEERS}
    outputs = [inputs[0].through(kernel_of(kind), of, pdl) for kind, of in tables.items()]
    if not all(same(output, outputs[0]) for output in outputs[1:]):
        return [name, "BITS DIFFER"]
    calls = {kind: ours(kernel_of(kind), of, inputs, pdl) for kind, of in tables.items()}
    calls |= {kind: sdpa(PEERS[kind], rows, inputs) for kind in kinds if kind in PEERS}
    times: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for kind, call in calls.items():
            try:
                graph = captured(call)
                times.setdefault(kind, []).append(sustained(graph, given.seconds) / len(inputs))
            except RuntimeError as error:  # a peer that refuses a shape
                print(f"  {kind}, {name}: {str(error).splitlines()[0][:100]}")
    best = {kind: min(of) for kind, of in times.items()}
    first = best[kinds[0]]
    over = [f"{best[kind] / first:.2f}" for kind in kinds[1:] if kind not in PEERS]
    return [name, *(f"{best[kind]:.1f}" if kind in best else "-" for kind in kinds), *over, clock_and_power()]


def branches(rows: Rows) -> bool:
    return PassPlan.of(rows).shape.branches


def tables_of(rows: Rows, of: Inputs, kind: str, device: torch.device) -> PassTables:
    """Tables for a pass as a kernel takes them: of the partial form for "partial", else of its own choice."""
    plan, capacity, (_, heads, d) = PassPlan.of(rows, device), max(rows.positions) + 1, of.q.shape
    if "Gluon" in kind:
        tables = new_tables_gluon(plan.shape, capacity, heads, of.k.shape[1], device)
    else:
        given = plan.shape, capacity, heads, of.k.shape[1], d, of.q.dtype, device
        tables = new_tables_triton(*given, shared=kind != "partial")
    lay_triton(plan, tables)
    return tables


def kernel_of(kind: str) -> Callable[..., Tensor]:
    return attention_gluon if "Gluon" in kind else attention_triton


def parse(arguments: Sequence[str] | None) -> Any:
    parser = Parser(prog=f"python -m {COMMAND}", description=" ".join(str(__doc__).split("\n\n")[0].split()))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8B", "1.7B"])
    parser.add_argument("--rows", nargs="+", type=positive, default=[32, 64, 128, 192])
    parser.add_argument("--contexts", nargs="+", type=positive, default=[1000, 32000])
    parser.add_argument("--rounds", type=positive, default=2, help="times that the kernels take turns")
    parser.add_argument("--seconds", type=float, default=0.5, help="of replays for a time")
    parser.add_argument("--chains", action="store_true", help="chains and prompts too")
    parser.add_argument("--only", default="", metavar="TEXT", help="passes whose name holds this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if not torch.cuda.is_available():
        fail(COMMAND, "needs a GPU")
    device = torch.device("cuda")
    print(machine_line(machine(f"python -m {COMMAND}")), flush=True)
    lines: dict[tuple[str, ...], list[list[str]]] = {CHAINS: [], TREES: []}
    asked = trees(given.contexts, given.rows)
    if given.chains:
        asked = chains(given.contexts, given.rows) | asked
    for model in given.models:
        shape = MODELS[model]
        for name, rows in asked.items():
            if given.only in name:
                try:
                    cells = measured(f"{model} {name}", rows, shape.H, shape.G, given, device)
                except (RuntimeError, AssertionError) as error:
                    cells = [f"{model} {name}", f"FAILED: {type(error).__name__}: {str(error)[:200]}"]
                lines[TREES if branches(rows) else CHAINS].append(cells)
                print(" | ".join(cells), flush=True)
                torch.cuda.empty_cache()
    for kinds, of in lines.items():
        if of:
            over = [f"{kind} over {kinds[0]}" for kind in kinds[1:] if kind not in PEERS]
            head = ["µs a layer", *kinds, *over, "clock, power"]
            print(f"\n| {' | '.join(head)} |", f"|{'---|' * len(head)}", sep="\n")
            print(*(f"| {' | '.join(cells)} |" for cells in of), sep="\n")
    wrong = [cells for of in lines.values() for cells in of if "DIFFER" in cells[1] or "FAILED" in cells[1]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(COMMAND, main))
