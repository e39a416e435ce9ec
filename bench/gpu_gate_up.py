"""SwiGLU in the epilogue of the gate and up projections on a GPU: first its bits, then its times.

    PYTHONPATH=src python bench/gpu_gate_up.py       # under 90 s on an H100; JSON to --json

1. Bits at the shapes of 8B, 4B, 1.7B and 0.6B, normal and heavy-tailed inputs: 1 to 256 rows by the table,
   every tile below on slices of them, against the two separate kernels on each row alone.
2. Times at 1 to 192 rows, µs a call: a CUDA graph over 1 GB of weights, each read once in a replay, so that
   L2 holds none of them. Fused by the table and with every tile, against our two kernels, the linear without
   the SwiGLU, and cuBLAS with torch's silu and product. A short table last.

Fails (exit status 1) when any bits differ; no times are reported then."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_linear import bandwidth, commit, graph_ms, heavy, say, short  # noqa: E402

from orthrus_kernels import tables  # noqa: E402
from orthrus_kernels._triton import triton  # noqa: E402
from orthrus_kernels.linear_swiglu import linear_swiglu_triton, swiglu_entry  # noqa: E402
from orthrus_kernels.linear_triton import linear_triton  # noqa: E402
from orthrus_kernels.swiglu import swiglu_triton  # noqa: E402
from orthrus_kernels.tables import LinearEntry, LinearTile  # noqa: E402

DEVICE, BF16 = "cuda", torch.bfloat16
SIZES = {"8B": (12288, 4096), "4B": (9728, 2560), "1.7B": (6144, 2048), "0.6B": (3072, 1024)}  # (F, E)
ROWS = (1, 8, 32, 64, 128, 192)
MOST_ROWS = 256
WEIGHT_BYTES = 1 << 30
# {rows: [(block_h, block_t, warps, stages, tma)]}; a CTA has block_h gate rows and as many up rows. By
# pointers block_h 32 is one wgmma of 64 rows; by descriptors two of 64 need block_h 64. ptxas of triton 3.6.0
# and 3.7.1 for sm_90: none spills, nor do those that `tiles` leaves with 2 segments.
_FEW = [
    (16, 16, 4, 12, False), (32, 16, 4, 6, False), (32, 16, 4, 10, False), (64, 16, 4, 5, False),
    (64, 16, 4, 5, True), (64, 16, 4, 11, True),
]  # fmt: skip
_MANY = [
    (32, 64, 4, 6, False), (32, 128, 4, 4, False), (64, 64, 4, 4, True), (64, 64, 4, 9, True),
    (64, 128, 4, 3, True), (64, 128, 4, 6, True), (64, 128, 8, 3, True), (64, 128, 8, 6, True),
    (128, 128, 8, 4, True),
]  # fmt: skip
CANDIDATES = {
    1: _FEW,
    8: _FEW,
    32: [
        (32, 32, 4, 6, False), (32, 32, 4, 9, False), (64, 32, 4, 5, False), (64, 32, 4, 5, True),
        (64, 32, 4, 9, True),
    ],
    64: [
        (32, 64, 4, 6, False), (64, 64, 4, 4, True), (64, 64, 4, 6, True), (64, 64, 4, 9, True),
        (64, 64, 8, 4, True), (64, 64, 8, 8, True),
    ],
    128: _MANY,
    192: [*_MANY, (64, 256, 8, 4, True)],
}  # fmt: skip
SLICES = ((0, 1), (3, 8), (17, 81), (128, 161), (0, MOST_ROWS))


def own_entry(f: int, e: int) -> LinearEntry:
    return swiglu_entry(2 * f, e, BF16, tables.device_key(torch.device(DEVICE)))


def tiles(entry: LinearEntry, rows: int | None = None) -> list[tuple]:
    """Tiles to try for a number of rows, or all; segments one after another need two accumulators more."""
    wanted = CANDIDATES[rows] if rows else [tile for some in CANDIDATES.values() for tile in some]
    return [
        (block_h, block_t, warps, stages, tma)
        for block_h, block_t, warps, stages, tma in dict.fromkeys(wanted)
        if entry.segments == 1 or 2 * block_h * block_t <= 96 * 32 * warps
    ]


def one_tile(entry: LinearEntry, tile: tuple) -> LinearEntry:
    block_h, block_t, warps, stages, tma = tile
    of = LinearTile(None, block_t, 2 * block_h, False, warps, stages, tma)
    return LinearEntry(entry.block_k, entry.segments, (of,))


def two_kernels(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return swiglu_triton(linear_triton(x, w))


def normal(f: int, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 0.1 to 10 times the size at which a gate is about 1."""
    scale = torch.logspace(-1, 1, MOST_ROWS, device=DEVICE)[:, None]
    x = torch.randn(MOST_ROWS, e, device=DEVICE) * scale
    return x.to(BF16), (torch.randn(2 * f, e, device=DEVICE) * e**-0.5).to(BF16)


def launches() -> Iterator[tuple[int, int, int, LinearEntry | None]]:
    """(F, E, rows, entry) of every compilation of this run; entry None: by the tables, both kernels."""
    seen = set()
    for f, e in SIZES.values():
        own = own_entry(f, e)
        for tile in own.tiles:
            yield f, e, tile.rows or MOST_ROWS + 1, None
        for tile in tiles(own):
            key = own.block_k, own.segments, tile
            if key not in seen:
                seen.add(key)
                yield f, e, 1, one_tile(own, tile)


def compile_share(index: int, of: int) -> None:
    """A compile worker: launch its share once, for Triton's disk cache."""
    for f, e, rows, entry in list(launches())[index::of]:
        x, w = (
            torch.zeros(rows, e, device=DEVICE, dtype=BF16),
            torch.zeros(2 * f, e, device=DEVICE, dtype=BF16),
        )
        try:
            linear_swiglu_triton(x, w, entry=entry)
            if entry is None:
                two_kernels(x, w)
        except Exception as error:
            print(f"{entry}: {short(error)}", flush=True)
    torch.cuda.synchronize()


def compile_all(workers: int, limit: float) -> None:
    """Run the compile workers; whatever they leave undone is compiled on first use."""
    command = [sys.executable, __file__, "--worker"]
    running = [
        subprocess.Popen([*command, str(i), str(workers)], stdout=subprocess.PIPE, text=True)
        for i in range(workers)
    ]
    until = time.perf_counter() + limit
    for process in running:
        try:
            said, _ = process.communicate(timeout=max(until - time.perf_counter(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            say("  a compile worker ran out of time")
        for line in said.splitlines():
            say(f"  compile worker: {line[:220]}")


def check_bits(size: str, bad: set) -> dict[str, int]:
    """Tiles that fail or do not run go to `bad`."""
    f, e = SIZES[size]
    found = {"checks": 0, "failures": 0}

    def expect(ok: bool, what: str) -> bool:
        found["checks"] += 1
        found["failures"] += not ok
        if not ok:
            say(f"  FAILED {size}, {what}")
        return ok

    for kind, (x, w) in {
        "normal": normal(f, e), "heavy": (heavy(MOST_ROWS, e), heavy(2 * f, e))
    }.items():  # fmt: skip
        alone = torch.cat([two_kernels(x[i : i + 1], w) for i in range(MOST_ROWS)])
        gate, up = (x.double() @ part.double().T for part in w.chunk(2))
        exact = gate * gate.sigmoid() * up
        error = ((alone.double() - exact).abs().max() / exact.abs().max()).item()
        expect(error < 2e-2, f"{kind}: error {error:.2e} of the largest number")
        for rows in range(1, MOST_ROWS + 1):
            expect(torch.equal(linear_swiglu_triton(x[:rows], w), alone[:rows]), f"{kind}, {rows} rows")
        for tile in tiles(own_entry(f, e)):
            entry = one_tile(own_entry(f, e), tile)
            try:
                for first, last in SLICES:
                    got = linear_swiglu_triton(x[first:last], w, entry=entry)
                    same = torch.equal(got, alone[first:last])
                    if not expect(same, f"{kind}, tile {tile}, rows {first}-{last}"):
                        bad.add(tile)
            except Exception as problem:
                bad.add(tile)
                say(f"  tile {tile} does not run: {short(problem)}")
    return found


def time_size(size: str, roof: float, bad: set) -> list[dict]:
    """One line for each number of rows, µs a call."""
    f, e = SIZES[size]
    x, w = normal(f, e)
    copies = -(-WEIGHT_BYTES // (w.numel() * 2))
    weights = [w] + [torch.empty_like(w).normal_(0, e**-0.5) for _ in range(copies - 1)]
    own, lines = own_entry(f, e), []
    for rows in ROWS:
        part = x[:rows]
        out = torch.empty(rows, f, device=DEVICE, dtype=BF16)
        wide = torch.empty(rows, 2 * f, device=DEVICE, dtype=BF16)

        def us(call, weights=weights) -> float:
            return graph_ms(lambda: [call(w) for w in weights]) * 1e3 / len(weights)

        def fused(w, entry=None, part=part, out=out) -> None:
            linear_swiglu_triton(part, w, out=out, entry=entry)

        def cublas(w, part=part, wide=wide):
            return torch.mm(part, w.t(), out=wide)

        def torch_chain(w, cublas=cublas) -> None:
            gate, up = cublas(w).chunk(2, -1)
            F.silu(gate) * up

        def linear(w, part=part, wide=wide):
            return linear_triton(part, w, out=wide)

        def both(w, linear=linear, out=out) -> None:
            swiglu_triton(linear(w), out=out)

        line = {
            "size": size, "rows": rows, "floor_us": w.numel() * 2 / roof / 1e3, "cublas_us": us(cublas),
            "torch_us": us(torch_chain), "linear_us": us(linear), "two_us": us(both), "table_us": us(fused),
            "table_tile": str(own.tile(rows)),
        }  # fmt: skip
        tried = {}
        for tile in tiles(own, rows):
            if tile not in bad:
                entry = one_tile(own, tile)
                tried[str(tile)] = us(lambda w, entry=entry, fused=fused: fused(w, entry))
        line["tiles_us"] = dict(sorted(tried.items(), key=lambda item: item[1]))
        lines.append(line)
        shown = ", ".join(f"{tile[1:-1]} {us:.1f}" for tile, us in list(line["tiles_us"].items())[:4])
        say(f"{size}, {rows} rows, table {line['table_us']:.1f}, best tiles: {shown}")
    return lines


def show(lines: list[dict]) -> None:
    print("µs a call, cold L2; tile: block_h, block_t, warps, stages, tma")
    print("size rows | floor cuBLAS  +torch | linear +swiglu | fused   best | two/best torch/best | tile")
    for line in lines:
        tile, best = next(iter(line["tiles_us"].items()), ("-", float("nan")))
        print(f"{line['size']:>4} {line['rows']:4} | {line['floor_us']:5.1f} {line['cublas_us']:6.1f} "
              f"{line['torch_us']:7.1f} | {line['linear_us']:6.1f} {line['two_us']:7.1f} | "
              f"{line['table_us']:5.1f} {best:6.1f} | {line['two_us'] / best:8.3f} "
              f"{line['torch_us'] / best:10.3f} | {tile}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="gpu_gate_up.json", help="write all figures to this file")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script measures one")
    if given.worker:
        compile_share(*given.worker)
        return
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
    }  # fmt: skip
    say(str(machine))
    compile_all(given.workers, limit=40)
    say(f"compiled {len(list(launches()))} launches")
    bad: set = set()
    bits = {}
    for size in SIZES:
        bits[size] = check_bits(size, bad)
        say(f"bits of {size}: {bits[size]}")
    failures = sum(one["failures"] for one in bits.values())
    result: dict = {
        "machine": machine,
        "bits": bits,
        "bad": [str(tile) for tile in bad],
        "failures": failures,
    }
    if not failures:
        result["read_gb_s"] = bandwidth()
        say(f"read bandwidth {result['read_gb_s']:.0f} GB/s")
        result["times"] = [line for size in SIZES for line in time_size(size, result["read_gb_s"], bad)]
        show(result["times"])
    Path(given.json).write_text(json.dumps(result))
    checks = sum(one["checks"] for one in bits.values())
    say(f"{checks} comparisons, {failures} failures, {len(bad)} tiles left out; all in {given.json}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
