"""The linear kernel on a GPU: first its bits, then its time beside cuBLAS in the same run.

    PYTHONPATH=src python bench/gpu_linear.py --out found   # minutes on an H100; writes found/linear.json
    PYTHONPATH=src python bench/gpu_linear.py --table found/gpu_linear.json     # anywhere: that table again

1. Read bandwidth: a plain Triton kernel that reads 4 GB once. All shares are of this figure.
2. Bits: every tile of every reduction class of every weight, any rows, any index, both views, against one row
   alone; the row-wise kernels likewise. Chains of dependent launches in a CUDA graph, where each may start
   before the one in front has ended, against the same launches one at a time.
3. Each weight of each size alone, cold (a CUDA graph over more weights than L2 holds): cuBLAS and every tile.
   The class of a weight is the one with the best mean over all numbers of rows among those that lose at most
   5 % at one row.
4. The layer stack of linears in one CUDA graph: cuBLAS, the committed table with and without dependent
   launches, the new table with them.
5. A mixed pass (both views' weights in one launch, and one launch a view), and prefill.

A variant that does not compile or gives other bits is shown and left out. The new table, --out/linear.json,
goes to src/orthrus_kernels/tables/ by hand."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from orthrus_kernels import tables  # noqa: E402
from orthrus_kernels._triton import tl, triton  # noqa: E402
from orthrus_kernels.backends import backend_ops  # noqa: E402
from orthrus_kernels.linear_triton import linear_triton  # noqa: E402
from orthrus_kernels.tables import LinearEntry, LinearTile  # noqa: E402
from orthrus_kernels.workspace import Workspace  # noqa: E402

BEGAN = time.perf_counter()
BF16 = torch.bfloat16
DEVICE = "cuda"
# size: (layers, {projection: (N, K)})
SIZES = {
    "1.7B": (28, {"qkv": (4096, 2048), "o": (2048, 2048), "gate_up": (12288, 2048), "down": (2048, 6144)}),
    "4B": (36, {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)}),
    "8B": (36, {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}),
}
ROWS = (1, 8, 32, 64, 128, 192, 256)
PREFILL_ROWS = 2048
# {rows: [(block_t, block_n, warps, stages, tma)]}. An x tile is read from L2 once for every block_n weight
# rows: wide tiles save L2 reads where there are many rows, narrow ones fill the GPU where there are few. In
# up to 113 KiB of shared memory the next launch's CTA waits beside this one's; in more, more is in flight.
_ONE_TILE = [
    (16, 32, 4, 8, False), (16, 64, 4, 6, False), (16, 128, 4, 5, False),
    (16, 64, 4, 6, True), (16, 64, 4, 10, True), (16, 64, 4, 20, True), (16, 128, 4, 5, True),
]  # fmt: skip
VARIANTS = {
    1: _ONE_TILE,
    8: _ONE_TILE,
    32: [
        (32, 64, 4, 6, False), (32, 64, 4, 6, True), (32, 64, 4, 9, True), (32, 64, 4, 16, True),
        (32, 128, 4, 5, True),
    ],
    64: [
        (64, 64, 4, 6, False), (64, 64, 4, 6, True), (64, 64, 4, 12, True), (64, 128, 8, 4, True),
        (64, 128, 8, 8, True),
    ],
    128: [
        (64, 64, 4, 6, False), (64, 64, 4, 6, True), (64, 128, 8, 4, True), (128, 64, 4, 4, True),
        (128, 64, 4, 9, True), (128, 128, 8, 3, True), (128, 128, 8, 6, True), (128, 256, 8, 4, True),
    ],
    192: [
        (64, 64, 4, 6, False), (64, 128, 8, 4, True), (96, 64, 4, 5, True), (96, 128, 8, 4, True),
        (192, 64, 4, 3, True), (192, 64, 4, 6, True), (192, 64, 4, 7, True), (192, 128, 8, 5, True),
        (192, 256, 16, 4, True), (128, 64, 4, 9, True), (64, 64, 4, 6, True),
    ],
    256: [
        (128, 64, 4, 3, True), (128, 64, 4, 6, True), (128, 64, 4, 9, True), (64, 64, 4, 6, True),
        (128, 128, 8, 6, True), (128, 256, 8, 4, True),
    ],
    PREFILL_ROWS: [(128, 128, 8, 3, True), (128, 128, 8, 6, True), (192, 128, 8, 5, True),
                   (128, 256, 8, 4, True)],
}  # fmt: skip
PDL = True  # whether dependent launches in CUDA graphs work here; timed beside the others, used by none
APART = 64  # a mixed pass with more rows of one view may be two launches
# A tile that was best at so many rows serves up to that many; the tile for prefill serves any number.
LIMITS = {1: 1, 8: 16, 32: 32, 64: 64, 128: 128, 192: 192, 256: 256, PREFILL_ROWS: None}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.1f} s] {text}", flush=True)


def classes(n: int, k: int) -> list[tuple[int, int]]:
    """Reduction classes (block_k, segments) to compare: the table's first, then those whose CTAs, one a
    segment and 64 outputs, are half of 132 multiprocessors to two on each."""
    entry = table(n, k)
    own = (entry.block_k, entry.segments)
    others = [(64, s) for s in (1, 2, 3, 4) if 64 <= s * _ctas(n) <= 264 or s == 1 < 264 < _ctas(n)]
    return list(dict.fromkeys([own, *others]))


def _ctas(n: int) -> int:
    return -(-n // 64)


def table(n: int, k: int) -> LinearEntry:
    return tables.linear_entry(n, k, BF16, tables.device_key(torch.device(DEVICE)))


def variants(rows: int, n: int, segments: int) -> list[LinearTile]:
    """Tiles to try for a number of rows of a weight; each takes any number."""
    tiles = []
    for block_t, block_n, warps, stages, tma in VARIANTS[rows]:
        forms = [segments > 1 and rows <= ROWS[-1]]
        # One after another, segments need two accumulators: over 96 registers a thread each would spill.
        whole_fits = block_t * block_n <= 96 * 32 * warps
        if forms[0] and whole_fits and n // block_n * -(-rows // block_t) >= 80:
            forms.append(False)
        if segments == 1 or forms[0] or whole_fits:
            tiles += [LinearTile(None, block_t, block_n, split, warps, stages, tma) for split in forms]
    return tiles


def single(block_k: int, segments: int, tile: LinearTile) -> LinearEntry:
    return LinearEntry(block_k, segments, (tile,))


def committed_tiles() -> list[tuple[int, int, LinearTile]]:
    own = [table(n, k) for _, shapes in SIZES.values() for n, k in shapes.values()]
    return [(e.block_k, e.segments, replace(tile, rows=None)) for e in own for tile in e.tiles]


def everything() -> list[tuple[int, int, LinearTile]]:
    """Every (block_k, segments, tile) this run launches, for the compile workers."""
    specs = dict.fromkeys(committed_tiles())
    for _, shapes in SIZES.values():
        for n, k in shapes.values():
            for block_k, segments in classes(n, k):
                for rows in VARIANTS:
                    specs.update(dict.fromkeys((block_k, segments, t) for t in variants(rows, n, segments)))
    return list(specs)


def compile_share(index: int, of: int) -> None:
    """A compile worker: launch its share of the variants once on a small weight, for Triton's disk cache."""
    x, w, w2 = (torch.zeros(512, 1024, device=DEVICE, dtype=BF16) for _ in range(3))
    committed = committed_tiles()
    for block_k, segments, tile in everything()[index::of]:
        try:
            linear_triton(x, w, entry=single(block_k, segments, tile))
            linear_triton(x, w, w2, 256, entry=single(block_k, segments, tile))
            if (block_k, segments, tile) in committed:
                linear_triton(x, w, entry=single(block_k, segments, tile), pdl=False)
        except Exception as error:
            print(f"{block_k} {segments} {tile}: {short(error)}", flush=True)
    torch.cuda.synchronize()


def compile_all(workers: int, limit: float) -> None:
    """Run the compile workers; whatever they leave undone is compiled on first use."""
    command = [sys.executable, __file__, "--worker"]
    running = [
        subprocess.Popen(
            [*command, str(i), str(workers)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(workers)
    ]
    until, complaints = time.perf_counter() + limit, Counter()
    for process in running:
        try:
            said, _ = process.communicate(timeout=max(until - time.perf_counter(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            complaints["a worker ran out of time"] += 1
        complaints.update(line for line in said.splitlines() if line.strip())
    for line, count in complaints.most_common(8):
        say(f"  compile worker: {line[:220]}" + (f" ({count} times)" if count > 1 else ""))


@triton.jit
def _read_kernel(x, y, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.program_id(0), n // BLOCK, tl.num_programs(0)):
        total += tl.load(x + i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y + tl.program_id(0), tl.sum(total, axis=0))


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A call in a CUDA graph, after one eager run."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def graph_ms(call: Callable[[], object], replays: int = 7) -> float:
    """Median milliseconds of a call, captured in a CUDA graph."""
    graph = captured(call)
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bandwidth() -> float:
    """GB/s of reading 4 GB once."""
    x = torch.zeros(1 << 30, device=DEVICE)
    y = torch.empty(1 << 16, device=DEVICE)
    count = torch.cuda.get_device_properties(0).multi_processor_count

    def read(programs: int, block: int, warps: int) -> float:
        return graph_ms(lambda: _read_kernel[(programs,)](x=x, y=y, n=1 << 30, BLOCK=block, num_warps=warps))

    best = min(read(8 * count, 4096, 4), read(16 * count, 4096, 4), read(8 * count, 8192, 8))
    return x.numel() * 4 / best / 1e6


def heavy(*shape: int) -> torch.Tensor:
    """Normal numbers scaled by 2^-15 .. 2^15, bf16."""
    scale = torch.exp2(torch.randint(-15, 16, shape, device=DEVICE).float())
    return (torch.randn(*shape, device=DEVICE) * scale).to(BF16)


SLICES = ((0, 1), (3, 5), (0, 256), (7, 200), (128, 161), (17, 81), (250, 256), (0, 33))


def check_bits(n: int, k: int, bad: set) -> dict[str, int]:
    """Compare one weight's bits: in every class, one row alone against every tile, row count and index.

    Failing (class, tile) triples go to `bad`."""
    x, w, w2 = heavy(256, k), heavy(n, k), heavy(n, k)
    found = {"checks": 0, "failures": 0}
    rows_alone = {}
    for block_k, segments in classes(n, k):
        entry = single(block_k, segments, LinearTile(None, 16, 64, True, 4, 6))
        alone = torch.cat([linear_triton(x[i : i + 1], w, entry=entry) for i in range(256)])
        alone2 = torch.cat([linear_triton(x[i : i + 1], w2, entry=entry) for i in range(256)])
        rows_alone[block_k, segments] = alone
        for tile in dict.fromkeys(t for rows in VARIANTS for t in variants(rows, n, segments)):
            fail = 0
            try:
                entry = single(block_k, segments, tile)
                for first, last in SLICES:
                    fail += not torch.equal(linear_triton(x[first:last], w, entry=entry), alone[first:last])
                for n_ar in (1, 33, 130, 255):
                    got = linear_triton(x, w, w2, n_ar, entry=entry)
                    fail += not torch.equal(got, torch.cat([alone[:n_ar], alone2[n_ar:]]))
                found["checks"] += len(SLICES) + 4
            except Exception as error:
                say(f"  {n}x{k} {block_k} {segments} {tile}: {short(error)}")
                fail += 1
            if fail:
                bad.add((block_k, segments, tile))
                say(f"  FAILED {n}x{k} block_k {block_k} segments {segments} {tile}: {fail} times")
            found["failures"] += fail
    entry = table(n, k)
    alone = rows_alone[entry.block_k, entry.segments]
    for rows in range(1, 257):
        found["checks"] += 1
        found["failures"] += not torch.equal(linear_triton(x[:rows], w), alone[:rows])
    exact = x.double() @ w.double().T
    for cls, rows in rows_alone.items():
        error = ((rows.double() - exact).abs().max() / exact.abs().max()).item()
        if not error < 1e-2:
            found["failures"] += 1
            say(f"  WRONG {n}x{k} class {cls}: error {error:.2e} of the largest output")
    return found


def check_chains(n: int = 4096, length: int = 48) -> dict[str, int]:
    """Chains of dependent launches in a graph, replayed, against the same launches one at a time."""
    ops = backend_ops("triton")
    found = {"checks": 0, "failures": 0}
    weights = [torch.randn(n, n, device=DEVICE).mul_(n**-0.5).to(BF16) for _ in range(8)]
    gain = torch.ones(n, device=DEVICE, dtype=BF16)
    own = table(n, n)
    tiles = [replace(t, rows=None) for t in own.tiles] + [
        LinearTile(None, 192, 64, True, 4, 6, True),
        LinearTile(None, 128, 64, True, 4, 4, True),
    ]
    space = Workspace.new(torch.device(DEVICE))
    for tile, rows in ((tile, rows) for tile in tiles for rows in (1, 33, 192)):
        entry = LinearEntry(own.block_k, max(own.segments, 2), (tile,), apart=64)
        x = torch.randn(rows, n, device=DEVICE, dtype=BF16)
        a, b = torch.empty_like(x), torch.empty_like(x)

        def chain(pdl: bool, entry=entry, x=x, a=a, b=b, rows=rows) -> None:
            a.copy_(x)
            for i in range(length):
                source, target = (a, b) if i % 2 == 0 else (b, a)
                w, w2 = weights[i % 8], weights[(i + 1) % 8]
                linear_triton(source, w, w2, rows // 3, out=target, entry=entry, space=space, pdl=pdl)
                if i % 5 == 4:  # a launch of another kind between
                    target.copy_(ops.rms_norm(target, gain, 1e-6))
                if not pdl:
                    torch.cuda.synchronize()

        chain(False)
        expected = a.clone()
        try:
            graph = captured(partial(chain, True))
            for _ in range(10):
                a.zero_()
                b.zero_()
                graph.replay()
                found["checks"] += 1
                found["failures"] += not torch.equal(a, expected)
        except Exception as error:
            say(f"  chain {tile} {rows}: {short(error)}")
            found["failures"] += 1
    return found


def probe() -> None:
    """Capture and replay dependent launches; run in a process of its own, which an error may spoil."""
    x, w = (torch.ones(n, 512, device=DEVICE, dtype=BF16) for n in (8, 512))
    y, z = torch.empty_like(x), torch.empty_like(x)
    graph = captured(lambda: [linear_triton(x, w, out=y), linear_triton(y, w, out=z)])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(z, torch.full_like(z, 512 * 512)), z


def check_row_wise_bits(e: int = 4096, heads: int = 32, groups: int = 8, d: int = 128) -> dict[str, dict]:
    """Rows of the norms, q/k-norm with RoPE and SwiGLU: each alone against slices of a pass of 256."""
    ops = backend_ops("triton")
    stacked = heads + 2 * groups
    x, qkv, wide = heavy(256, e), heavy(256, stacked, d), heavy(256, 2 * e)
    g, g2, q, k, q2, k2 = (heavy(n) for n in (e, e, d, d, d, d))
    cos, sin = (torch.rand(256, d // 2, device=DEVICE) for _ in range(2))

    def qk(a: int, b: int, n_ar: int) -> torch.Tensor:
        part = ops.qk_norm_rope(qkv[a:b], heads, q, k, cos[a:b], sin[a:b], 1e-6, q2, k2, n_ar)[:2]
        return torch.cat(part, 1)

    calls: dict[str, Callable[[int, int, int], torch.Tensor]] = {
        "rms_norm": lambda a, b, n_ar: ops.rms_norm(x[a:b], g, 1e-6, g2, n_ar),
        "add_rms_norm": lambda a, b, n_ar: torch.cat(ops.add_rms_norm(x[a:b], x[a:b].flip(1), g, 1e-6), 1),
        "rms_norm of heads": lambda a, b, n_ar: ops.rms_norm(qkv[a:b], q, 1e-6, q2, n_ar),
        "qk_norm_rope": qk,
        "swiglu": lambda a, b, n_ar: ops.swiglu(wide[a:b]),
    }
    found = {}
    for name, call in calls.items():
        one = {"checks": 0, "failures": 0}
        try:
            for n_ar in (0, 33, 256):
                alone = torch.cat([call(i, i + 1, int(i < n_ar)) for i in range(256)])
                for a, b in SLICES:
                    got = call(a, b, min(max(n_ar - a, 0), b - a))
                    one["checks"] += 1
                    one["failures"] += not torch.equal(got, alone[a:b])
        except Exception as error:
            say(f"  {name}: {short(error)}")
            one["failures"] += 1
        found[name] = one
        say(f"bits {name}: {one}")
    return found


def short(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:160]}"


class Bench:
    """Times of one model size. Weights of all layers stay on the GPU: reading them in turn empties L2."""

    def __init__(self, size: str, bad: set, deadline: float) -> None:
        self.size, self.bad, self.deadline = size, bad, deadline
        self.layers, self.shapes = SIZES[size]
        self.weights = {
            name: [torch.empty(n, k, device=DEVICE, dtype=BF16).normal_(0, 0.02) for _ in range(self.layers)]
            for name, (n, k) in self.shapes.items()
        }
        self.bytes = sum(w.numel() * 2 for ws in self.weights.values() for w in ws)
        self.x = {
            name: torch.randn(4096, k, device=DEVICE, dtype=BF16) for name, (_, k) in self.shapes.items()
        }
        self.y = {
            name: torch.empty(4096, n, device=DEVICE, dtype=BF16) for name, (n, _) in self.shapes.items()
        }
        self.space = Workspace.new(torch.device(DEVICE), 1 << 26)

    def ours(self, name: str, rows: int, layer: int, entry: LinearEntry | None, pdl: bool = False) -> None:
        x, y = self.x[name][:rows], self.y[name][:rows]
        linear_triton(x, self.weights[name][layer], out=y, entry=entry, space=self.space, pdl=pdl)

    def cublas(self, name: str, rows: int, layer: int) -> None:
        torch.mm(self.x[name][:rows], self.weights[name][layer].t(), out=self.y[name][:rows])

    def layer_us(self, name: str, run: Callable[[int], None]) -> float:
        """µs a launch, over 12 times what L2 holds or all layers."""
        n, k = self.shapes[name]
        layers = range(min(self.layers, max(8, (600 << 20) // (2 * n * k))))
        return graph_ms(lambda: [run(i) for i in layers], 5) / len(layers) * 1e3

    def alone(self, name: str, rows: int) -> dict:
        """µs of one launch of a projection by cuBLAS and by every variant, best first."""
        n, k = self.shapes[name]
        found = []
        peer = self.layer_us(name, lambda i: self.cublas(name, rows, i))
        own, *_ = classes(n, k)
        for block_k, segments in classes(n, k):
            for tile in variants(rows, n, segments):
                late = time.perf_counter() - self.deadline
                if (block_k, segments, tile) in self.bad or late > (15 if own == (block_k, segments) else 0):
                    continue  # late: only the table's own class is still measured
                try:
                    entry = single(block_k, segments, tile)
                    us = self.layer_us(name, partial(self.ours, name, rows, entry=entry))
                except Exception as error:
                    self.bad.add((block_k, segments, tile))
                    say(f"  {block_k} {segments} {tile}: {short(error)}")
                    continue
                found.append({"us": us, "block_k": block_k, "segments": segments, **vars(tile)})
        return {"cublas_us": peer, "variants": sorted(found, key=lambda v: v["us"])}

    def stack(self, rows: int, entries: dict[str, LinearEntry | None] | None, pdl: bool = False) -> float:
        """ms of all linears of the model, layer by layer; entries None: cuBLAS."""

        def run() -> None:
            for i in range(self.layers):
                for name in self.shapes:
                    if entries is None:
                        self.cublas(name, rows, i)
                    else:
                        self.ours(name, rows, i, entries[name], pdl)

        return graph_ms(run)

    def mixed(self, name: str, n_ar: int, n_diff: int, entry: LinearEntry) -> dict[str, float]:
        """µs a layer of one projection on a mixed pass: one launch, one a view, and cuBLAS twice."""
        rows, half = n_ar + n_diff, self.layers // 2
        x, y = self.x[name][:rows], self.y[name][:rows]

        def ours(apart: int | None) -> None:
            for i in range(half):
                w, w2 = self.weights[name][2 * i : 2 * i + 2]
                one = replace(entry, apart=apart)
                linear_triton(x, w, w2, n_ar, out=y, entry=one, space=self.space)

        def two() -> None:
            for i in range(half):
                for w, a, b in zip(self.weights[name][2 * i :], (0, n_ar), (n_ar, rows), strict=False):
                    torch.mm(x[a:b], w.t(), out=y[a:b])

        calls = {"one": partial(ours, None), "apart": partial(ours, APART), "cublas_twice": two}
        return {key: graph_ms(call) / half * 1e3 for key, call in calls.items()}

    def prefill(self, rows: int, entries: dict[str, LinearEntry | None]) -> dict[str, float]:
        """ms of four layers' linears at many rows."""
        few = range(4)
        return {
            "ours_ms": graph_ms(
                lambda: [self.ours(n, rows, i, entries[n]) for i in few for n in self.shapes], 3
            ),
            "cublas_ms": graph_ms(lambda: [self.cublas(n, rows, i) for i in few for n in self.shapes], 3),
        }


def run_size(size: str, bad: set, deadline: float, roof: float) -> dict:
    """All figures of one size."""
    bench = Bench(size, bad, deadline)
    alone: dict[str, dict[int, dict]] = {name: {} for name in bench.shapes}
    for rows in (1, 64, 192, 128, 256, 32, 8, PREFILL_ROWS):  # should time run out: what says most first
        for name in bench.shapes:
            alone[name][rows] = bench.alone(name, rows)
    entries: dict[str, LinearEntry | None] = dict.fromkeys(bench.shapes)
    for name in bench.shapes:
        entries[name] = choose(alone[name])
        show_weight(size, name, alone[name], entries[name])
    old: dict[str, LinearEntry | None] = dict.fromkeys(bench.shapes)
    lines = []
    for rows in ROWS:
        line = {
            "size": size, "rows": rows, "cublas_ms": bench.stack(rows, None),
            "table_ms": bench.stack(rows, old),
            "table_pdl_ms": bench.stack(rows, old, pdl=True) if PDL else None,
            "new_ms": bench.stack(rows, entries),
            "weight_bytes": bench.bytes,
        }  # fmt: skip
        lines.append(line)
        show(line, roof)
    result: dict = {"size": size, "alone": alone, "stack": lines}
    for name, run in (
        *((f"mixed {n}", partial(bench.mixed, n, 33, 144, e)) for n in ("qkv", "o") if (e := entries[n])),
        ("prefill", lambda: bench.prefill(4096, entries)),
    ):
        try:
            result[name] = run()
            say(f"  {size} {name}: {rounded(result[name])}")
        except Exception as error:
            say(f"  {size} {name} failed: {short(error)}")
    return result


def choose(alone: dict[int, dict]) -> LinearEntry | None:
    """The class of a weight and its best tile for each number of rows; None if no class was measured at all.

    Among the classes that lose at most 5 % at one row, the one with the least mean of time over cuBLAS's."""
    best: dict[tuple[int, int], dict[int, dict]] = {}
    for rows, figures in alone.items():
        for v in reversed(figures["variants"]):  # slowest first: the fastest stays
            best.setdefault((v["block_k"], v["segments"]), {})[rows] = v
    whole = {cls: tiles for cls, tiles in best.items() if set(LIMITS) <= set(tiles)}
    if not whole:
        return None
    least = min(tiles[1]["us"] for tiles in whole.values())
    score = {
        cls: statistics.geometric_mean(tiles[rows]["us"] / alone[rows]["cublas_us"] for rows in ROWS)
        for cls, tiles in whole.items()
        if tiles[1]["us"] <= 1.05 * least
    }
    cls = min(score, key=lambda c: score[c])
    fields = ("block_t", "block_n", "split", "warps", "stages", "tma")
    tiles = []
    for rows, limit in LIMITS.items():
        tile = LinearTile(limit, *(whole[cls][rows][f] for f in fields))
        tiles.append(tile)
    return LinearEntry(
        *cls, tuple(tiles), f"mean {score[cls]:.3f} of cuBLAS's time at {', '.join(map(str, ROWS))} rows"
    )


def table_rows(result: dict) -> list[dict]:
    """All rows of linear.json: those this run chose, the committed ones for other weights and devices."""
    machine = result["machine"]
    source = f"{machine['gpu']}, triton {machine['triton']}, {machine['date']}: bench/gpu_linear.py"
    rows = {}
    for (n, k, dtype, device), entry in tables.linear_entries().items():
        rows[n, k, str(dtype).removeprefix("torch."), device] = entry
    for size in result["sizes"]:
        for name, alone in size["alone"].items():
            if chosen := choose({int(r): figures for r, figures in alone.items()}):  # keys are text in JSON
                mixed = size.get(f"mixed {name}")
                apart = APART if mixed and mixed["apart"] < 0.99 * mixed["one"] else None
                chosen = replace(chosen, measured=f"{source}, {chosen.measured}", apart=apart)
                n, k = SIZES[size["size"]][1][name]
                rows[n, k, "bfloat16", machine["key"]] = chosen
    return [
        {
            "n": n, "k": k, "dtype": dtype, "device": device, "block_k": entry.block_k,
            "segments": entry.segments, "tiles": [list(vars(tile).values()) for tile in entry.tiles],
            "apart": entry.apart, "measured": entry.measured,
        }
        for (n, k, dtype, device), entry in rows.items()
    ]  # fmt: skip


def as_table(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def show_weight(size: str, name: str, alone: dict[int, dict], entry: LinearEntry | None) -> None:
    """A weight's class and, for each number of rows, cuBLAS, the chosen tile, the best tile of any class."""
    chosen = entry and f"block_k {entry.block_k}, {entry.segments} segments, {entry.measured}"
    say(f"  {size} {name}: {chosen or 'not measured to the end'}")

    def text(v: dict) -> str:
        marks = f"{' split' if v['split'] else ''}{' tma' if v['tma'] else ''}"
        tile = f"t{v['block_t']} n{v['block_n']} w{v['warps']} st{v['stages']}"
        return f"{v['us']:.1f} s{v['segments']} {tile}{marks}"

    for rows in LIMITS:
        found = alone[rows]["variants"]
        if not found:
            continue
        in_class = [v for v in found if entry and v["segments"] == entry.segments]
        peer = alone[rows]["cublas_us"]
        own = f"{peer / in_class[0]['us']:.2f}x {text(in_class[0])}" if in_class else "-"
        plain = next((v for v in found if not v["tma"]), None)
        say(f"    {rows:4} rows: cuBLAS {peer:.1f} µs | {own} | any class {text(found[0])} | "
            f"pointers {text(plain) if plain else '-'}")  # fmt: skip


def rounded(figures: dict) -> dict:
    return {key: round(value, 2) for key, value in figures.items()}


LINE = ("cublas_ms", "table_ms", "table_pdl_ms", "new_ms")


def show(line: dict, roof: float) -> None:
    """One row of the table: ms and share of the read roof."""
    floor = line["weight_bytes"] / roof / 1e6
    cells = [f"{line[key]:7.3f} ms {floor / line[key]:4.0%}" if line[key] else f"{'-':>15}" for key in LINE]
    gain = line["cublas_ms"] / line["new_ms"]
    print(f"{line['size']:>5} {line['rows']:4} rows | " + " | ".join(cells) + f" | {gain:.2f}x", flush=True)


def commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=140, help="start no new measurement after this long")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="compile processes")
    parser.add_argument("--sizes", nargs="+", default=["8B", "1.7B", "4B"], choices=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for linear.json and figures")
    parser.add_argument("--json", type=Path, help="write all figures to this file (--out/gpu_linear.json)")
    parser.add_argument("--table", help="print the table of a run, whose JSON this is, and stop")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(as_table(table_rows(json.loads(Path(given.table).read_text()))), end="")
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script measures one")
    if given.probe:
        probe()
        return
    if given.worker:
        compile_share(*given.worker)
        return
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(), "key": tables.device_key(torch.device(DEVICE)),
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit(),
    }  # fmt: skip
    say(f"{machine}; {len(everything())} kernels to compile with {given.workers} workers")
    compile_all(given.workers, given.seconds * 0.4)
    tried = subprocess.run([sys.executable, __file__, "--probe"], capture_output=True, text=True)
    if tried.returncode:
        global PDL
        PDL = False
        say(f"NO dependent launches in CUDA graphs here: {tried.stderr[-300:]}")
    roof = bandwidth()
    say(f"read bandwidth {roof:.0f} GB/s")
    bad: set = set()
    bits = {}
    for size in given.sizes:
        for n, k in SIZES[size][1].values():
            bits[f"{n}x{k}"] = check_bits(n, k, bad)
            say(f"bits {n}x{k}: {bits[f'{n}x{k}']}")
            torch.cuda.empty_cache()
    bits |= check_row_wise_bits()
    bits["chains of dependent launches"] = check_chains()
    say(f"bits of chains: {bits['chains of dependent launches']}")
    torch.cuda.empty_cache()
    result: dict = {"machine": machine, "read_gb_s": roof, "bits": bits, "sizes": []}
    given.out.mkdir(parents=True, exist_ok=True)
    given.json = given.json or given.out / "gpu_linear.json"
    for i, size in enumerate(given.sizes):
        left = given.seconds - (time.perf_counter() - BEGAN)
        deadline = time.perf_counter() + left / (len(given.sizes) - i) - 5  # 5 s for the stack and the rest
        try:
            result["sizes"].append(run_size(size, bad, deadline, roof))
        except Exception as error:
            say(f"{size} failed: {short(error)}")
        torch.cuda.empty_cache()
        given.json.write_text(json.dumps(result | {"bad": [str(b) for b in bad]}))
        (given.out / "linear.json").write_text(as_table(table_rows(result)))
    lines = [line for size in result["sizes"] for line in size["stack"]]
    say(f"figures: {given.json}, table: {given.out / 'linear.json'}")
    print(f"\n{machine['gpu']}, triton {machine['triton']}, read roof {roof:.0f} GB/s. All linears in "
          f"one CUDA graph, bf16.\nBits: {sum(b['checks'] for b in bits.values())} comparisons, "
          f"{sum(b['failures'] for b in bits.values())} failures.\n"
          f"{'':16} | {'cuBLAS':>15} | {'table':>15} | {'table, PDL':>15} | {'new table':>15} | "
          "cuBLAS / new table")  # fmt: skip
    for line in lines:
        show(line, roof)
    short_result = {key: value for key, value in result.items() if key != "sizes"}
    short_result["sizes"] = [{k: v for k, v in size.items() if k != "alone"} for size in result["sizes"]]
    print(json.dumps(short_result))


if __name__ == "__main__":
    main()
