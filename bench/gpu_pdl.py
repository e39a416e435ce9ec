"""Dependent launches (src/orthrus_kernels/pdl.py) in whole passes on a GPU: their bits, then their times.

    PYTHONPATH=src python bench/gpu_pdl.py          # under 2 minutes on an H100; JSON to --json

Random models: 8B with 8 of its 36 layers (times of all 36 from those of 8 and of 2) and all of 1.7B. Passes
of `Qwen3.compute` over 1 and 32 AR rows behind 1024 cached tokens, each as one CUDA graph:

    off                          ordinary launches
    rowwise                      norms, rotary embedding, SwiGLU and embedding as dependent launches
    rowwise, signals             and linears, in their turn, let the kernel behind them start early
    rowwise, attention, signals  and attention
    all                          and linears start early too, with a prefetch of their weights into L2 as the
                                 launch table says
    all, N blocks                the same with N blocks of K of each weight row
    all, SwiGLU apart            all, with SwiGLU as a kernel behind the gate and up projections

1. Bits: logits, keys and values of 50 replays with other tokens each, queued back to back, and of 3 passes
   launched one by one, against those of `off`.
2. Times: medians over rounds, in which each variant has its turn.

Fails (exit status 1) when any bits differ; no times are reported then."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_linear import captured, commit, say, short  # noqa: E402
from models import MODELS  # noqa: E402

from orthrus_kernels import Ops, Rows, backend_ops, tables  # noqa: E402
from orthrus_kernels._triton import triton  # noqa: E402
from orthrus_kernels.linear_swiglu import linear_swiglu_triton, swiglu_entry  # noqa: E402
from orthrus_kernels.linear_triton import linear_triton  # noqa: E402
from orthrus_kernels.pdl import pdl_supported  # noqa: E402
from qwen3_model import Qwen3, Qwen3Config  # noqa: E402
from qwen3_model.captured import PassInputs  # noqa: E402
from qwen3_model.kv_cache import KVCache  # noqa: E402
from qwen3_model.model import Output  # noqa: E402

DEVICE, CONTEXT, ROWS = "cuda", 1024, (1, 32)
LAYERS = {"8B": (8, 2), "1.7B": (28,)}  # that are timed; the first number is the model's
REPLAYS, EAGER = 50, 3  # passes whose bits are compared
ROUNDS, IN_A_ROUND = 11, 4
VARIANTS = {
    "off": (),
    "rowwise": ("rowwise",),
    "rowwise, signals": ("rowwise", "signals"),
    "rowwise, attention, signals": ("rowwise", "attention", "signals"),
    "all": ("rowwise", "attention", "linear"),
}
BLOCKS = (0, 1, 4, 8)  # the table says 2
VARIANTS |= {f"all, {n} blocks": VARIANTS["all"] for n in BLOCKS}
VARIANTS["all, SwiGLU apart"] = VARIANTS["all"]


def ops_of(variant: str) -> Ops:
    ops = backend_ops("triton", VARIANTS[variant])
    if variant.endswith("SwiGLU apart"):
        return replace(ops, linear_swiglu=lambda x, gate_up: ops.swiglu(ops.linear(x, gate_up)))
    if not variant.endswith(" blocks"):
        return ops
    blocks = int(variant.removesuffix(" blocks").split(", ")[-1])
    return replace(
        ops,
        linear=partial(prefetching, blocks, linear_triton, tables.linear_entry),
        linear_swiglu=partial(prefetching, blocks, linear_swiglu_triton, swiglu_entry),
    )


def prefetching(
    blocks: int, op: Callable, entry_of: Callable, x: torch.Tensor, weight: torch.Tensor, *more, **how
):
    """An early linear that asks L2 for so many blocks."""
    entry = entry_of(*weight.shape, x.dtype, tables.device_key(x.device))
    entry = replace(entry, tiles=tuple(replace(tile, prefetch=blocks) for tile in entry.tiles))
    return op(x, weight, *more, entry=entry, pdl=True, **how)


def random_model(size: str, layers: int) -> Qwen3:
    shape = MODELS[size]
    config = Qwen3Config(
        vocab_size=shape.V, hidden_size=shape.E, intermediate_size=shape.F, num_hidden_layers=layers,
        num_attention_heads=shape.H, num_key_value_heads=shape.G, head_dim=shape.D,
        max_position_embeddings=40960, tie_word_embeddings=size == "1.7B", dtype="bfloat16",
    )  # fmt: skip
    return Qwen3.from_config(config, device=DEVICE, dtype="bfloat16", backend="triton")


def filled_cache(model: Qwen3) -> KVCache:
    cache = model.new_cache(2 * CONTEXT)
    for t in (cache.keys, cache.values):
        t.normal_()
    cache.lengths[0] = CONTEXT
    return cache


def inputs_of(model: Qwen3, rows: int) -> PassInputs:
    """A chain of AR rows behind the context, logits of all wanted, in tensors of its own."""
    c, chain = model.config, Rows.chain(range(rows), CONTEXT)
    prepared = model.ops.prepare_rows(
        chain, c.num_attention_heads, c.num_key_value_heads, c.head_dim, model.dtype, torch.device("cpu")
    )
    ids = torch.tensor([chain.tokens, chain.positions])
    return PassInputs(ids, prepared, rows, None).on(model.device)


class Passes:
    """The passes of one model over one number of rows, a graph a variant, all from the same inputs."""

    def __init__(self, model: Qwen3, rows: int) -> None:
        self.model, self.rows, self.cache = model, rows, filled_cache(model)
        self.inputs = inputs_of(model, rows)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.outputs: dict[str, Output] = {}

    def launch(self, variant: str) -> Output:
        self.model.ops = ops_of(variant)
        self.outputs[variant] = self.model.compute(self.inputs, self.cache)
        return self.outputs[variant]

    def capture(self, variant: str) -> None:
        self.graphs[variant] = captured(partial(self.launch, variant))

    def results(self, tokens: torch.Tensor, run: Callable[[], Output]) -> list[list[torch.Tensor]]:
        """Logits, keys and values of a pass for each row of `tokens`, one behind the other."""
        kept = []
        for line in tokens:
            self.inputs.ids[0].copy_(line)
            out = run()
            kept.append([t.clone() for t in (out.logits, out.keys, out.values)])
        return kept

    def replayed(self, variant: str) -> Output:
        self.graphs[variant].replay()
        return self.outputs[variant]

    def us(self, variants: list[str]) -> dict[str, float]:
        """Median microseconds of a pass by variant."""
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for variant in variants:
            self.graphs[variant].replay()
        for _ in range(ROUNDS):
            for variant in variants:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(IN_A_ROUND):
                    self.graphs[variant].replay()
                end.record()
                torch.cuda.synchronize()
                times[variant].append(start.elapsed_time(end) * 1e3 / IN_A_ROUND)
        return {variant: statistics.median(each) for variant, each in times.items()}


def differing(ours: list[list[torch.Tensor]], plain: list[list[torch.Tensor]]) -> int:
    """Passes of which any logits, keys or values differ."""
    return sum(
        not all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        for x, y in zip(ours, plain, strict=True)
    )


def check(passes: Passes, bad: dict[str, str]) -> dict[str, dict]:
    """Capture every variant and compare its bits; what does not run goes to `bad`."""
    vocabulary = passes.model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (REPLAYS, passes.rows), device=DEVICE)
    passes.capture("off")
    plain = passes.results(tokens, partial(passes.replayed, "off"))
    spread = differing(plain[1:], plain[:-1])  # other tokens, other bits: else nothing would be compared
    assert spread == REPLAYS - 1, f"{spread} of {REPLAYS - 1} passes differ from the one before"
    found = {}
    for variant in VARIANTS:
        if variant == "off" or variant in bad:
            continue
        try:
            passes.capture(variant)
            replays = differing(passes.results(tokens, partial(passes.replayed, variant)), plain)
            launched = passes.results(tokens[:EAGER], partial(passes.launch, variant))
            eager = differing(launched, plain[:EAGER])
        except Exception as error:
            bad[variant] = short(error)
            say(f"  {variant} does not run: {bad[variant]}")
            continue
        found[variant] = {"checks": REPLAYS + EAGER, "failures": replays + eager}
        if replays + eager:
            say(f"  FAILED {variant}: {replays} of {REPLAYS} replays, {eager} of {EAGER} launched passes")
    return found


def warm(size: str, variant: str) -> str | None:
    """Compile a variant's kernels, in a process of its own; what went wrong."""
    try:
        with torch.inference_mode():
            model = random_model(size, 1)
            for rows in ROWS:
                Passes(model, rows).launch(variant)
            torch.cuda.synchronize()
    except Exception as error:
        return short(error)
    return None


def time_passes(size: str, passes: Passes, variants: list[str]) -> list[dict]:
    """A line a variant: measured passes, and the pass of all layers of the model."""
    layers, all_layers, measured = passes.model.layers, MODELS[size].layers, {}
    for count in LAYERS[size]:
        passes.model.layers = layers[:count]
        for variant in variants:
            passes.capture(variant)
        measured[count] = passes.us(variants)
    passes.model.layers = layers
    lines = []
    for variant in variants:
        most, *fewer = ((count, us[variant]) for count, us in measured.items())
        line = {"size": size, "rows": passes.rows, "variant": variant,
                "us": {count: us[variant] for count, us in measured.items()}}  # fmt: skip
        line["us_a_layer"] = (most[1] - fewer[0][1]) / (most[0] - fewer[0][0]) if fewer else None
        line["pass_us"] = most[1] + (all_layers - most[0]) * (line["us_a_layer"] or 0)
        lines.append(line)
    for line in lines:
        line["of_off"] = line["pass_us"] / lines[0]["pass_us"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=7, help="processes that compile; each takes 4 GB")
    parser.add_argument("--json", default="gpu_pdl.json", help="write all figures to this file")
    given = parser.parse_args()
    if not torch.cuda.is_available() or not pdl_supported(torch.device(DEVICE)):
        sys.exit("no GPU with dependent launches here (sm_90 or later): this script measures one")
    torch.manual_seed(0)
    machine = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
    }  # fmt: skip
    say(str(machine))
    jobs = [(size, v) for size in LAYERS for v in VARIANTS if not v.endswith("blocks")]
    with get_context("spawn").Pool(given.workers) as pool:
        said = pool.starmap(warm, jobs, chunksize=1)
    bad = {variant: error for (_, variant), error in zip(jobs, said, strict=True) if error}
    say(f"compiled; does not run: {bad or 'none'}")
    result: dict = {"machine": machine, "bits": {}, "times": []}
    passes = {}
    with torch.inference_mode():
        for size, (layers, *_) in LAYERS.items():
            model = random_model(size, layers)
            for rows in ROWS:
                passes[size, rows] = Passes(model, rows)
                found = result["bits"][f"{size}, {rows} rows"] = check(passes[size, rows], bad)
                say(f"bits, {size}, {rows} rows: {found}")
        found = [one for variants in result["bits"].values() for one in variants.values()]
        failures = sum(one["failures"] for one in found)
        result |= {"bad": bad, "failures": failures}
        if not failures:
            variants = [v for v in VARIANTS if v not in bad]
            for (size, _), one in passes.items():
                result["times"] += time_passes(size, one, variants)
            say(f"passes as CUDA graphs, context {CONTEXT}, median µs of {ROUNDS} rounds")
    Path(given.json).write_text(json.dumps(result))
    say(f"{sum(one['checks'] for one in found)} passes compared, {failures} differ; all in {given.json}")
    for line in result["times"]:
        layer = f"{line['us_a_layer']:7.1f} µs a layer" if line["us_a_layer"] else " " * 18
        of_all = "from 8 layers" if line["us_a_layer"] else "measured"
        print(
            f"{line['size']:>5} {line['rows']:3} rows | {line['variant']:28} | {layer} | "
            f"{line['pass_us']:7.0f} µs a pass, {of_all:13} | {line['of_off']:.3f} of off",
            flush=True,
        )
    sys.exit(1 if failures or "off" in bad else 0)


if __name__ == "__main__":
    main()
