"""Attention on a GPU: first whether a row's bits are its own, then what it costs beside SDPA.

One 8B layer (32 query heads, 8 key heads, head 128, bf16). Times are medians of CUDA graph replays over as
many layers as overflow the L2 cache several times, divided by the layers. SDPA runs without a mask over the
context's keys, which favours it. "fused": the last program of a key head folds; "apart": a second kernel
does; "roof": the time that reading the keys and values once takes. The run takes about 90 seconds; the last
line is JSON."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthrus_kernels import Rows, visible
from orthrus_kernels import attention_triton as at
from orthrus_kernels.packed import pack

DEVICE, DTYPE = "cuda", torch.bfloat16
H, G, D = 32, 8, 128
RESULTS: dict = {}
# fmt: off
CONTEXTS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 1000, 2047, 2048, 2049, 3000, 4095,
            8191, 8192, 16384, 32000, 32768)
# fmt: on


def attempt(name: str, work):
    """What `work` returns, or a short word for its error, which is shown."""
    try:
        return work()
    except Exception as error:  # one variant must not end the run
        print(f"  {name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
        return None


# ------------------------------------------------------------------------------------------------ bits


def random_tree(rng: random.Random, nodes: int) -> list[int]:
    return [-1] + [i - 1 if rng.random() < 0.5 else rng.randrange(i) for i in range(1, nodes)]


def rows_after(rows: Rows, kept: list[int], context: int) -> Rows:
    """The rows of `kept` alone on `context` committed positions: a chain of AR rows, or one block."""
    if rows.blocks[kept[0]] < 0:
        return Rows.chain([1] * len(kept), context)
    return Rows.block(1, len(kept), context, 2)


def bits(seconds: float) -> None:
    """Random passes: chosen rows alone, their ancestors committed, against the same rows inside."""
    shapes = [(128, 32, DTYPE), (128, 16, DTYPE), (64, 16, DTYPE), (128, 32, torch.float32)]
    for d, heads, dtype in shapes:  # head size, query heads; compile before the clock starts
        x, c = (torch.zeros(s, device=DEVICE, dtype=dtype) for s in ((1, heads, d), (1, G, 16, d)))
        for height, form in heights_and_forms(d, heads, dtype):
            packed = pack(Rows.chain([1], 3), height, DEVICE)
            at.attention_triton(x, x[:, :G], x[:, :G], c, c, packed, 1.0, form=form)
        for n in (1, 2, 4):  # the kernels that fold
            x = torch.zeros(n, heads, d, device=DEVICE, dtype=dtype)
            if n * heads // G <= at.FUSED_HEADS and n <= at.tile_rows(heads, G, d, dtype):
                chain = Rows.chain([1] * n, 3)
                at.attention_triton(x, x[:, :G], x[:, :G], c, c, chain, 1.0, form="fused")
    rng, until = random.Random(1), time.time() + seconds
    count = dict.fromkeys(
        ("passes", "rows", "differ", "forms", "forms differ", "tall differ", "gathered differ", "fused",
         "fused differ", "splits", "splits differ"), 0,
    )  # fmt: skip
    worst = 0.0
    while time.time() < until:
        d, heads, dtype = rng.choice(shapes[:3] if rng.random() < 0.9 else shapes[3:])
        room = 700
        context = rng.choice(CONTEXTS) if rng.random() < 0.7 else rng.randrange(4096)
        torch.manual_seed(count["passes"])
        k_cache, v_cache = (torch.randn(1, G, context + room, d, device=DEVICE).to(dtype) for _ in "kv")
        k_cache[:, :, context:] = v_cache[:, :, context:] = float("nan")
        parents = random_tree(rng, rng.randint(1, 64))
        anchors = rng.sample(range(len(parents)), min(rng.choice([0, 0, 1, 5, 24]), len(parents)))
        size = rng.choice([2, 6, 32]) if len(anchors) < 6 else 6
        rows = Rows.tree_with_blocks([1] * len(parents), parents, context, anchors, size, 2)
        n = len(rows)
        q, k, v = (torch.randn(n, h, d, device=DEVICE).to(dtype) for h in (heads, G, G))
        kind = rng.random()
        if kind < 0.3:
            q[..., d // 3] *= 300
        elif kind < 0.5:
            v *= torch.exp2(torch.randint(-15, 16, v.shape, device=DEVICE)).to(dtype)
        args = q, k, v, k_cache, v_cache
        got = at.attention_triton(*args, rows, d**-0.5)
        for height, form in heights_and_forms(d, heads, dtype):
            packed = pack(rows, height, DEVICE)
            for tables, key in ((packed, ""), (gathered(packed), "gathered ")):
                same = torch.equal(at.attention_triton(*args, tables, d**-0.5, form=form), got)
                key = key or ("tall " if height > at.tile_rows(heads, G, d, dtype) else "forms ")
                count[key + "differ"] += not same
                count["forms"] += 1
        if count["passes"] % 20 == 0:
            worst = max(worst, error(rows, q, k, v, k_cache, v_cache, got))
        chosen = [[i] for i in rng.sample(range(rows.n_ar), min(2, rows.n_ar))]
        if anchors:
            block = rng.randrange(len(anchors))
            chosen.append([i for i in range(n) if rows.blocks[i] == block])
        for kept in chosen:
            above = rows.ancestors(kept[0])
            kc, vc = k_cache.clone(), v_cache.clone()
            end = context + len(above)
            kc[0, :, context:end], vc[0, :, context:end] = k[above].transpose(0, 1), v[above].transpose(0, 1)
            alone = rows_after(rows, kept, end)
            call = q[kept], k[kept], v[kept], kc, vc, alone, d**-0.5
            out = at.attention_triton(*call)
            if len(kept) * heads // G <= at.FUSED_HEADS and len(kept) <= at.tile_rows(heads, G, d, dtype):
                for form in ("fused", "partial"):
                    count["fused"] += 1
                    count["fused differ"] += not torch.equal(at.attention_triton(*call, form=form), out)
            count["rows"] += len(kept)
            count["differ"] += len(kept) - int((out == got[kept]).flatten(1).all(1).sum())
        split_case(rng, d, heads, dtype, count)
        count["passes"] += 1
    RESULTS["bits"] = count | {"max error / max output": worst}
    print("BITS", RESULTS["bits"], flush=True)


def heights_and_forms(d: int, heads: int, dtype: torch.dtype):
    """Every (tile height, form) that a pass may take."""
    short = at.tile_rows(heads, G, d, dtype)
    tall = at.TALL * short if dtype.itemsize == 2 else short
    return [(short, "partial"), *((height, "whole") for height in sorted({short, tall}))]


def gathered(packed):
    """The same tables, the chains in flight left unsaid: every key of them goes through its slot."""
    tiles = packed.tiles.clone()
    tiles[:, 5] = 2**30
    return replace(packed, tiles=tiles)


def soak(launches: int = 2000) -> None:
    """Thousands of launches into partials poisoned before each: a fold that comes too early shows.

    Counts the outputs that differ from the first, which is compared with another form's."""
    bench = Bench(4096)
    for n, form in ((1, "fused"), (4, "fused"), (1, "partial"), (64, "partial")):
        rows = Rows.chain([1] * n, 4096)
        want = bench.ours(rows, "whole")(0).clone()
        work = bench.ours(rows, form)
        differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(launches):
            bench.space.fill_(float("nan"))
            differ += (work(0) != want).any()
        RESULTS.setdefault("soak", {})[f"{n} rows {form}"] = f"{differ.item()} of {launches} differ"
    print("SOAK", RESULTS["soak"], flush=True)


def split_case(rng: random.Random, d: int, heads: int, dtype: torch.dtype, count: dict) -> None:
    """The last row of a sequence alone, against it at the end of a chain of up to 600 rows in flight."""
    total = rng.choice([rng.randint(2, 700), rng.randint(2, 2200), rng.randint(8000, 9000)])
    flight = min(total, rng.choice([2, 7, 17, 33, 64, 600]))
    q, k, v = (torch.randn(total, h, d, device=DEVICE).to(dtype) for h in (heads, G, G))
    outs = []
    for rows in (1, flight):
        done = total - rows
        kc, vc = (torch.full((1, G, total, d), float("nan"), device=DEVICE, dtype=dtype) for _ in "kv")
        kc[0, :, :done], vc[0, :, :done] = k[:done].transpose(0, 1), v[:done].transpose(0, 1)
        chain = Rows.chain([1] * rows, done)
        outs.append(at.attention_triton(q[done:], k[done:], v[done:], kc, vc, chain, d**-0.5)[-1])
    count["splits"] += 1
    count["splits differ"] += not torch.equal(outs[0], outs[1])


def error(rows: Rows, q, k, v, k_cache, v_cache, got) -> float:
    """Largest difference from an fp64 softmax under `visible`, over the largest output."""
    n, context, group = len(rows), rows.contexts[0], q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([c[0, :, :context], f.transpose(0, 1)], 1).double().repeat_interleave(group, 0)
        for c, f in ((k_cache, k), (v_cache, v))
    )
    seen = torch.cat([torch.ones(n, context, dtype=torch.bool), visible(rows)], 1).to(q.device)
    scores = torch.einsum("thd,hsd->hts", q.double(), keys) * q.shape[2] ** -0.5
    want = torch.einsum("hts,hsd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), values)
    return ((got.double() - want).abs().max() / want.abs().max()).item()


# ----------------------------------------------------------------------------------------------- times


@triton.jit
def _read(x, out, N, BLOCK: tl.constexpr):
    b = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        b += tl.load(x + start + tl.arange(0, BLOCK))
    if tl.sum(b) == 12345:
        tl.store(out, 1)


def graph_time(work, layers: int, repeats: int = 11) -> float:
    """Median microseconds a layer of work(0), ..., work(layers - 1) in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            work(layer)
    times = []
    for i in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1000 / layers)
    return round(statistics.median(times), 2)


def read_bandwidth() -> float:
    """Bytes a nanosecond of a plain read of 2 GiB of random numbers."""
    x = torch.randint(-(2**31), 2**31, (2**29,), dtype=torch.int32, device=DEVICE)
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sm = torch.cuda.get_device_properties(0).multi_processor_count

    def work(_):
        _read[(8 * sm,)](x, out, x.numel(), BLOCK=4096, num_warps=8)

    return round(x.numel() * 4 / graph_time(work, 1) / 1000, 1)


class Bench:
    """Caches of one context for enough layers to overflow the L2 cache."""

    def __init__(self, context: int) -> None:
        self.space: torch.Tensor
        self.layers = max(3, min(64, -(-(400 << 20) // (context * G * D * 4))))
        shape = (self.layers, 1, G, context + 8, D)
        self.k, self.v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in "kv")

    def ours(self, rows: Rows, form: str = "auto"):
        """A call of one layer, its tensors ready, that returns its output; `space` holds its partials."""
        n = len(rows)
        generator = torch.Generator(DEVICE).manual_seed(3)
        q, k, v = (torch.randn(n, h, D, device=DEVICE, generator=generator).to(DTYPE) for h in (H, G, G))
        packed = pack(rows, at.tile_rows(H, G, D, DTYPE, rows), DEVICE)
        self.space = space = torch.empty(at.workspace_size(packed, H, D), device=DEVICE)
        out = torch.empty_like(q)

        def work(layer: int):
            caches = self.k[layer], self.v[layer]
            return at.attention_triton(q, k, v, *caches, packed, D**-0.5, out=out, workspace=space, form=form)

        return work

    def peer(self, n: int, backend: SDPBackend, folded: bool):
        heads, rows = (G, n * (H // G)) if folded else (H, n)
        q = torch.randn(1, heads, rows, D, device=DEVICE).to(DTYPE)

        def work(layer: int):
            k, v = self.k[layer], self.v[layer]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=not folded)

        return work


PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def mixed_passes() -> tuple[list[int], list[int]]:
    """A draft tree's parents and the nodes with a block."""
    rng = random.Random(5)
    parents = random_tree(rng, 33)
    return parents, sorted(rng.sample(range(33), 24))


def blocks_only(count: int, size: int, start: int) -> Rows:
    n = count * size
    blocks, positions = [i // size for i in range(n)], [start + i % size for i in range(n)]
    return Rows([1] * n, [-1] * n, blocks, positions, [0] * n, {0: start})


class Skipped:
    def __getitem__(self, grid):
        return lambda **arguments: None


def without_combine(bench: Bench, rows: Rows) -> float:
    kernel, at._combine_kernel = at._combine_kernel, Skipped()
    try:
        return graph_time(bench.ours(rows, "partial"), bench.layers)
    finally:
        at._combine_kernel = kernel


def times(bandwidth: float) -> None:
    for context in (1024, 16384, 40960):
        for entry in times_at(context, bandwidth):
            RESULTS.setdefault("times", []).append(entry)
            print(entry, flush=True)
        torch.cuda.empty_cache()


def times_at(context: int, bandwidth: float):
    """Entries of one context: chains of rows beside the peers, then the mixed pass."""
    bench = Bench(context)
    roof = round(context * G * D * 4 / bandwidth / 1000, 1)

    def time_of(name: str, work, repeats: int = 11) -> float | None:
        return attempt(name, lambda: graph_time(work, bench.layers, repeats))

    for n in (1, 2, 4, 8, 32, 64, 128):
        rows = Rows.chain([1] * n, context)
        entry = {"context": context, "rows": n, "roof": roof, "ours": time_of("ours", bench.ours(rows))}
        if n <= 4:
            entry["fused"] = time_of("fused", bench.ours(rows, "fused"))
        entry["apart"] = time_of("apart", bench.ours(rows, "partial"))
        if n in (1, 64):
            entry["without combine"] = attempt("no combine", lambda: without_combine(bench, rows))  # noqa: B023
        for name, folded in [("flash", False), *([("cudnn", False)] if n == 1 else [("flash", True)])]:
            if n not in (2, 4, 8):
                key = name + (" folded" if folded else "")
                entry[key] = attempt(key, lambda: time_of(key, bench.peer(n, PEERS[name], folded), 5))  # noqa: B023
        yield entry
    parents, anchors = mixed_passes()
    mixed = Rows.tree_with_blocks([1] * 33, parents, context, anchors, 6, 2)
    yield {
        "context": context,
        "33 + 24 x 6 rows": time_of("mixed", bench.ours(mixed)),
        "33 alone": time_of("33", bench.ours(Rows.tree([1] * 33, parents, context))),
        "24 x 6 alone": time_of("24 x 6", bench.ours(blocks_only(24, 6, context))),
    }


def prefill() -> None:
    for context, n in ((0, 4096), (3584, 512)):
        entry = prefill_at(context, n)
        RESULTS.setdefault("prefill", []).append(entry)
        print("PREFILL (512 after 3584: peers without a mask)", entry, flush=True)
        torch.cuda.empty_cache()


def prefill_at(context: int, n: int) -> dict:
    bench = Bench(4096)
    rows = Rows.chain([1] * n, context)
    entry = {"prefill rows": n, "context": context}
    entry["whole"] = attempt("whole", lambda: graph_time(bench.ours(rows, "whole"), 3, 5))
    q = torch.randn(1, H, n, D, device=DEVICE, dtype=DTYPE)

    def peer(backend: SDPBackend):
        def work(layer: int):
            k, v = bench.k[layer, :, :, :4096], bench.v[layer, :, :, :4096]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=context == 0, enable_gqa=True)

        return work

    for name, backend in PEERS.items():
        entry[name] = attempt(name, lambda: graph_time(peer(backend), 3, 5))  # noqa: B023
    return entry


def variants() -> None:
    """Stages of the key loop, and partials in flight. "same bits": whether they are those of the default."""
    launch = at.LAUNCH[(D, 2)]
    default = launch[3], at.FUSED_UNROLL, at.COMBINE_UNROLL
    cases = [default, (4, *default[1:]), (launch[3], 8, 4), (launch[3], 4, 16)]
    benches = {context: Bench(context) for context in (1024, 16384, 40960)}
    passes = [(context, n) for n in (1, 64) for context in benches]
    base: dict = {}
    for stages, fused, unroll in cases:
        at.LAUNCH[(D, 2)], at.FUSED_UNROLL, at.COMBINE_UNROLL = (*launch[:3], stages), fused, unroll
        name = f"{stages} stages, {fused} fused and {unroll} combined partials in flight"
        entry: dict = {"variant": name}
        same = []
        for context, n in passes:

            def one():
                work = benches[context].ours(Rows.chain([1] * n, context))  # noqa: B023
                out = work(0).clone()
                same.append(torch.equal(out, base.setdefault((context, n), out)))  # noqa: B023
                return graph_time(work, min(benches[context].layers, 30), 7)  # noqa: B023

            entry[f"{context}/{n}"] = attempt(name, one)
        entry["same bits"] = "".join("=" if s else "x" for s in same)
        RESULTS.setdefault("variants", []).append(entry)
        print(entry, flush=True)
    at.LAUNCH[(D, 2)], at.FUSED_UNROLL, at.COMBINE_UNROLL = launch, *default[1:]


def short_table(bandwidth: float) -> None:
    """What matters, last: bits, then ours over the roof and over the best peer."""
    columns = ("rows", "roof", "ours", "fused", "apart")
    print(f"\nmicroseconds a layer; read {bandwidth} GB/s")
    print("bits", RESULTS.get("bits"), "\nsoak", RESULTS.get("soak"))
    print(
        f"{'context':>8}" + "".join(f"{name:>11}" for name in (*columns, "x roof", "x peer")) + "  best peer"
    )
    for line in RESULTS.get("times", []):
        if "rows" not in line:
            print("  ".join(f"{key} {value}" for key, value in line.items()))
            continue
        peers = {key: t for key, t in line.items() if t and key.split()[0] in PEERS}
        best = min(peers, key=peers.__getitem__, default="none")
        ours = line["ours"] or float("nan")
        ratios = ours / line["roof"], ours / peers.get(best, float("nan"))
        numbers = "".join(f"{line.get(name) or '-':>11}" for name in columns)
        print(f"{line['context']:8}{numbers}{ratios[0]:11.2f}{ratios[1]:11.2f}  {best} {peers.get(best, '')}")
    for line in RESULTS.get("prefill", []) + RESULTS.get("variants", []):
        print("  ".join(f"{key} {value}" for key, value in line.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python bench/gpu_attention.py --json attention.json",
    )
    parser.add_argument("--bits-seconds", type=float, default=10, help="time for the comparison of bits")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu_attention.py needs a GPU, and there is none here")
    start = time.time()
    device = torch.cuda.get_device_name()
    print(device, "torch", torch.__version__, "triton", triton.__version__, flush=True)
    RESULTS["machine"] = [device, torch.__version__, triton.__version__]
    attempt("bits", lambda: bits(args.bits_seconds))
    attempt("soak", soak)
    bandwidth = attempt("bandwidth", read_bandwidth) or 3000.0
    RESULTS["read GB/s"] = bandwidth
    print("read", bandwidth, "GB/s", f"{time.time() - start:.0f} s", flush=True)
    attempt("times", lambda: times(bandwidth))
    attempt("prefill", prefill)
    print(f"{time.time() - start:.0f} s", flush=True)
    attempt("variants", variants)
    short_table(bandwidth)
    print(f"{time.time() - start:.0f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps(RESULTS, indent=1))
    print(json.dumps(RESULTS))


if __name__ == "__main__":
    main()
