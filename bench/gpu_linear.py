"""The linear kernel on a GPU: first its bits, then its time beside cuBLAS in the same run.

    PYTHONPATH=src python bench/gpu_linear.py        # under 150 s on an H100; table last, JSON to --json
    PYTHONPATH=src python bench/gpu_linear.py --table gpu_linear.json      # anywhere: rows for linear.json

1. Read bandwidth: a plain Triton kernel that reads 4 GB once. All shares are of this figure.
2. Bits: every tile of every reduction class, rows 1 to 256, any index, both views, against one row alone; the
   row-wise kernels likewise.
3. Each weight of each size alone, cold (a CUDA graph over all layers' weights, more than L2 holds): cuBLAS
   and every tile variant.
4. The layer stack of linears in one CUDA graph: cuBLAS, the committed table, the best tiles of its reduction
   class, the best of any class.
5. A mixed pass (both views' weights in one launch), and prefill.

A variant that does not compile or gives other bits is shown and left out. Nothing here writes the table."""

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
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from orthrus_kernels import tables  # noqa: E402
from orthrus_kernels._triton import tl, triton  # noqa: E402
from orthrus_kernels.backends import backend_ops  # noqa: E402
from orthrus_kernels.linear import Workspace, linear_triton  # noqa: E402
from orthrus_kernels.tables import LinearEntry, LinearTile  # noqa: E402

BEGAN = time.perf_counter()
BF16 = torch.bfloat16
DEVICE = "cuda"
# size: (layers, {projection: (N, K)})
SIZES = {
    "1.7B": (28, {"qkv": (4096, 2048), "o": (2048, 2048), "gate_up": (12288, 2048), "down": (2048, 6144)}),
    "4B": (36, {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728)}),
    "8B": (36, {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}),
}
ROWS = (1, 8, 32, 64, 128, 192)
# {block_t: [(block_n, warps, stages at BLOCK_K 64)]}
VARIANTS = {
    16: [(64, 4, 6), (128, 4, 5), (128, 8, 5), (32, 4, 8)],
    32: [(64, 4, 6), (128, 4, 5), (128, 8, 4)],
    64: [(64, 4, 6), (128, 4, 4), (128, 8, 4), (256, 8, 4)],
    128: [(64, 4, 4), (128, 8, 4), (128, 8, 3), (256, 8, 4)],
    256: [(64, 4, 3), (128, 8, 3), (128, 8, 4)],
}
TILES_FOR_ROWS = {1: (16,), 8: (16,), 32: (32,), 64: (64,), 128: (128, 64), 192: (64, 128, 256)}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.1f} s] {text}", flush=True)


def classes(n: int, k: int) -> list[tuple[int, int]]:
    """Reduction classes (block_k, segments) to compare: the table's first."""
    entry = table(n, k)
    around = {1: (2, 4), 2: (1, 4), 4: (2, 8), 8: (4,)}[entry.segments]
    others = [(entry.block_k, s) for s in around if k % (s * entry.block_k) == 0 and k // s >= 256]
    return [(entry.block_k, entry.segments), (2 * entry.block_k, entry.segments), *others]


def table(n: int, k: int) -> LinearEntry:
    return tables.linear_entry(n, k, BF16, tables.device_key(torch.device(DEVICE)))


def variants(rows: int, block_k: int, segments: int) -> list[LinearTile]:
    """Tiles to try for a number of rows; each takes any number."""
    tiles = []
    for block_t in TILES_FOR_ROWS[rows]:
        for block_n, warps, stages in VARIANTS[block_t]:
            if block_k == 128 and (block_t > 64 or block_n > 128):
                continue
            forms = (False,) if segments == 1 else (True,) if rows <= 64 else (True, False)
            stages = stages if block_k == 64 else max(stages // 2 + 1, 3)
            if segments > 1 and block_t * block_n * block_k > 128 * 1024 * warps:
                forms = (True,)  # one after another, segments need two accumulators: ptxas saw these spill
            tiles += [LinearTile(None, block_t, block_n, split, warps, stages) for split in forms]
    return tiles


def single(block_k: int, segments: int, tile: LinearTile) -> LinearEntry:
    return LinearEntry(block_k, segments, (tile,))


def everything() -> list[tuple[int, int, LinearTile]]:
    """Every (block_k, segments, tile) this run launches, for the compile workers."""
    specs = {}
    for _, shapes in SIZES.values():
        for n, k in shapes.values():
            for tile in table(n, k).tiles:
                tile = LinearTile(None, *list(vars(tile).values())[1:])
                specs[table(n, k).block_k, table(n, k).segments, tile] = None
            for block_k, segments in classes(n, k):
                for rows in ROWS:
                    specs.update(
                        dict.fromkeys((block_k, segments, t) for t in variants(rows, block_k, segments))
                    )
    return list(specs)


def compile_share(index: int, of: int) -> None:
    """A compile worker: launch its share of the variants once on a small weight, for Triton's disk cache."""
    x, w = (torch.zeros(512, 1024, device=DEVICE, dtype=BF16) for _ in range(2))
    for block_k, segments, tile in everything()[index::of]:
        try:
            linear_triton(x, w, entry=single(block_k, segments, tile))
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


def graph_ms(call: Callable[[], object], replays: int = 7) -> float:
    """Median milliseconds of a call, captured in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
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

    Failing (class, tile) triples go to `bad`. `block_k_agrees` says whether one row's bits were the same for
    BLOCK_K 64 and 128, which no promise needs."""
    x, w, w2 = heavy(256, k), heavy(n, k), heavy(n, k)
    found = {"checks": 0, "failures": 0}
    rows_alone = {}
    for block_k, segments in classes(n, k):
        entry = single(block_k, segments, LinearTile(None, 16, 64, True, 4, 4))
        alone = torch.cat([linear_triton(x[i : i + 1], w, entry=entry) for i in range(256)])
        alone2 = torch.cat([linear_triton(x[i : i + 1], w2, entry=entry) for i in range(256)])
        rows_alone[block_k, segments] = alone
        for tile in dict.fromkeys(t for rows in ROWS for t in variants(rows, block_k, segments)):
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
    error = ((alone.double() - exact).abs().max() / exact.abs().max()).item()
    if not error < 1e-2:
        found["failures"] += 1
        say(f"  WRONG {n}x{k}: error {error:.2e} of the largest output")
    found["block_k_agrees"] = int(torch.equal(alone, rows_alone[2 * entry.block_k, entry.segments]))
    return found


def check_row_wise_bits(e: int = 4096, heads: int = 32, groups: int = 8, d: int = 128) -> dict[str, dict]:
    """Rows of the norms, q/k-norm with RoPE and SwiGLU: each alone against slices of a pass of 256."""
    ops = backend_ops("triton")
    stacked = heads + 2 * groups
    x, qkv, wide = heavy(256, e), heavy(256, stacked, d), heavy(256, 2 * e)
    g, g2, q, k, q2, k2 = (heavy(n) for n in (e, e, d, d, d, d))
    cos, sin = (torch.rand(256, d // 2, device=DEVICE) for _ in range(2))

    def qk(a: int, b: int, n_ar: int) -> torch.Tensor:
        part = ops.qk_norm_rope(qkv[a:b], heads, q, k, cos[a:b], sin[a:b], 1e-6, q2, k2, n_ar)
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

    def ours(self, name: str, rows: int, layer: int, entry: LinearEntry | None) -> None:
        x, y = self.x[name][:rows], self.y[name][:rows]
        linear_triton(x, self.weights[name][layer], out=y, entry=entry, space=self.space)

    def cublas(self, name: str, rows: int, layer: int) -> None:
        torch.mm(self.x[name][:rows], self.weights[name][layer].t(), out=self.y[name][:rows])

    def alone(self, name: str, rows: int) -> dict:
        """µs a layer of one projection by cuBLAS and by every variant, best first."""
        layers = range(self.layers)

        def layer_us(run: Callable[[int], None]) -> float:
            return graph_ms(lambda: [run(i) for i in layers], 4) / self.layers * 1e3

        found = []
        peer = layer_us(lambda i: self.cublas(name, rows, i))
        own, *_ = classes(*self.shapes[name])
        for block_k, segments in classes(*self.shapes[name]):
            for tile in variants(rows, block_k, segments):
                late = time.perf_counter() - self.deadline
                if (block_k, segments, tile) in self.bad or late > (10 if own == (block_k, segments) else 0):
                    continue  # late: only the table's own class is still measured
                try:
                    us = layer_us(partial(self.ours, name, rows, entry=single(block_k, segments, tile)))
                except Exception as error:
                    self.bad.add((block_k, segments, tile))
                    say(f"  {block_k} {segments} {tile}: {short(error)}")
                    continue
                found.append({"us": us, "block_k": block_k, "segments": segments, **vars(tile)})
        return {"cublas_us": peer, "variants": sorted(found, key=lambda v: v["us"])}

    def stack(self, rows: int, entries: dict[str, LinearEntry | None] | None) -> float:
        """ms of all linears of the model, layer by layer; entries None: cuBLAS."""

        def run() -> None:
            for i in range(self.layers):
                for name in self.shapes:
                    if entries is None:
                        self.cublas(name, rows, i)
                    else:
                        self.ours(name, rows, i, entries[name])

        return graph_ms(run)

    def mixed(self, n_ar: int, n_diff: int) -> dict[str, float]:
        """µs a layer of qkv and o on a mixed pass: one launch with both weights, and cuBLAS twice."""
        rows, half, names = n_ar + n_diff, self.layers // 2, ("qkv", "o")

        def one() -> None:
            for name in names:
                for i in range(half):
                    w, w2 = self.weights[name][2 * i : 2 * i + 2]
                    x, y = self.x[name][:rows], self.y[name][:rows]
                    linear_triton(x, w, w2, n_ar, out=y, space=self.space)

        def two() -> None:
            for name in names:
                for i in range(half):
                    for w, a, b in zip(self.weights[name][2 * i :], (0, n_ar), (n_ar, rows), strict=False):
                        torch.mm(self.x[name][a:b], w.t(), out=self.y[name][a:b])

        return {"ours_us": graph_ms(one) / half * 1e3, "cublas_twice_us": graph_ms(two) / half * 1e3}

    def prefill(self, rows: int) -> dict[str, float]:
        """ms of four layers' linears at many rows."""
        few = range(4)
        return {
            "ours_ms": graph_ms(lambda: [self.ours(n, rows, i, None) for i in few for n in self.shapes], 3),
            "cublas_ms": graph_ms(lambda: [self.cublas(n, rows, i) for i in few for n in self.shapes], 3),
        }


def run_size(size: str, bad: set, deadline: float, roof: float) -> list[dict]:
    """All figures of one size; rows of the final table."""
    bench = Bench(size, bad, deadline)
    lines = []
    for rows in ROWS:
        alone = {name: bench.alone(name, rows) for name in bench.shapes}
        own, best = {}, {}
        for name, (n, k) in bench.shapes.items():
            entry, found = table(n, k), alone[name]["variants"]
            in_class = [v for v in found if (v["block_k"], v["segments"]) == (entry.block_k, entry.segments)]
            for chosen, among in ((own, in_class), (best, found)):
                v = among[0] if among else None
                tile = v and LinearTile(
                    None, *(v[f] for f in ("block_t", "block_n", "split", "warps", "stages"))
                )
                chosen[name] = single(v["block_k"], v["segments"], tile) if v and tile else entry
        line = {
            "size": size, "rows": rows, "cublas_ms": bench.stack(rows, None),
            "table_ms": bench.stack(rows, dict.fromkeys(bench.shapes)),
            "class_ms": bench.stack(rows, own), "best_ms": bench.stack(rows, best),
            "weight_bytes": bench.bytes, "alone": alone,
        }  # fmt: skip
        lines.append(line)
        show(line, roof)
        for name, result in alone.items():
            top = "  ".join(
                f"{v['us']:.1f}: k{v['block_k']} s{v['segments']} t{v['block_t']} n{v['block_n']}"
                f" w{v['warps']} st{v['stages']}"
                f"{' split' if v['split'] else ''}"
                for v in result["variants"][:3]
            )
            say(f"    {name:8} cuBLAS {result['cublas_us']:.1f} µs | {top}")
    try:
        lines[-1]["mixed"] = bench.mixed(33, 144)
        lines[-1]["prefill"] = bench.prefill(4096)
        say(f"  {size} mixed 33 + 144 rows, qkv + o, µs a layer: {rounded(lines[-1]['mixed'])}; prefill of "
            f"4096 rows, 4 layers: {rounded(lines[-1]['prefill'])}")  # fmt: skip
    except Exception as error:
        say(f"  {size} mixed or prefill failed: {short(error)}")
    return lines


def table_rows(result: dict) -> list[dict]:
    """Rows for tables/linear.json from a run's figures: the class with the best mean time over cuBLAS's, and
    its best tile for each number of rows. What was not measured at every number of rows is left out."""
    out = []
    for size, (_, shapes) in SIZES.items():
        lines = {line["rows"]: line["alone"] for line in result["stack"] if line["size"] == size}
        for name, (n, k) in shapes.items():
            best: dict[tuple[int, int], dict[int, dict]] = {}
            for rows, alone in lines.items():
                for v in reversed(alone[name]["variants"]):  # slowest first: the fastest stays
                    best.setdefault((v["block_k"], v["segments"]), {})[rows] = v
            score = {
                cls: statistics.geometric_mean(
                    v["us"] / lines[r][name]["cublas_us"] for r, v in tiles.items()
                )
                for cls, tiles in best.items()
                if len(tiles) == len(ROWS)
            }
            if not score:
                continue
            cls = min(score, key=lambda c: score[c])
            fields = ("block_t", "block_n", "split", "warps", "stages")
            limits = {8: 16, 32: 32, 64: 64, 128: 128, 192: 256}
            tiles = [[limit, *(best[cls][rows][f] for f in fields)] for rows, limit in limits.items()]
            machine = result["machine"]
            out.append({
                "n": n, "k": k, "dtype": "bfloat16", "device": machine["key"], "block_k": cls[0],
                "segments": cls[1], "tiles": [*tiles, [None, 128, 128, False, 8, 3]],
                "measured": f"{machine['gpu']}, triton {machine['triton']}, {machine['date']}: "
                f"bench/gpu_linear.py, mean {score[cls]:.3f} of cuBLAS's time",
            })  # fmt: skip
    return out


def rounded(figures: dict) -> dict:
    return {key: round(value, 2) for key, value in figures.items()}


def show(line: dict, roof: float) -> None:
    """One row of the table: ms and share of the read roof."""
    floor = line["weight_bytes"] / roof / 1e6
    cells = [
        f"{line[key]:7.3f} ms {floor / line[key]:4.0%}"
        for key in ("cublas_ms", "table_ms", "class_ms", "best_ms")
    ]
    gain = line["cublas_ms"] / line["class_ms"]
    print(f"{line['size']:>5} {line['rows']:4} rows | " + " | ".join(cells) + f" | {gain:.2f}x", flush=True)


def commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=135, help="start no new measurement after this long")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="compile processes")
    parser.add_argument("--sizes", nargs="+", default=["8B", "1.7B", "4B"], choices=list(SIZES))
    parser.add_argument("--json", default="gpu_linear.json", help="write all figures to this file")
    parser.add_argument("--table", help="print rows for tables/linear.json from this run's JSON, and stop")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        rows = table_rows(json.loads(Path(given.table).read_text()))
        print("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]")
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script measures one")
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
    roof = bandwidth()
    say(f"read bandwidth {roof:.0f} GB/s")
    bad: set = set()
    bits = {}
    for n, k in ((4096, 4096), (6144, 4096), (4096, 12288), (2048, 6144), (2560, 9728), (2048, 2048)):
        bits[f"{n}x{k}"] = check_bits(n, k, bad)
        say(f"bits {n}x{k}: {bits[f'{n}x{k}']}")
        torch.cuda.empty_cache()
    bits |= check_row_wise_bits()
    lines: list[dict] = []
    for i, size in enumerate(given.sizes):
        left = given.seconds - (time.perf_counter() - BEGAN)
        deadline = time.perf_counter() + left / (len(given.sizes) - i)
        try:
            lines += run_size(size, bad, deadline, roof)
        except Exception as error:
            say(f"{size} failed: {short(error)}")
        torch.cuda.empty_cache()
    result = {
        "machine": machine,
        "read_gb_s": roof,
        "bits": bits,
        "bad": [str(b) for b in bad],
        "stack": lines,
    }
    Path(given.json).write_text(json.dumps(result))
    say(f"everything is in {given.json}")
    print(f"\n{machine['gpu']}, triton {machine['triton']}, read roof {roof:.0f} GB/s. All linears in "
          f"one CUDA graph, bf16.\nBits: {sum(b['checks'] for b in bits.values())} comparisons, "
          f"{sum(b['failures'] for b in bits.values())} failures.\n"
          f"{'':16} | {'cuBLAS':>15} | {'committed table':>15} | {'best tiles':>15} | {'best class':>15} | "
          "cuBLAS / best tiles")  # fmt: skip
    for line in lines:
        show(line, roof)
    print(json.dumps({k: v for k, v in result.items() if k != "stack"}
                     | {"stack": [{k: round(v, 4) if isinstance(v, float) else v for k, v in line.items() if
                     k != "alone"}
                                  for line in lines]}))  # fmt: skip


if __name__ == "__main__":
    main()
