"""The head and the choice on a GPU: first their bits, then their times beside torch in the same run.

    PYTHONPATH=src python bench/gpu_head.py          # under 2 minutes on an H100; JSON to --json

1. Bits of the head, V 151936: 1 to 192 rows, every tile, any place, against one row alone, against the
   summary of logits that `linear` wrote, and against torch on those logits.
2. Bits of the choice: every setting, 1 to 192 rows against rows alone, and how many choices are the twin's.
3. Times, medians of CUDA-graph replays, L2 emptied before each: the head against torch.mm, topk and
   logsumexp; the choice against its twin's steps where torch can capture them.

Fails (exit status 1) when any bits differ; no times are reported then."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_linear import bandwidth, commit, say, short  # noqa: E402

from orthrus_kernels import Sampling, choose, tables  # noqa: E402
from orthrus_kernels._triton import triton  # noqa: E402
from orthrus_kernels.choice_triton import choose_triton, log_probability_triton  # noqa: E402
from orthrus_kernels.head import head_entry, head_triton  # noqa: E402
from orthrus_kernels.linear_triton import linear_triton  # noqa: E402
from orthrus_kernels.logit_summary import summary_of_logits  # noqa: E402
from orthrus_kernels.tables import LinearEntry, LinearTile  # noqa: E402

DEVICE, BF16 = "cuda", torch.bfloat16
V = 151936
WIDTHS = {"1.7B": 2048, "8B": 4096}
ROWS = (1, 8, 32, 64, 128, 192)
MOST_ROWS = max(ROWS)
# (block_t, block_n, warps, stages); none spilled when they were chosen (ptxas of triton 3.7.1, sm_90)
TILES = (
    (16, 64, 4, 6), (16, 128, 4, 5), (32, 64, 4, 6), (32, 128, 4, 5), (64, 64, 4, 6), (64, 128, 4, 4),
    (64, 128, 8, 4), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 4),
)  # fmt: skip
SETTINGS = {
    "greedy": {},
    "T 0.8": {"temperature": 0.8},
    "T 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "T 0.8, top-k 20, top-p 0.95": {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "everything": {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
                   "logit_bias": {7: 1.0, 9: float("-inf")}},
}  # fmt: skip


def tile_entry(e: int, block_t: int, block_n: int, warps: int, stages: int) -> LinearEntry:
    of = own_entry(e)
    return LinearEntry(of.block_k, of.segments, (LinearTile(None, block_t, block_n, False, warps, stages),))


def own_entry(e: int) -> LinearEntry:
    return head_entry(V, e, BF16, tables.device_key(torch.device(DEVICE)))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def operands(e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised rows and a head's weight: logits of a few units, some rows sharp, one token twice."""
    x = torch.randn(MOST_ROWS, e, device=DEVICE) * torch.logspace(-1, 1, MOST_ROWS, device=DEVICE)[:, None]
    w = torch.randn(V, e, device=DEVICE, dtype=BF16) * 0.05
    w[100_000] = w[17]  # a tie, in another tile
    return x.to(BF16), w


def check_head(e: int, bad: set) -> dict[str, int]:
    """Failing tiles go to `bad`."""
    x, w = operands(e)
    found = {"checks": 0, "failures": 0}

    def expect(ok: bool, what: str) -> None:
        found["checks"] += 1
        found["failures"] += not ok
        if not ok:
            say(f"  FAILED head, E {e}: {what}")

    for k in (1, 16):
        parts = [head_triton(x[i : i + 1], w, k) for i in range(MOST_ROWS)]
        alone = [torch.cat(part) for part in zip(*parts, strict=True)]
        for rows in range(1, MOST_ROWS + 1):
            expect(same(head_triton(x[:rows], w, k), [part[:rows] for part in alone]), f"k {k}, {rows} rows")
        logits = linear_triton(x, w, out_dtype=torch.float32)
        expect(same(summary_of_logits(logits, k), alone), f"k {k}, written logits")
        ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
        expect(torch.equal(alone[1], ids), f"k {k}, ids of a stable sort")
        expect(torch.equal(alone[0], logits.gather(1, ids)), f"k {k}, logits of a stable sort")
        error = (alone[2].double() - torch.logsumexp(logits.double(), -1)).abs()
        expect(bool((error <= 2**-19 + 2**-22 * alone[2].abs()).all()), f"log-sum-exp {error.max():.2e}")
        one = log_probability_triton(logits, ids[:, 0])
        expect(torch.equal(one, alone[0][:, 0] - alone[2]), f"k {k}, log-probability")
        for tile in TILES:
            try:
                for first, last in ((0, MOST_ROWS), (0, 1), (3, 8), (17, 81), (128, 161)):
                    got = head_triton(x[first:last], w, k, entry=tile_entry(e, *tile))
                    what = f"k {k}, tile {tile}, rows {first}-{last}"
                    expect(same(got, [part[first:last] for part in alone]), what)
            except Exception as error:
                bad.add(tile)
                say(f"  tile {tile} does not run: {short(error)}")
    return found


def check_choice() -> dict[str, dict]:
    """Rows alone against passes of any length; agreement with the twin on the same GPU."""
    logits = torch.randn(MOST_ROWS, V, device=DEVICE)
    logits *= torch.logspace(-0.5, 0.8, MOST_ROWS, device=DEVICE)[:, None]  # flat rows to sharp ones
    logits[::5] = logits[::5].round()  # ties at every edge
    seen = torch.rand(MOST_ROWS, V, device=DEVICE) < 0.01
    positions = torch.randint(0, 40_000, (MOST_ROWS,), device=DEVICE)
    found = {}
    for name, settings in SETTINGS.items():
        sampling = Sampling(seed=2**40 + 3, **settings)
        alone = torch.cat([choose_triton(logits[i : i + 1], positions[i : i + 1], sampling, seen[i : i + 1])
                           for i in range(MOST_ROWS)])  # fmt: skip
        fail = 0
        for rows in range(1, MOST_ROWS + 1):
            got = choose_triton(logits[:rows], positions[:rows], sampling, seen[:rows])
            fail += not torch.equal(got, alone[:rows])
        for first, last in ((3, 8), (17, 81), (128, 161)):
            got = choose_triton(logits[first:last], positions[first:last], sampling, seen[first:last])
            fail += not torch.equal(got, alone[first:last])
        agree = int((choose(logits, positions, sampling, seen) == alone).sum())
        # masses and noise are rounded otherwise than the twin's: a near-tie may fall the other way
        fail += agree < MOST_ROWS - 2 or (name == "greedy" and agree < MOST_ROWS)
        found[name] = {"checks": MOST_ROWS + 4, "failures": fail, "as_twin": f"{agree}/{MOST_ROWS}"}
        say(f"bits of the choice, {name}: {found[name]}")
    return found


class Clock:
    """Median µs of a call in a CUDA graph, after a write of 256 MB that leaves nothing of it in L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(1 << 26, device=DEVICE)

    def us(self, call: Callable[[], object], replays: int = 15) -> float:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)


def time_head(size: str, clock: Clock, roof: float, bad: set) -> list[dict]:
    e = WIDTHS[size]
    x, w = operands(e)
    floor = w.numel() * 2 / roof / 1e3
    lines = []
    for rows in ROWS:
        part = x[:rows]

        def peer(part=part) -> None:
            logits = torch.mm(part, w.t()).float()
            logits.topk(16)
            logits.logsumexp(-1)

        line = {"size": size, "rows": rows, "floor_us": floor, "torch_us": clock.us(peer),
                "mm_us": clock.us(lambda part=part: torch.mm(part, w.t())),
                "linear_us": clock.us(lambda part=part: linear_triton(part, w, out_dtype=torch.float32)),
                }  # fmt: skip
        for k in (1, 16):
            line[f"k{k}_us"] = clock.us(lambda part=part, k=k: head_triton(part, w, k))
        tried = {}
        for tile in TILES:
            if tile in bad or tile[0] > max(2 * rows, 16) or tile[0] * 4 < min(rows, 128):
                continue
            entry = tile_entry(e, *tile)
            tried[str(tile)] = clock.us(lambda p=part, entry=entry: head_triton(p, w, 16, entry=entry), 7)
        line["k16_tiles_us"] = dict(sorted(tried.items(), key=lambda item: item[1]))
        lines.append(line)
        best = next(iter(line["k16_tiles_us"].items()), ("-", 0.0))
        print(f"{size:>5} {rows:4} rows | floor {floor:6.0f} | torch {line['torch_us']:6.0f} (mm alone "
              f"{line['mm_us']:6.0f}) | linear {line['linear_us']:6.0f} | head k 1 {line['k1_us']:6.0f}, "
              f"k 16 {line['k16_us']:6.0f} µs; best tile {best[0]} {best[1]:.0f}", flush=True)  # fmt: skip
    return lines


def time_choice(clock: Clock) -> list[dict]:
    logits = torch.randn(MOST_ROWS, V, device=DEVICE) * 2.5
    positions = torch.arange(MOST_ROWS, device=DEVICE)
    lines = []
    for name, settings in SETTINGS.items():
        if "repetition_penalty" in settings:
            continue
        sampling = Sampling(seed=1, **settings)
        line = {"settings": name}
        for rows in (1, 32, 192):
            line[f"{rows}_us"] = clock.us(
                lambda rows=rows, s=sampling: choose_triton(logits[:rows], positions[:rows], s)
            )
        lines.append(line)
        print({key: round(us) if isinstance(us, float) else us for key, us in line.items()}, flush=True)
    ids = logits.argmax(-1)
    line = {"settings": "log_probability"}
    for rows in (1, 32, 192):
        line[f"{rows}_us"] = clock.us(lambda r=rows: log_probability_triton(logits[:r], ids[:r]))
    print(line, flush=True)
    return [*lines, line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="gpu_head.json", help="write all figures to this file")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script measures one")
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
    }  # fmt: skip
    say(str(machine))
    bad: set = set()
    result: dict = {"machine": machine, "head_bits": {}}
    for size, e in WIDTHS.items():
        result["head_bits"][size] = check_head(e, bad)
        say(f"bits of the head, {size}: {result['head_bits'][size]}")
    result["choice_bits"] = check_choice()
    found = [*result["head_bits"].values(), *result["choice_bits"].values()]
    failures = sum(one["failures"] for one in found)
    result |= {"bad": [str(tile) for tile in bad], "failures": failures}
    if not failures:
        result["read_gb_s"] = bandwidth()
        say(f"read bandwidth {result['read_gb_s']:.0f} GB/s; µs, cold L2")
        clock = Clock()
        roof = result["read_gb_s"]
        result["head"] = [line for size in WIDTHS for line in time_head(size, clock, roof, bad)]
        result["choice"] = time_choice(clock)
    Path(given.json).write_text(json.dumps(result))
    say(f"{sum(one['checks'] for one in found)} comparisons, {failures} failures; all in {given.json}")
    print(json.dumps({key: value for key, value in result.items() if key != "head"}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
